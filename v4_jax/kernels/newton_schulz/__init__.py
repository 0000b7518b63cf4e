"""Newton-Schulz iterations, which orthogonalise the updates of Muon."""
