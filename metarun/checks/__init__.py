"""What is looked at before, during and after a run, so that no wrong number passes in silence."""
