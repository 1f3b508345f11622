"""What the commands call, and `jaxprune` exports: a model is loaded, pruned, evaluated and
verified."""
