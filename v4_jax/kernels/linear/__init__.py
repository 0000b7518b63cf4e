"""Products with a weight."""
