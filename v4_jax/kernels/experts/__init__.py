"""Whole experts on few rows."""
