"""Formats, model families, checkpoints, and what is done with them. Knows nothing of nodes."""
