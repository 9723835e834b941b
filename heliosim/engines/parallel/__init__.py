"""Tensor parallelism: several processes, each with a part of every layer, that act as one engine."""
