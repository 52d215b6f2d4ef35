"""Model-dependent methods: the architecture is the method."""
