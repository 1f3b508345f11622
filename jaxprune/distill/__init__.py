"""Distillation: tunes the pruned model towards the dense model's predictions."""
