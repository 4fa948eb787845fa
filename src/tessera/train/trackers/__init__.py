"""Trackers, a file each, behind one interface; all.py opens those that a config asks for."""
