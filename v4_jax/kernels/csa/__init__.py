"""Attention of queries over entries of their own."""
