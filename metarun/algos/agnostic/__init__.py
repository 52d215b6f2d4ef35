"""Model-agnostic methods: they adapt the weights of any differentiable model."""
