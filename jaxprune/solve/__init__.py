"""One layer: its Gram matrices, the target of each kernel, the solve, and what it gives."""
