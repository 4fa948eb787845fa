"""What surrounds the layers: sums and norms of gradients across the mesh."""
