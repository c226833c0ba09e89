"""Trained drafters that read the target's hidden states: their architectures and the formats of their checkpoints."""
