"""Early-exit OPT and Llama on raw tensors: host copies, paged KV, the layers and teacher-forced scoring."""
