"""A run on disk: what a checkpoint holds, how it is saved, read in any layout, and converted."""
