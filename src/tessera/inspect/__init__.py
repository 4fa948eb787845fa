"""Looking at a layout: what each rank holds and receives, in tables and pictures."""
