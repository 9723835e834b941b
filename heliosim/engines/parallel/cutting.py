"""What one rank holds of a checkpoint: the same cuts that ``hardware/architecture.py`` counts the bytes of.

QKV, gate and up projections are cut by rows (whole heads; KV heads are held by several ranks where there are fewer of
them), attention output and down projections by columns, the MLP of an exit's head like a layer's. Embedding and output
head are cut by vocabulary, padded with zeros. Norms, positions and the biases of row-cut sums are whole everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from heliosim.errors import InputError
from heliosim.formats.checkpoint import ITEM_BYTES, CheckpointInfo, hidden_room
from heliosim.formats.weight_files import Cut, Part
from heliosim.hardware.architecture import MAX_RANKS, VOCABULARY_PADDING

_FIELD = "tensor_parallel"


def rank_vocabulary(vocabulary: int, ranks: int) -> int:
    """Rows of the embedding on each rank, padding included."""
    if ranks == 1:
        return vocabulary
    unit = math.lcm(VOCABULARY_PADDING, ranks)
    return -(-vocabulary // unit) * unit // ranks


def require_ranks(info: CheckpointInfo, ranks: int) -> None:
    """Raise InputError unless ``ranks`` equal parts can be made of a checkpoint's layers."""
    if not 1 <= ranks <= MAX_RANKS:
        raise InputError(_FIELD, ranks, "tensor-parallel degree out of reach", f"Give 1 to {MAX_RANKS}.")
    fits = [n for n in range(1, MAX_RANKS + 1) if _misfit(info, n) is None]
    problem = _misfit(info, ranks)
    if problem is not None:
        remedy = f"Use {', '.join(map(str, fits))}."
        raise InputError(_FIELD, ranks, f"{info.spec.name} has {problem}", remedy)


def _misfit(info: CheckpointInfo, ranks: int) -> str | None:
    counts = {"heads": info.heads, "feed-forward columns": info.ffn}
    counts |= {f"columns in the head of exit {e}": head.width for e, head in info.head_shapes.items()}
    for what, count in counts.items():
        if count % ranks:
            return f"{count} {what}: not divisible"
    if info.kv_heads % ranks and ranks % info.kv_heads:
        return f"{info.kv_heads} KV heads: neither divisible nor to be replicated evenly"
    return None


@dataclass(frozen=True)
class RankInfo(CheckpointInfo):
    """A checkpoint as rank ``rank`` of ``ranks`` sees it: sizes, parts, bytes of its own part; ``vocab`` is whole."""

    whole: CheckpointInfo
    rank: int
    ranks: int

    def base_parts(self) -> tuple[Part, ...]:
        rows = rank_vocabulary(self.vocab, self.ranks)
        cut = Cut(0, self.rank * rows, rows)
        return tuple(_cut(p, cut) if p.name in ("embed", "head") else p for p in self.whole.base_parts())

    def layer_parts(self, layer: int) -> tuple[Part, ...]:
        return tuple(self._layer_part(part) for part in self.whole.layer_parts(layer))

    def head_parts(self, exit_layer: int) -> tuple[Part, ...]:
        head = self.whole.head_shapes.get(exit_layer)
        return () if head is None else tuple(self._of(p, head.width) for p in self.whole.head_parts(exit_layer))

    def weights_sha256(self) -> str:
        return self.whole.weights_sha256()

    def _layer_part(self, part: Part) -> Part:
        mine, all_q = self.heads * self.head_dim, self.whole.heads * self.head_dim
        if part.name.startswith("qkv"):
            kv, all_kv = self.kv_heads * self.head_dim, self.whole.kv_heads * self.head_dim
            k = all_q + self.rank * self.whole.kv_heads // self.ranks * self.head_dim
            return _cut(part, Cut(0, self.rank * mine, mine), Cut(0, k, kv), Cut(0, k + all_kv, kv))
        if part.name == "out_weight":
            return _cut(part, Cut(1, self.rank * mine, mine))
        return self._of(part, self.whole.ffn)

    def _of(self, part: Part, width: int) -> Part:
        """A part of an MLP of ``width`` columns in all (gated: gates, then as many others); other parts are whole."""
        mine = width // self.ranks
        first = self.rank * mine
        if part.name in ("up_weight", "up_bias"):
            return _cut(part, *(Cut(0, start + first, mine) for start in range(0, part.shape[0], width)))
        return _cut(part, Cut(1, first, mine)) if part.name == "down_weight" else part


def _cut(part: Part, *cuts: Cut) -> Part:
    shape = list(part.shape)
    shape[cuts[0].axis] = sum(cut.count for cut in cuts)
    return Part(part.name, tuple(shape), part.sources, part, cuts)


def rank_info(info: CheckpointInfo, rank: int, ranks: int) -> CheckpointInfo:
    """What rank ``rank`` of ``ranks`` holds of a checkpoint; with one rank, the checkpoint itself."""
    require_ranks(info, ranks)
    if ranks == 1:
        return info
    values: dict[str, Any] = {f.name: getattr(info, f.name) for f in fields(CheckpointInfo)}
    values |= {
        "heads": info.heads // ranks,
        "kv_heads": max(1, info.kv_heads // ranks),
        "ffn": info.ffn // ranks,
        "head_shapes": {e: replace(head, width=head.width // ranks) for e, head in info.head_shapes.items()},
    }
    made = RankInfo(**values, whole=info, rank=rank, ranks=ranks)
    item = ITEM_BYTES[info.dtype]
    spec = replace(
        info.spec,
        layer_bytes=item * _elements(made.layer_parts(0)),
        base_bytes=item * _elements(made.base_parts()),
        hidden_bytes=item * hidden_room(made.hidden, 2 * made.kv_heads * made.head_dim),
        kv_bytes_per_token_layer=item * 2 * made.kv_heads * made.head_dim,
        exit_head_bytes={e: item * _elements(made.head_parts(e)) for e in info.spec.exit_head_bytes},
    )
    return replace(made, spec=spec)


def _elements(parts: tuple[Part, ...]) -> int:
    return sum(part.elements for part in parts)


def rank_infos(infos: Mapping[str, CheckpointInfo], rank: int, ranks: int) -> dict[str, CheckpointInfo]:
    """``rank_info`` of each."""
    return {name: rank_info(info, rank, ranks) for name, info in infos.items()}
