"""A run of several processes: they meet, compare what they were asked, and end together."""
