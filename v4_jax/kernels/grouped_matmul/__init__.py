"""Rows grouped by expert times their expert's weights."""
