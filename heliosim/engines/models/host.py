"""Weights in host memory or on disk, and what of them is on a device.

A layer is one flat tensor, so loading it is one copy and its bytes are what was asked for, no more. Host tensors are
pinned when the device is a GPU. What host memory does not hold comes from the checkpoint's mapped files through a small
``Ring`` of buffers, never as a whole copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from heliosim.engines.models.incoming import Awaited, Incoming, Piece, Slots
from heliosim.engines.models.llama import Llama
from heliosim.engines.models.opt import Opt
from heliosim.engines.models.paged import KVShape
from heliosim.engines.models.random_parts import random_part
from heliosim.engines.models.ranks import ALONE, Ranks
from heliosim.engines.models.ring import Ring
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


class HostModel:
    """The weights of a checkpoint, in the dtype its ``info`` was made for: its first ``held`` layers in host memory
    (None: all), the rest on disk until ``hold`` says otherwise. ``ranks``: the tensor-parallel group whose part
    ``info`` describes.
    """

    def __init__(
        self, info: CheckpointInfo, *, is_pinned: bool = False, held: int | None = None, ranks: Ranks = ALONE
    ) -> None:
        self.info = info
        self.dtype = DTYPES[info.dtype]
        self.family: Opt | Llama = Opt(info) if info.architecture == "opt" else Llama(info)
        self.ranks = ranks
        self.family.share(ranks)
        self.kv_shape = KVShape(info.heads, info.kv_heads, info.head_dim)
        self.heads = tuple(info.head_shapes)
        self.held = info.spec.layers if held is None else held
        self._is_pinned = is_pinned
        self._shapes = {piece: self._shapes_of(piece) for piece in self.pieces(info.spec.layers)}
        self._places: dict[Piece, tuple[int, int]] = {}
        first = 0
        for piece, shapes in self._shapes.items():
            values = sum(math.prod(shape) for shape in shapes.values())
            self._places[piece] = first, values
            first += values
        self._flats: dict[Piece, Flat] = {}
        with Reader(info) as reader:
            self._flats = {piece: self._from_disk(piece, reader) for piece in self.pieces(self.held)}

    # --- what it consists of ----------------------------------------------------------------------------------------

    def pieces(self, depth: int, behind: int = 0) -> list[Piece]:
        """What ``depth`` layers consist of, in the order it lies on a device: the base, then the layers, each exit's
        head behind its layer. ``behind``: without what so many layers consist of. Nothing for no layers.
        """
        made: list[Piece] = [] if behind or not depth else [("base", 0)]
        for i in range(behind, depth):
            made.append(("layer", i))
            if i + 1 in self.heads:
                made.append(("head", i + 1))
        return made

    def place(self, kind: str, number: int) -> tuple[int, int]:
        """(first value, values) of a piece on a device, counted from where the model lies."""
        return self._places[kind, number]  # type: ignore[index]

    def values(self, depth: int) -> int:
        """Values that the pieces of ``depth`` layers hold."""
        return sum(self._places[piece][1] for piece in self.pieces(depth))

    @property
    def largest(self) -> int:
        """Values of the largest piece but the base."""
        return max(values for (kind, _), (_, values) in self._places.items() if kind != "base")

    def shapes(self, piece: Piece) -> Mapping[str, tuple[int, ...]]:
        """The tensors of a piece, in the order they lie there."""
        return self._shapes[piece]

    def _shapes_of(self, piece: Piece) -> dict[str, tuple[int, ...]]:
        """Matrices of layers and heads lie as [in, out]; products of few rows are a third faster so on a CPU."""
        is_turned = piece[0] != "base"
        return {part.name: part.shape[::-1] if is_turned else part.shape for part in self._parts(piece)}

    def _parts(self, piece: Piece) -> Sequence[Part]:
        kind, number = piece
        if kind == "base":
            return self.info.base_parts()
        return self.info.layer_parts(number) if kind == "layer" else self.info.head_parts(number)

    # --- host memory ------------------------------------------------------------------------------------------------

    def flat(self, kind: str, number: int = 0) -> Flat:
        """A piece: from host memory, or read from disk where it is not held."""
        piece: Piece = kind, number  # type: ignore[assignment]
        known = self._flats.get(piece)
        if known is not None:
            return known
        with Reader(self.info) as reader:
            read = self._from_disk(piece, reader)
        if piece in self.pieces(self.held):
            self._flats[piece] = read
        return read

    def has(self, piece: Piece) -> bool:
        """Whether a piece is in host memory."""
        return piece in self._flats

    def hold(self, depth: int) -> None:
        """Keep the first ``depth`` layers in host memory, once they have come there; free the rest."""
        self.held = depth
        wanted = set(self.pieces(depth))
        self._flats = {piece: flat for piece, flat in self._flats.items() if piece in wanted}

    @property
    def host_bytes(self) -> int:
        """Bytes of weights in host memory."""
        return sum(flat.data.nbytes for flat in self._flats.values())

    def _from_disk(self, piece: Piece, reader: Reader) -> Flat:
        values = self._places[piece][1]
        flat = Flat(torch.empty(values, dtype=self.dtype, pin_memory=self._is_pinned), self._shapes[piece])
        self._fill(piece, flat, reader)
        return flat

    def _fill(self, piece: Piece, flat: Flat, reader: Reader) -> None:
        """Read a piece into ``flat``."""
        for part, view in zip(self._parts(piece), flat.views().values(), strict=True):
            stored = list(reader.tensors(piece, part))
            arranged = self.family.arrange(part.name, stored[0] if len(stored) == 1 else torch.cat(stored))
            view.copy_(arranged.t() if piece[0] != "base" and arranged.ndim == 2 else arranged)

    # --- on the way to a device -------------------------------------------------------------------------------------

    def stream(self, piece: Piece, ring: Ring) -> Iterator[tuple[int, Tensor]]:
        """A piece in parts (first value, values), to be copied at once: from host memory; or from disk, into host
        memory first if it is to stay there, otherwise through ``ring``, a part at a time.
        """
        if piece in self._flats or piece in self.pieces(self.held):
            yield 0, self.flat(*piece).data
        elif piece[0] != "base":
            flat = Flat(ring.buffer(self._places[piece][1], self.dtype), self._shapes[piece])
            self._fill(piece, flat, ring.reader(self.info))
            yield 0, flat.data
            ring.sent()
        else:
            yield from self._stream_base(ring)

    def _stream_base(self, ring: Ring) -> Iterator[tuple[int, Tensor]]:
        """Embeddings may be larger than any buffer; they lie as they are stored, so any part of them will do."""
        first, reader = 0, ring.reader(self.info)
        for part in self.info.base_parts():
            for stored in reader.tensors(("base", 0), part):
                for values in stored.view(-1).split(ring.values):
                    buffer = ring.buffer(len(values), self.dtype)
                    buffer.copy_(values)
                    yield first, buffer
                    ring.sent()
                    first += len(values)

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
    """The part of a model that is on a device. ``nbytes`` is what it holds there, activations and KV apart.

    Pieces lie where ``slots`` says (None: each in memory of its own, for use without an arena).
    """

    def __init__(self, host: HostModel, device: torch.device, dtype: torch.dtype, slots: Slots | None = None) -> None:
        self.host, self.device, self.dtype = host, device, dtype
        self.family: Any = host.family  # typed loosely: a layer's type belongs to its family
        self._slots = slots or self._fresh
        self._flats: dict[Piece, Flat] = {}
        self.base: dict[str, Tensor] = {}
        self.layers: list[Any] = []
        self.heads: dict[int, dict[str, Tensor]] = {}

    def _fresh(self, kind: str, number: int) -> Tensor:
        return torch.empty(self.host.place(kind, number)[1], device=self.device, dtype=self.dtype)

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def is_arriving(self) -> bool:
        """Whether a step may have to wait for layers."""
        return isinstance(self.layers, Awaited)

    @property
    def nbytes(self) -> int:
        return sum(flat.data.nbytes for flat in self._flats.values())

    def deepen(self, depth: int) -> None:
        """Copy the layers up to ``depth`` that are missing, and the exit heads with them."""
        self.settle()
        if self.depth < depth:
            self.adopt(Incoming(self.host, self.depth, depth, self._slots, self.device, is_background=False))
            self.settle()

    def adopt(self, arrival: Incoming) -> None:
        """Take over layers that are arriving: each is waited for when it is first used. ``settle`` ends that."""
        if not self.base:
            self._bind(("base", 0), arrival.take("base", 0))

        def bound(i: int) -> Any:
            layer = self._bind(("layer", i), arrival.take("layer", i))
            if i + 1 in arrival.heads:
                self._bind(("head", i + 1), arrival.take("head", i + 1))
            return layer

        self.layers = Awaited(list(self.layers), bound, arrival.depth)

    def _bind(self, piece: Piece, flat: Flat) -> Any:
        """Use a piece that lies in ``flat``; a layer is returned."""
        self._flats[piece] = flat
        kind, number = piece
        if kind == "layer":
            return self.family.bind(flat.views())
        if kind == "head":
            self.heads[number] = flat.views()
        else:
            self.base = flat.views()
            self._unembed = self.base.get("head", self.base["embed"]).t()
        return None

    def settle(self) -> None:
        """Wait for every layer that is arriving."""
        if isinstance(self.layers, Awaited):
            self.layers = [self.layers[i] for i in range(len(self.layers))]

    def move(self, slots: Slots) -> None:
        """Find everything where ``slots`` says from now on; the values are there already."""
        self.settle()
        self._slots = slots
        for piece, flat in list(self._flats.items()):
            made = self._bind(piece, Flat(slots(*piece), flat.shapes))
            if piece[0] == "layer":
                self.layers[piece[1]] = made

    def drop(self, depth: int) -> None:
        """Hold the layers and heads behind ``depth`` no longer."""
        self.settle()
        del self.layers[depth:]
        self.heads = {e: head for e, head in self.heads.items() if e <= depth}
        kept = set(self.host.pieces(depth))
        self._flats = {piece: flat for piece, flat in self._flats.items() if piece in kept}

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


class Reader:
    """Opens each weight file once, or draws random weights."""

    def __init__(self, info: CheckpointInfo) -> None:
        self.info = info
        self._open: dict[Any, Any] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def tensors(self, piece: Piece, part: Part) -> Iterator[Tensor]:
        """What a part of a piece is put together from, one behind the other, as the checkpoint has it."""
        if part.whole is not None:
            yield _taken(torch.cat(list(self.tensors(piece, part.whole))), part.cuts)
        elif self.info.random is not None:
            yield random_part(self.info, f"{piece[0]} {piece[1]}", part)
        else:
            yield from (self.tensor(source) for source in part.sources)

    def tensor(self, name: str) -> Tensor:
        file = self.info.tensors[name].file
        if file not in self._open:
            opener: Callable[..., Any] = safe_open
            self._open[file] = opener(file, framework="pt")
        tensor: Tensor = self._open[file].get_tensor(name)
        return tensor
