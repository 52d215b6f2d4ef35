"""Model-dependent methods: the architecture is part of the method."""
