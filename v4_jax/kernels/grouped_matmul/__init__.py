"""Rows grouped by expert meet their expert's weights."""
