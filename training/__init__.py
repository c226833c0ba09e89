"""Training of drafters for any target, and of small language models from scratch."""
