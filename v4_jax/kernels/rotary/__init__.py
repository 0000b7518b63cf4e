"""What stands between a projection and attention: norm, rotation, rounding; and between attention and its output."""
