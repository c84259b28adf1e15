"""From a wrapped model to others: a model card, other formats."""
