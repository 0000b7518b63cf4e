"""Rows as whole tiles of a TPU's memory, as they travel, and as rows of a matrix, as they are multiplied."""
