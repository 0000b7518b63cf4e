"""The key/value cache of a batch of rows."""
