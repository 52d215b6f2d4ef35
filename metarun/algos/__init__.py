"""Algorithms: one paper, one file; the folder names the family."""
