"""Trainable counterparts of the drafters in models/heads: the same arithmetic with autograd, the formats' names."""
