"""Models: ordinary modules with a ``trunk`` and a ``head``."""
