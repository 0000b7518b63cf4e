"""What a compiled program costs, without running it: compiled for a topology, read, counted, estimated."""
