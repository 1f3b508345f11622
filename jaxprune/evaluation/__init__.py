"""How good a checkpoint is: perplexity, KL divergence, lm-eval's tasks; and whether it is what it
claims to be."""
