"""Layers whose parameters are DTensors and whose arithmetic is on local tensors: one idea a file."""
