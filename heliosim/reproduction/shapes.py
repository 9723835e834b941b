"""Bytes of the paper's models, all ranks together, from the shipped configuration files."""

from __future__ import annotations

from functools import cache

from heliosim.hardware.architecture import Architecture, open_architecture

GIB = 2**30


@cache
def architecture(model: str) -> Architecture:
    """A model of the paper by the name the report uses (``Llama3-8B``)."""
    return open_architecture(model.lower())


def layers(model: str) -> int:
    return architecture(model).layers


def weights_bytes(model: str, depth: int | None = None, dtype: str = "fp16") -> int:
    """Bytes of the first ``depth`` layers (default: all) with what every depth needs."""
    return architecture(model).weights_bytes(dtype, depth)


def weights_gib(model: str, depth: int | None = None, dtype: str = "fp16") -> float:
    return weights_bytes(model, depth, dtype) / GIB


def kv_bytes(model: str, depth: int, dtype: str = "fp16") -> int:
    """Bytes that one token keeps over ``depth`` layers."""
    return depth * architecture(model).kv_bytes(dtype)


def hidden_bytes(model: str, dtype: str = "fp16") -> int:
    """Bytes of one token's hidden state."""
    return architecture(model).hidden_bytes(dtype)
