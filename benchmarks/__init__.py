"""Side by side with peers: one run, the same weights, the same batches, one thread a rank."""
