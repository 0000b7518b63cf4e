"""Continued pretraining. Nothing here yet."""
