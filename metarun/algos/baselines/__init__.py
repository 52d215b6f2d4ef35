"""Baselines: what the same adaptation budget buys without meta-learning."""
