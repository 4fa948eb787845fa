"""Planning: what a layout costs, by closed forms that tests hold against what a run hands to torch.distributed."""
