"""Weights in host memory, and what of them is on a device.

A layer is one flat tensor, so loading it is one copy and its bytes are what was asked for, no more. Host tensors are
pinned when the device is a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from heliosim.engines.models.incoming import Awaited, Incoming
from heliosim.engines.models.llama import Llama
from heliosim.engines.models.opt import Opt
from heliosim.engines.models.paged import KVShape
from heliosim.engines.models.random_parts import random_part
from heliosim.engines.models.ranks import ALONE, Ranks
from heliosim.errors import InputError
from heliosim.formats.checkpoint import CheckpointInfo, Part
from heliosim.formats.weight_files import Cut

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Flat:
    """Named tensors in one piece of memory. ``shapes`` by name, in the order they lie there."""

    __slots__ = ("data", "shapes")

    def __init__(self, data: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.data, self.shapes = data, shapes

    def views(self) -> dict[str, Tensor]:
        ends = accumulate(math.prod(shape) for shape in self.shapes.values())
        bounds = pairwise((0, *ends))
        return {
            name: self.data[a:b].view(shape) for (name, shape), (a, b) in zip(self.shapes.items(), bounds, strict=True)
        }

    def copied(self, device: torch.device, dtype: torch.dtype) -> Flat:
        """A copy on ``device``, also where that is the host: residency has to cost what it costs."""
        made = torch.empty(self.data.shape, device=device, dtype=dtype)
        made.copy_(self.data, non_blocking=True)
        return Flat(made, self.shapes)


class HostModel:
    """All weights of a checkpoint in host memory, in the dtype its ``info`` was made for.

    ``ranks``: the tensor-parallel group whose part ``info`` describes.
    """

    def __init__(self, info: CheckpointInfo, *, is_pinned: bool = False, ranks: Ranks = ALONE) -> None:
        self.info = info
        self.dtype = DTYPES[info.dtype]
        self.family: Opt | Llama = Opt(info) if info.architecture == "opt" else Llama(info)
        self.ranks = ranks
        self.family.share(ranks)
        self.kv_shape = KVShape(info.heads, info.kv_heads, info.head_dim)
        self.heads = tuple(info.head_shapes)
        self.held = info.spec.layers
        self._is_pinned = is_pinned
        self._flats: dict[tuple[str, int], Flat] = {}
        with _Reader(info) as reader:
            self._flats = {piece: self._from_disk(*piece, reader) for piece in self._pieces(self.held)}

    def _pieces(self, depth: int) -> list[tuple[str, int]]:
        """What ``depth`` layers consist of; nothing of a model of which no layer is held."""
        if not depth:
            return []
        heads = [("head", e) for e in self.heads if e <= depth]
        return [("base", 0), *(("layer", i) for i in range(depth)), *heads]

    def _from_disk(self, kind: str, number: int, reader: _Reader) -> Flat:
        info = self.info
        reader.piece = f"{kind} {number}"
        if kind == "base":
            return self._read(info.base_parts(), reader, self._is_pinned, is_turned=False)
        parts = info.layer_parts(number) if kind == "layer" else info.head_parts(number)
        return self._read(parts, reader, self._is_pinned)

    def flat(self, kind: str, number: int = 0) -> Flat:
        """The base, a layer (from 0) or an exit's head: from host memory, or read from disk where it is not held."""
        known = self._flats.get((kind, number))
        if known is not None:
            return known
        with _Reader(self.info) as reader:
            read = self._from_disk(kind, number, reader)
        if (kind, number) in self._pieces(self.held):
            self._flats[kind, number] = read
        return read

    def hold(self, depth: int) -> None:
        """Keep the first ``depth`` layers in host memory, once they have come there; free the rest."""
        self.held = depth
        wanted = set(self._pieces(depth))
        self._flats = {piece: flat for piece, flat in self._flats.items() if piece in wanted}

    @property
    def host_bytes(self) -> int:
        """Bytes of weights in host memory."""
        return sum(flat.data.nbytes for flat in self._flats.values())

    def _read(self, parts: Sequence[Part], reader: _Reader, is_pinned: bool, *, is_turned: bool = True) -> Flat:
        """``is_turned``: matrices lie as [in, out]; products of few rows are a third faster so on a CPU."""
        shapes = {part.name: part.shape[::-1] if is_turned else part.shape for part in parts}
        flat = Flat(torch.empty(sum(p.elements for p in parts), dtype=self.dtype, pin_memory=is_pinned), shapes)
        for part, view in zip(parts, flat.views().values(), strict=True):
            stored = reader.part(part) if part.whole is None else _taken(reader.part(part.whole), part.cuts)
            arranged = self.family.arrange(part.name, stored)
            view.copy_(arranged.t() if is_turned and arranged.ndim == 2 else arranged)
        return flat

    def resident(self, depth: int, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Resident:
        """The first ``depth`` layers, and the heads of the exits up to there, on a device."""
        made = Resident(self, torch.device(device), self.dtype if dtype is None else dtype)
        made.deepen(depth)
        return made

    def require_exit(self, depth: int) -> None:
        """Raise InputError unless tokens can leave behind ``depth`` layers."""
        spec = self.info.spec
        if not 1 <= depth <= spec.layers:
            raise InputError("placement.depth", depth, f"{spec.name} has {spec.layers} layers", "Choose 1 or more.")
        if spec.kind == "fixed" and depth not in spec.exits:
            remedy = f"Choose one of {', '.join(map(str, spec.exits))}."
            raise InputError("placement.depth", depth, f"{spec.name} has no exit there", remedy)


class Resident:
    """The part of a model that is on a device. ``nbytes`` is what it holds there, activations and KV apart."""

    def __init__(
        self, host: HostModel, device: torch.device, dtype: torch.dtype, arrival: Incoming | None = None
    ) -> None:
        """``arrival``: brings the base, and the layers to ``adopt``."""
        self.host, self.device, self.dtype = host, device, dtype
        self.family: Any = host.family  # typed loosely: a layer's type belongs to its family
        self._base = host.flat("base").copied(device, dtype) if arrival is None else arrival.take("base", 0)
        self.base = self._base.views()
        self._unembed = self.base.get("head", self.base["embed"]).t()
        self._layers: list[Flat] = []
        self.layers: list[Any] = []
        self._heads: dict[int, Flat] = {}
        self.heads: dict[int, dict[str, Tensor]] = {}

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def nbytes(self) -> int:
        flats = [self._base, *self._layers, *self._heads.values()]
        return sum(flat.data.nbytes for flat in flats)

    def deepen(self, depth: int) -> None:
        """Copy the layers up to ``depth`` that are missing, and the exit heads with them."""
        self.settle()
        for i in range(self.depth, depth):
            flat = self.host.flat("layer", i).copied(self.device, self.dtype)
            self._layers.append(flat)
            self.layers.append(self.family.bind(flat.views()))
        for exit_layer in self.host.heads:
            if exit_layer <= depth and exit_layer not in self.heads:
                flat = self.host.flat("head", exit_layer).copied(self.device, self.dtype)
                self._heads[exit_layer] = flat
                self.heads[exit_layer] = flat.views()

    def adopt(self, arrival: Incoming) -> None:
        """Take over layers that are arriving: each is waited for when it is first used. ``settle`` ends that."""

        def bound(i: int) -> Any:
            flat = arrival.take("layer", i)
            self._layers.append(flat)
            if i + 1 in arrival.heads:
                self._heads[i + 1] = arrival.take("head", i + 1)
                self.heads[i + 1] = self._heads[i + 1].views()
            return self.family.bind(flat.views())

        self.layers = Awaited(list(self.layers), bound, arrival.depth)

    def settle(self) -> None:
        """Wait for every layer that is arriving."""
        if isinstance(self.layers, Awaited):
            self.layers = [self.layers[i] for i in range(len(self.layers))]

    def drop(self, depth: int) -> None:
        """Free the layers and heads behind ``depth``."""
        self.settle()
        del self._layers[depth:], self.layers[depth:]
        for exit_layer in [e for e in self.heads if e > depth]:
            del self._heads[exit_layer], self.heads[exit_layer]

    def logits(self, h: Tensor, depth: int) -> Tensor:
        """Next-token logits [n, vocabulary] from hidden states [n, d] behind ``depth`` layers."""
        head = self.heads.get(depth)
        normed_by = self.base
        if head is not None:
            if "up_weight" in head:
                family = self.family
                inner = torch.nn.functional.gelu(torch.addmm(head["up_bias"], h, head["up_weight"]))
                h = family.reduce(torch.addmm(h, inner, head["down_weight"], beta=family.beta)).add_(head["down_bias"])
            if "norm_weight" in head:
                normed_by = head
        logits = torch.mm(self.family.normed(normed_by, h), self._unembed)
        return self.host.ranks.whole(logits, self.host.info.vocab)


def _taken(whole: Tensor, cuts: Sequence[Cut]) -> Tensor:
    """What cuts take of a tensor, one behind the other; zeros where one reaches over its end."""
    axis, taken = cuts[0].axis, []
    for cut in cuts:
        count = max(0, min(cut.count, whole.shape[axis] - cut.first))
        taken.append(whole.narrow(axis, min(cut.first, whole.shape[axis]), count))
        if count < cut.count:
            size = list(whole.shape)
            size[axis] = cut.count - count
            taken.append(whole.new_zeros(size))
    return torch.cat(taken, axis)


class _Reader:
    """Opens each weight file once, or draws random weights. ``piece``: which piece of the model its parts are of."""

    def __init__(self, info: CheckpointInfo) -> None:
        self._info = info
        self._open: dict[Any, Any] = {}
        self.piece = ""

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def part(self, part: Part) -> Tensor:
        """A part of ``piece`` as the checkpoint has it, matrices [out, in]."""
        if self._info.random is not None:
            return random_part(self._info, self.piece, part)
        return torch.cat([self.tensor(source) for source in part.sources])

    def tensor(self, name: str) -> Tensor:
        file = self._info.tensors[name].file
        if file not in self._open:
            opener: Callable[..., Any] = safe_open
            self._open[file] = opener(file, framework="pt")
        tensor: Tensor = self._open[file].get_tensor(name)
        return tensor
