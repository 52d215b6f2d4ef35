"""Command-line experiments in meta-learning; see ``metarun --help``."""

__version__ = "0.1.0"
