"""The boundary between two sublayers: write back to the streams, mix them, collapse them for the next."""
