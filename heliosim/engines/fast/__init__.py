"""The fast path: decode steps as functions over fixed buffers, captured as CUDA graphs, strides without round trips."""
