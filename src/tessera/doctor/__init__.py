"""What a machine, and a run on it, could be slow or fail for: looked at, measured, told with what to change."""
