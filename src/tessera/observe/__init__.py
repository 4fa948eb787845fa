"""Looking at runs: memory, plots."""
