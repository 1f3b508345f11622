"""Runs of several processes: they connect, compare their options, and end together."""
