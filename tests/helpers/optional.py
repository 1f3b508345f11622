"""PyTorch, where it is installed: the extra `test-core` leaves it out."""

import pytest

try:
    import torch
except ModuleNotFoundError:
    torch = None

needs_torch = pytest.mark.skipif(
    torch is None, reason="compares with PyTorch, which the extra `test` brings"
)
