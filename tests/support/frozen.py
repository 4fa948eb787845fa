"""Imported last by the server that processes are forked from: what it holds is no garbage, and no child looks again."""

import gc

gc.collect()
gc.freeze()
