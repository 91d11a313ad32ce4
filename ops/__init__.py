"""Arithmetic: one folder per operation, one file per backend. Knows nothing of files or nodes."""
