"""The Python API that `jaxprune` exports: loads, prunes, evaluates and verifies models."""
