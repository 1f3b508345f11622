"""The tuning: a pruned student learns from the dense model."""
