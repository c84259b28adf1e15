"""What one pass of a model tells: the cost and the importance of its tensors."""
