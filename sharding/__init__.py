"""Mesh axes and the rules that place arrays on them. Knows arrays, not models."""
