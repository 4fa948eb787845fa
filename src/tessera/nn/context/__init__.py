"""Context parallelism: a sequence's tokens on several ranks, one idea a file."""
