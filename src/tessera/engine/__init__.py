"""One optimizer step: forward and backward of every micro-batch, sums of gradients, FSDP2, the update."""
