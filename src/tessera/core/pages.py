"""The pages that messages of a run name: decision lists whose steps are commands."""

OUT_OF_MEMORY = "docs/debugging/out-of-memory.md"
SLOW = "docs/debugging/slow.md"
LOSS = "docs/debugging/loss.md"
RANKS_DISAGREE = "docs/debugging/ranks-disagree.md"
