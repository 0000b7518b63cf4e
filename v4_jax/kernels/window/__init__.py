"""A window of few tokens: stored and attended where the cache keeps it."""
