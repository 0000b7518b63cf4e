"""Inference: sampling, generation, scoring; many requests at once, from files and over HTTP; evaluation at length."""
