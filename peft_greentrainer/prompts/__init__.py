"""The split of a step into prompt and answer: the prompt is read, and what is learned is learned from the answer."""
