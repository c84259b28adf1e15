"""The peft tuner: values in place of base tensors. It knows nothing of cost."""
