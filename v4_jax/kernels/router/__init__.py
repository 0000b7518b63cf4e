"""The router: affinities of tokens to experts, and the choice."""
