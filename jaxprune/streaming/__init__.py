"""A model larger than its device: layers come and go, hidden states stay on the host."""
