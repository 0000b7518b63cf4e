"""Continued pretraining and what follows it: objectives, optimiser, data, the loop, checkpoints."""
