"""What runs the meta-steps of a run."""
