"""Products of queries with keys."""
