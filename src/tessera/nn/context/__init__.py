"""Context parallelism: attention over sequences that several ranks share, moving only what its masks need."""
