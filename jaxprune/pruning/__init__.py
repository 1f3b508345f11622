"""A whole model pruned: the loop over layers, what decides their masks, distillation, and going on
after a crash."""
