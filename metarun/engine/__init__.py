"""The engine: what runs the meta-steps of a run."""
