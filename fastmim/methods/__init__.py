"""Training methods: one module each; `base.find` discovers them by name."""
