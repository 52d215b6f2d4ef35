"""Targets: the losses, scores and rows of each kind of output."""
