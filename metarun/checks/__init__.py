"""Checks before, during and after a run, so that no wrong number passes silently."""
