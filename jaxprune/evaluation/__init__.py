"""Measures of a checkpoint's quality, one a file."""
