"""Which weights are kept: patterns and masks."""
