"""Prunes one layer: Gram matrices, targets of its kernels, and the solves."""
