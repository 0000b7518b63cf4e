"""One token's step of the compressor: its projections are kept and, where a block ends, pooled into an entry."""
