"""``python -m metarun`` is the command ``metarun``."""

from metarun.cli import main

main()
