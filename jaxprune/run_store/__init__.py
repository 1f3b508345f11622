"""Saved results of a run that can stop and resume, its identity, and publishing."""
