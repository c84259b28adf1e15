"""What a tensor is called, its forms, and whether it can be trained."""
