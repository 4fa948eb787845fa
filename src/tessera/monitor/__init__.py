"""Seeing a run: where its time goes."""
