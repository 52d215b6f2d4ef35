"""Baselines: what the same adaptation budget achieves without meta-learning."""
