"""Architectures: the shapes a Hugging Face ``config.json`` of an OPT or Llama model stands for, exact counts and bytes.

Everything here follows from the file; nothing is measured. Sizes are those of **one rank** of a tensor-parallel group,
the fullest one:

- column-parallel (QKV, gate, up) and row-parallel (attention output, down) matrices are cut evenly; a bias of a
  column-parallel matrix is cut with it, one of a row-parallel matrix is held by every rank;
- KV heads are cut evenly, and replicated where there are more ranks than KV heads;
- embedding and output head are cut by vocabulary, padded to a multiple of 64 and of the ranks (no padding on one rank);
- norms, learned positions and OPT-350M's projections are held by every rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from heliosim.errors import InputError, UnknownNameError
from heliosim.types import Bytes

Family = Literal["opt", "llama"]

ITEM_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of one value by dtype."""
SHORT_DTYPES: Mapping[str, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
VOCABULARY_PADDING = 64
MAX_RANKS = 8
OPT_POSITION_OFFSET = 2
"""OPT's table of learned positions has two rows more than positions."""


def dtype_name(dtype: str) -> str:
    """``float32``, ``float16`` or ``bfloat16``, from either spelling (``fp32``, ...)."""
    name = SHORT_DTYPES.get(dtype, dtype)
    if name not in ITEM_BYTES:
        raise UnknownNameError("dtype", dtype, (*ITEM_BYTES, *SHORT_DTYPES))
    return name


@dataclass(frozen=True)
class ExitHead:
    """What a trained exit of a fixed-exit model (EE-LLM) holds beside the layers: each part is optional.

    ``has_norm``: a norm before the head. ``mlp_width``: inner width of an MLP in front of it, 0 for none (without gate
    whatever the model's own has). ``has_own_output``: an output matrix of its own; else it shares the model's.
    """

    has_norm: bool = True
    mlp_width: int = 0
    has_own_output: bool = False


@dataclass(frozen=True)
class Matrix:
    """One matrix product of a layer on one rank: ``n`` output by ``k`` input features."""

    name: str
    n: int
    k: int

    @property
    def elements(self) -> int:
        return self.n * self.k


@dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder model. Widths are in elements; ``layers`` counts transformer layers."""

    name: str
    family: Family
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_context: int
    embedding: int
    is_gated: bool
    has_attention_bias: bool
    has_output_bias: bool
    has_mlp_bias: bool
    norm_vectors: int
    has_final_norm: bool
    is_tied: bool
    position_rows: int

    # --- shapes of one rank ---

    def check_ranks(self, tp: int) -> None:
        """Raise InputError unless the model can be cut into ``tp`` equal parts."""
        if not 1 <= tp <= MAX_RANKS:
            raise InputError("tp", tp, "tensor parallel degree out of reach", f"Give 1 to {MAX_RANKS}.")
        for what, count in (("heads", self.heads), ("MLP width", self.mlp)):
            if count % tp:
                raise InputError("tp", tp, f"{self.name} has {count} {what}: not divisible", f"Use {self._degrees()}.")
        if self.kv_heads % tp and tp % self.kv_heads:
            problem = f"{self.name} has {self.kv_heads} KV heads: neither divisible nor to be replicated evenly"
            raise InputError("tp", tp, problem, f"Use {self._degrees()}.")

    def _degrees(self) -> str:
        def fits(tp: int) -> bool:
            return not (self.heads % tp or self.mlp % tp or (self.kv_heads % tp and tp % self.kv_heads))

        return ", ".join(str(tp) for tp in range(1, MAX_RANKS + 1) if fits(tp))

    def rank_heads(self, tp: int = 1) -> int:
        self.check_ranks(tp)
        return self.heads // tp

    def rank_kv_heads(self, tp: int = 1) -> int:
        self.check_ranks(tp)
        return max(1, self.kv_heads // tp)

    def rank_vocabulary(self, tp: int = 1) -> int:
        """Rows of embedding and head on one rank."""
        self.check_ranks(tp)
        if tp == 1:
            return self.vocabulary
        unit = math.lcm(VOCABULARY_PADDING, tp)
        return -(-self.vocabulary // unit) * unit // tp

    def matrices(self, tp: int = 1) -> tuple[Matrix, ...]:
        """The matrix products of one layer on one rank, in their order; gate and up are one product."""
        q, kv = self.rank_heads(tp) * self.head_dim, self.rank_kv_heads(tp) * self.head_dim
        inner = self.mlp // tp
        return (
            Matrix("qkv", q + 2 * kv, self.hidden),
            Matrix("out", self.hidden, q),
            Matrix("up", (2 if self.is_gated else 1) * inner, self.hidden),
            Matrix("down", self.hidden, inner),
        )

    def head_matrix(self, tp: int = 1) -> Matrix:
        return Matrix("head", self.rank_vocabulary(tp), self.embedding)

    # --- counts of one rank ---

    def layer_parameters(self, tp: int = 1) -> int:
        qkv, out, up, down = self.matrices(tp)
        biases = qkv.n * self.has_attention_bias + out.n * self.has_output_bias
        biases += (up.n + down.n) * self.has_mlp_bias
        norms = 2 * self.norm_vectors * self.hidden
        return sum(m.elements for m in (qkv, out, up, down)) + biases + norms

    def base_parameters(self, tp: int = 1) -> int:
        """Resident at any depth: embedding, positions, projections, final norm and, unless tied, the output head."""
        tables = (1 if self.is_tied else 2) * self.rank_vocabulary(tp) * self.embedding
        projections = 2 * self.embedding * self.hidden if self.embedding != self.hidden else 0
        final = self.norm_vectors * self.hidden * self.has_final_norm
        return tables + self.position_rows * self.hidden + projections + final

    def exit_head_parameters(self, head: ExitHead, tp: int = 1) -> int:
        """What one trained exit adds. Its MLP is cut as the layers' is; the norm is held by every rank."""
        self.check_ranks(tp)
        if head.mlp_width % tp:
            raise InputError("exits.mlp_width", head.mlp_width, f"not divisible by {tp} ranks", "Give a multiple.")
        norm = self.norm_vectors * self.hidden * head.has_norm
        inner = head.mlp_width // tp
        mlp = inner * (2 * self.hidden + 1) + self.hidden if inner else 0
        return norm + mlp + self.head_matrix(tp).elements * head.has_own_output

    def parameters(self, depth: int | None = None, tp: int = 1) -> int:
        """All parameters of the first ``depth`` layers (default: all) with everything that is always resident."""
        depth = self.layers if depth is None else depth
        if not 0 <= depth <= self.layers:
            raise InputError("depth", depth, f"{self.name} has {self.layers} layers", f"Give 0 to {self.layers}.")
        return self.base_parameters(tp) + depth * self.layer_parameters(tp)

    # --- bytes of one rank ---

    def weights_bytes(self, dtype: str, depth: int | None = None, tp: int = 1) -> Bytes:
        return ITEM_BYTES[dtype_name(dtype)] * self.parameters(depth, tp)

    def layer_bytes(self, dtype: str, tp: int = 1) -> Bytes:
        return ITEM_BYTES[dtype_name(dtype)] * self.layer_parameters(tp)

    def base_bytes(self, dtype: str, tp: int = 1) -> Bytes:
        return ITEM_BYTES[dtype_name(dtype)] * self.base_parameters(tp)

    def exit_head_bytes(self, head: ExitHead, dtype: str, tp: int = 1) -> Bytes:
        return ITEM_BYTES[dtype_name(dtype)] * self.exit_head_parameters(head, tp)

    def kv_bytes(self, dtype: str, tp: int = 1) -> Bytes:
        """Keys and values of one token in one layer on one rank."""
        return 2 * self.rank_kv_heads(tp) * self.head_dim * ITEM_BYTES[dtype_name(dtype)]

    def hidden_bytes(self, dtype: str) -> Bytes:
        """One token's hidden state; every rank holds it whole."""
        return self.hidden * ITEM_BYTES[dtype_name(dtype)]

    @property
    def vocabulary_name(self) -> str:
        """Models share it only if they have the same number of tokens; a configuration file says no more."""
        return f"size:{self.vocabulary}"


# --- reading ---------------------------------------------------------------------------------------------------------


def shipped_architectures() -> dict[str, Path]:
    """Architectures in the package, by name."""
    root = Path(str(resources.files("heliosim.architectures")))
    return {path.stem: path for path in sorted(root.glob("*.json"))}


def open_architecture(name_or_path: str | Path) -> Architecture:
    """An architecture by shipped name, by config file, or by a folder that holds ``config.json``."""
    text, shipped = str(name_or_path), shipped_architectures()
    if text.lower() in shipped:
        return read_architecture(shipped[text.lower()], name=text.lower())
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return read_architecture(path / "config.json", name=path.resolve().name)
    if path.suffix or len(path.parts) > 1:
        return read_architecture(path)
    raise UnknownNameError("architecture", text, shipped)


def read_architecture(path: Path, name: str | None = None) -> Architecture:
    """Parse a Hugging Face configuration file. Raises InputError naming the field for anything unsupported."""
    remedy = "Give a Hugging Face config.json of an OPT or Llama model."
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(str(path), path.name, f"cannot be read: {error.strerror}", remedy) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(str(path), path.name, f"is not JSON: {error}", remedy) from None
    if not isinstance(values, dict):
        raise InputError(str(path), path.name, "must hold a JSON object", remedy)
    return parse_architecture(values, name or path.stem, str(path))


def parse_architecture(values: Mapping[str, Any], name: str, where: str = "config.json") -> Architecture:
    """An architecture from the fields of a configuration file; fields that change no size are not looked at."""
    fields = _Fields(values, where)
    kind = fields.text("model_type")
    if values.get("quantization_config") is not None:
        raise fields.error("quantization_config", "quantized weights are not supported", "Use the unquantized model.")
    if kind == "opt":
        return _opt(fields, name)
    if kind == "llama":
        return _llama(fields, name)
    raise fields.error("model_type", "unsupported architecture", "Supported: opt, llama.")


def _opt(fields: _Fields, name: str) -> Architecture:
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    if hidden % heads:
        raise fields.error("num_attention_heads", f"must divide hidden_size {hidden}", fields.remedy)
    positions, bias = fields.count("max_position_embeddings"), fields.flag("enable_bias", True)
    if not fields.flag("layer_norm_elementwise_affine", True):
        raise fields.error("layer_norm_elementwise_affine", "norms without weights are not supported", fields.remedy)
    before = fields.flag("do_layer_norm_before", True)
    return Architecture(
        name=name,
        family="opt",
        hidden=hidden,
        mlp=fields.count("ffn_dim"),
        layers=fields.count("num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocabulary=fields.count("vocab_size"),
        max_context=positions,
        embedding=fields.count("word_embed_proj_dim", hidden),
        is_gated=False,
        has_attention_bias=bias,
        has_output_bias=bias,
        has_mlp_bias=bias,
        norm_vectors=2,
        has_final_norm=before and not fields.flag("_remove_final_layer_norm", False),
        is_tied=fields.flag("tie_word_embeddings", True),
        position_rows=positions + OPT_POSITION_OFFSET,
    )


def _llama(fields: _Fields, name: str) -> Architecture:
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    kv_heads = fields.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"must divide num_attention_heads {heads}", fields.remedy)
    if "head_dim" not in fields.values and hidden % heads:
        raise fields.error("num_attention_heads", f"must divide hidden_size {hidden}", fields.remedy)
    if fields.text("hidden_act", "silu") != "silu":
        raise fields.error("hidden_act", "unsupported activation of a gated MLP", "Supported: silu.")
    attention_bias = fields.flag("attention_bias", False)
    return Architecture(
        name=name,
        family="llama",
        hidden=hidden,
        mlp=fields.count("intermediate_size"),
        layers=fields.count("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=fields.count("head_dim", hidden // heads),
        vocabulary=fields.count("vocab_size"),
        max_context=fields.count("max_position_embeddings"),
        embedding=hidden,
        is_gated=True,
        has_attention_bias=attention_bias,
        has_output_bias=attention_bias,
        has_mlp_bias=fields.flag("mlp_bias", False),
        norm_vectors=1,
        has_final_norm=True,
        is_tied=fields.flag("tie_word_embeddings", False),
        position_rows=0,
    )


class _Fields:
    """Typed access to a configuration with errors that name file and field."""

    remedy = "Use the model's own config.json."

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def error(self, key: str, problem: str, remedy: str) -> InputError:
        return InputError(f"{self.where}: {key}", self.values.get(key), problem, remedy)

    def count(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise self.error(key, "is missing", self.remedy)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(key, "must be a positive whole number", self.remedy)
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.error(key, "must be true or false", self.remedy)
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, str):
            raise self.error(key, "is missing" if value is None else "must be text", self.remedy)
        return value
