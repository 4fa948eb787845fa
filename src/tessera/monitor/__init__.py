"""What a run measures of itself while it trains: where its time and memory go, and which rank is slow."""
