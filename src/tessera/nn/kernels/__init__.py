"""Kernels of attention, a file each; attend.py chooses among them."""
