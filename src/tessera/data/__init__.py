"""Text in, micro-batches out: sources (files) -> tokenizer -> prepare (rows on disk) -> rows -> loader.

Everything but the loader works without torch, so bad data is found before a process starts.
"""
