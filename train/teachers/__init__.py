"""Models that read what another one learns: what they are, what they read, and what they say of it."""
