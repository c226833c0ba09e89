"""Structured output: what a text must be, as a mask over the vocabulary at every node of a tree.

The grammars themselves are llguidance's, which knows whether a text can still become what they say. Here is what
connects it to an engine that verifies trees: compiling beside the engine's loop, a matcher for each sequence that walks
its tree, and the masks. Only masks.py knows tensors; what compiles is also what the server's checking process runs.
"""
