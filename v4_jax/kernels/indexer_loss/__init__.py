"""What trains the indexer: how far its scores are from the attention that entries get."""
