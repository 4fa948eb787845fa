"""Runs the ranks of a run on one machine or several, and ends them well."""
