"""Removes whole parts of a model, so that an ordinary smaller checkpoint remains."""
