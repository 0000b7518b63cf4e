"""Continued pretraining: objective, optimiser, data, loop."""
