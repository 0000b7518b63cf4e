"""Queries and keys."""
