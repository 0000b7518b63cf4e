"""Inference: sampling, generation, scoring."""
