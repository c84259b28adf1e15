"""Numbers in, choice out: what a set of tensors costs, and which set is worth most within a budget."""
