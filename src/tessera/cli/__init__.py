"""The command line: each command reads its options and calls the room that does the work."""
