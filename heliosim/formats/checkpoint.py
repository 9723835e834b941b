"""What a local Hugging Face checkpoint says about itself: shapes, bytes, exits. Reads headers only, never weights.

Knows nothing of torch, so sizes of a model can be asked for where only the simulator is installed. Supported are OPT
(pre-norm, no projections) and Llama in safetensors files, single or sharded. Exits come from ``exits.json``:

    {"schema_version": 1, "kind": "fixed", "exits": [2, 4, 6], "head_file": "exit_heads.safetensors"}

``kind`` is "fixed" (a trained head for each exit but the last layer) or "anywhere" (``head_file`` null: the model's own
norm and head serve every exit).
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from heliosim.errors import InputError, UnknownNameError
from heliosim.types import BLOCK_TOKENS, ModelSpec

Architecture = Literal["opt", "llama"]
ExitsKind = Literal["fixed", "anywhere"]
Shape = tuple[int, ...]
T = TypeVar("T")

SHIPPED = ("tiny-opt-s", "tiny-opt-l", "tiny-llama-s", "tiny-llama-l")
"""Names of the checkpoints in the package."""

ITEM_BYTES: Mapping[str, int] = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2})
"""Bytes of one value in the dtypes an engine can run in."""

_STORED_DTYPES = {"F32", "F16", "BF16"}
_ACTIVATIONS = ("relu", "gelu", "silu")
_PREFIXES = {"opt": ("model.decoder.", "decoder.", ""), "llama": ("model.", "")}
_MAX_HEADER_BYTES = 100_000_000
_EXACT_FLOAT32_INTEGERS = 2**24


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor an engine holds: the concatenation, along the first axis, of tensors of the checkpoint."""

    name: str
    shape: Shape
    sources: tuple[str, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position parameters. ``kind`` "llama3" uses all fields, "linear" only ``factor``, "default" none."""

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies and what it looks like there."""

    file: Path
    shape: Shape
    dtype: str


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """Facts of one checkpoint for one runtime dtype. ``spec`` is byte-exact for an engine that holds these parts."""

    folder: Path
    architecture: Architecture
    dtype: str
    spec: ModelSpec
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    positions: int
    activation: str
    norm_eps: float
    rope: Rope | None
    is_tied: bool
    eos_ids: tuple[int, ...]
    head_widths: Mapping[int, int]
    head_file: Path | None
    prefix: str = field(repr=False)
    tensors: Mapping[str, Stored] = field(repr=False)

    def base_parts(self) -> tuple[Part, ...]:
        """What is resident at any depth: embeddings, final norm and, unless tied, the output head."""
        return _base_parts(self.architecture, self.prefix, self.hidden, self.vocab, self.positions, self.is_tied)

    def layer_parts(self, layer: int) -> tuple[Part, ...]:
        """The tensors of layer ``layer``, counted from 0 at the input."""
        shape = _Widths(self.hidden, self.heads, self.kv_heads, self.head_dim, self.ffn)
        return _layer_parts(self.architecture, f"{self.prefix}layers.{layer}.", shape)

    def head_parts(self, exit_layer: int) -> tuple[Part, ...]:
        """The tensors of the trained head of an exit; none where the exit uses the model's own norm and head."""
        width = self.head_widths.get(exit_layer)
        return () if width is None else _head_parts(exit_layer, self.hidden, width)

    def weights_sha256(self) -> str:
        """Hash of all weight files, in order of their names. Reads them whole: seconds for a large model."""
        files = {stored.file for stored in self.tensors.values()}
        if self.head_file is not None:
            files.add(self.head_file)
        digest = hashlib.sha256()
        for file in sorted(files):
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
        return digest.hexdigest()


def hidden_room(hidden: int, kv_width: int) -> int:
    """Values that a token's kept hidden state takes in a KV block: ``hidden``, or a little more where the 16 states of
    a block would not be whole rows of ``kv_width`` values (they are in every model whose heads share its width).
    """
    rows = -(-BLOCK_TOKENS * hidden // kv_width)
    while rows * kv_width % BLOCK_TOKENS:
        rows += 1
    return rows * kv_width // BLOCK_TOKENS


def checkpoint_path(name_or_folder: str | Path) -> Path:
    """The folder of a checkpoint given by a shipped name or by a path."""
    text = str(name_or_folder)
    if text in SHIPPED:
        folder = Path(__file__).resolve().parent.parent / "checkpoints" / text
        if not folder.is_dir():
            raise InputError("checkpoint", text, "not part of this installation", "Reinstall, or give a folder.")
        return folder
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir() or len(folder.parts) > 1:
        return folder
    raise UnknownNameError("checkpoint", text, SHIPPED)


def inspect_checkpoint(
    folder: Path, dtype: str, *, name: str | None = None, exits: Sequence[int] | None = None
) -> CheckpointInfo:
    """Read the facts of a checkpoint folder for an engine that runs in ``dtype``.

    ``name``: what the model is called in a scenario (default: the folder's name). ``exits``: use these exit layers
    instead of the folder's; they need trained heads if the folder's exits have them.
    """
    if dtype not in ITEM_BYTES:
        raise UnknownNameError("dtype", dtype, ITEM_BYTES)
    if not folder.is_dir():
        raise InputError(str(folder), str(folder), "no such checkpoint folder", "Give a folder with config.json.")
    config = _read_object(folder / "config.json", "Give a Hugging Face checkpoint folder.")
    tensors = _read_tensors(folder)
    read = _Config(folder / "config.json", config)
    architecture = _architecture(read)
    widths, layers, vocab, positions = _sizes(read, architecture)
    is_tied = read.get("tie_word_embeddings", bool, architecture == "opt")
    prefix = _prefix(folder, architecture, tensors)
    base = _base_parts(architecture, prefix, widths.hidden, vocab, positions, is_tied)
    for part in base:
        _require(folder, part, tensors)
    for layer in range(layers):
        for part in _layer_parts(architecture, f"{prefix}layers.{layer}.", widths):
            _require(folder, part, tensors)
    kind, exit_layers, head_file = _read_exits(folder, architecture, layers, exits)
    head_widths: dict[int, int] = {}
    if head_file is not None:
        heads = _read_header(head_file)
        for exit_layer in exit_layers:
            if exit_layer < layers:
                head_widths[exit_layer] = _require_head(head_file, exit_layer, widths.hidden, heads)
        tensors = {**heads, **tensors}
    item = ITEM_BYTES[dtype]
    layer_parts = _layer_parts(architecture, f"{prefix}layers.0.", widths)
    spec = ModelSpec(
        name=folder.resolve().name if name is None else name,
        layers=layers,
        exits=exit_layers,
        kind=kind,
        layer_bytes=item * sum(part.elements for part in layer_parts),
        base_bytes=item * sum(part.elements for part in base),
        kv_bytes_per_token_layer=item * 2 * widths.kv_heads * widths.head_dim,
        hidden_bytes=item * hidden_room(widths.hidden, 2 * widths.kv_heads * widths.head_dim),
        max_context=positions,
        vocabulary=_vocabulary(folder, vocab),
        exit_head_bytes={
            exit_layer: item * sum(part.elements for part in _head_parts(exit_layer, widths.hidden, width))
            for exit_layer, width in head_widths.items()
        },
    )
    return CheckpointInfo(
        folder=folder,
        architecture=architecture,
        dtype=dtype,
        spec=spec,
        hidden=widths.hidden,
        heads=widths.heads,
        kv_heads=widths.kv_heads,
        head_dim=widths.head_dim,
        ffn=widths.ffn,
        vocab=vocab,
        positions=positions,
        activation=_activation(read, architecture),
        norm_eps=1e-5 if architecture == "opt" else read.get("rms_norm_eps", float, 1e-6),
        rope=_rope(read) if architecture == "llama" else None,
        is_tied=is_tied,
        eos_ids=_eos_ids(read, folder),
        head_widths=head_widths,
        head_file=head_file,
        prefix=prefix,
        tensors=tensors,
    )


# --- files -----------------------------------------------------------------------------------------------------------


def _read_object(file: Path, remedy: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(str(file), file.name, "no such file", remedy) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(str(file), str(error), "is not JSON", "Repair the file.") from None
    if not isinstance(value, dict):
        raise InputError(str(file), value, "must hold a JSON object", "Repair the file.")
    return value


def _read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file: 8 bytes of length, then JSON."""
    remedy = "Save the file again with safetensors."
    try:
        with file.open("rb") as stream:
            head = stream.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else _MAX_HEADER_BYTES
            if length >= _MAX_HEADER_BYTES:
                raise InputError(str(file), length, "is not a safetensors file", remedy)
            header = json.loads(stream.read(length))
            size = stream.seek(0, 2) - 8 - length
    except FileNotFoundError:
        raise InputError(str(file), file.name, "no such file", "Complete the checkpoint folder.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(str(file), str(error), "has a broken safetensors header", remedy) from None
    tensors: dict[str, Stored] = {}
    try:
        for name, entry in header.items():
            if name != "__metadata__":
                tensors[name] = Stored(file, tuple(int(n) for n in entry["shape"]), str(entry["dtype"]))
                if int(entry["data_offsets"][1]) > size:
                    raise InputError(str(file), size, f"is cut short before the end of {name}", "Copy it again.")
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(str(file), repr(error), "has a broken safetensors header", remedy) from None
    return tensors


def _read_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint, from the one weight file or from the shards its index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        if not single.is_file():
            remedy = "Save the weights as model.safetensors (other weight formats are not read)."
            raise InputError(str(folder), single.name, "no safetensors weights", remedy)
        return _read_header(single)
    weight_map = _read_object(index, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map", weight_map, "must name a file for each tensor", "Repair the file.")
    tensors: dict[str, Stored] = {}
    for shard in sorted({str(shard) for shard in weight_map.values()}):
        tensors |= _read_header(folder / shard)
    return tensors


class _Config:
    """Typed access to config.json with errors that name the field."""

    def __init__(self, file: Path, values: Mapping[str, Any]) -> None:
        self.file, self.values = file, values

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The value of ``key``; ``default`` where it is absent or null."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise InputError(f"{self.file}: {key}", None, "is missing", "Use the model's own config.json.")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(key, f"must be {kind.__name__}")
        return value

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.get(key, int, default)
        if value < 1:
            raise self.error(key, "must be positive")
        return value

    def error(self, key: str, problem: str, remedy: str = "Use the model's own config.json.") -> InputError:
        return InputError(f"{self.file}: {key}", self.values.get(key), problem, remedy)


# --- shapes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Widths:
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int


def _architecture(read: _Config) -> Architecture:
    kind = read.get("model_type", str)
    remedy = "Use an OPT model other than 350M, or a Llama model."
    if kind == "llama":
        for key in ("attention_bias", "mlp_bias"):
            if read.get(key, bool, False):
                raise read.error(key, "biased Llama layers are not supported", remedy)
        return "llama"
    if kind != "opt":
        raise read.error("model_type", "unsupported architecture", remedy)
    hidden = read.positive("hidden_size")
    if not read.get("do_layer_norm_before", bool, True):
        raise read.error("do_layer_norm_before", "post-norm OPT is not supported", remedy)
    if read.get("word_embed_proj_dim", int, hidden) != hidden:
        raise read.error("word_embed_proj_dim", f"must equal hidden_size {hidden}", remedy)
    if read.get("_remove_final_layer_norm", bool, False):
        raise read.error("_remove_final_layer_norm", "OPT without a final norm is not supported", remedy)
    for key in ("enable_bias", "layer_norm_elementwise_affine"):
        if not read.get(key, bool, True):
            raise read.error(key, "OPT without biases or norm weights is not supported", remedy)
    return "opt"


def _sizes(read: _Config, architecture: Architecture) -> tuple[_Widths, int, int, int]:
    """(widths, layers, vocabulary size, positions)."""
    hidden, heads = read.positive("hidden_size"), read.positive("num_attention_heads")
    if architecture == "opt":
        ffn, kv_heads, head_dim = read.positive("ffn_dim"), heads, hidden // heads
    else:
        ffn = read.positive("intermediate_size")
        kv_heads = read.positive("num_key_value_heads", heads)
        head_dim = read.positive("head_dim", hidden // heads)
    if heads % kv_heads:
        raise read.error("num_key_value_heads", f"must divide num_attention_heads {heads}")
    if architecture == "opt" and heads * head_dim != hidden:
        raise read.error("num_attention_heads", f"must divide hidden_size {hidden}")
    if architecture == "llama" and head_dim % 2:
        raise read.error("head_dim", "must be even for rotary positions")
    vocab = read.positive("vocab_size")
    if vocab > _EXACT_FLOAT32_INTEGERS:
        raise read.error("vocab_size", f"must not exceed {_EXACT_FLOAT32_INTEGERS}")
    layers, positions = read.positive("num_hidden_layers"), read.positive("max_position_embeddings")
    return _Widths(hidden, heads, kv_heads, head_dim, ffn), layers, vocab, positions


def _base_parts(
    architecture: Architecture, prefix: str, hidden: int, vocab: int, positions: int, is_tied: bool
) -> tuple[Part, ...]:
    parts = [Part("embed", (vocab, hidden), (f"{prefix}embed_tokens.weight",))]
    if architecture == "opt":
        # OPT's learned positions start at row 2 of their table
        parts.append(Part("positions", (positions + 2, hidden), (f"{prefix}embed_positions.weight",)))
        parts.append(Part("norm_weight", (hidden,), (f"{prefix}final_layer_norm.weight",)))
        parts.append(Part("norm_bias", (hidden,), (f"{prefix}final_layer_norm.bias",)))
    else:
        parts.append(Part("norm_weight", (hidden,), (f"{prefix}norm.weight",)))
    if not is_tied:
        parts.append(Part("head", (vocab, hidden), ("lm_head.weight",)))
    return tuple(parts)


def _layer_parts(architecture: Architecture, prefix: str, w: _Widths) -> tuple[Part, ...]:
    d, q, kv = w.hidden, w.heads * w.head_dim, w.kv_heads * w.head_dim
    qkv = tuple(f"{prefix}self_attn.{letter}_proj" for letter in "qkv")
    if architecture == "llama":
        return (
            Part("norm1_weight", (d,), (f"{prefix}input_layernorm.weight",)),
            Part("qkv_weight", (q + 2 * kv, d), tuple(f"{name}.weight" for name in qkv)),
            Part("out_weight", (d, q), (f"{prefix}self_attn.o_proj.weight",)),
            Part("norm2_weight", (d,), (f"{prefix}post_attention_layernorm.weight",)),
            Part("up_weight", (2 * w.ffn, d), (f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight")),
            Part("down_weight", (d, w.ffn), (f"{prefix}mlp.down_proj.weight",)),
        )
    return (
        Part("norm1_weight", (d,), (f"{prefix}self_attn_layer_norm.weight",)),
        Part("norm1_bias", (d,), (f"{prefix}self_attn_layer_norm.bias",)),
        Part("qkv_weight", (3 * d, d), tuple(f"{name}.weight" for name in qkv)),
        Part("qkv_bias", (3 * d,), tuple(f"{name}.bias" for name in qkv)),
        Part("out_weight", (d, d), (f"{prefix}self_attn.out_proj.weight",)),
        Part("out_bias", (d,), (f"{prefix}self_attn.out_proj.bias",)),
        Part("norm2_weight", (d,), (f"{prefix}final_layer_norm.weight",)),
        Part("norm2_bias", (d,), (f"{prefix}final_layer_norm.bias",)),
        Part("up_weight", (w.ffn, d), (f"{prefix}fc1.weight",)),
        Part("up_bias", (w.ffn,), (f"{prefix}fc1.bias",)),
        Part("down_weight", (d, w.ffn), (f"{prefix}fc2.weight",)),
        Part("down_bias", (d,), (f"{prefix}fc2.bias",)),
    )


def _head_parts(exit_layer: int, hidden: int, width: int) -> tuple[Part, ...]:
    prefix = f"exits.{exit_layer}."
    return (
        Part("up_weight", (width, hidden), (f"{prefix}fc1.weight",)),
        Part("up_bias", (width,), (f"{prefix}fc1.bias",)),
        Part("down_weight", (hidden, width), (f"{prefix}fc2.weight",)),
        Part("down_bias", (hidden,), (f"{prefix}fc2.bias",)),
    )


def _prefix(folder: Path, architecture: Architecture, tensors: Mapping[str, Stored]) -> str:
    """What tensor names begin with: it differs between whole models and bare decoders."""
    for prefix in _PREFIXES[architecture]:
        if f"{prefix}embed_tokens.weight" in tensors:
            return prefix
    wanted = f"{_PREFIXES[architecture][0]}embed_tokens.weight"
    raise InputError(str(folder), wanted, "missing tensor", "Check that weights and config.json belong together.")


def _require(folder: Path, part: Part, tensors: Mapping[str, Stored]) -> None:
    """Raise unless the sources of a part exist and stack to its shape."""
    remedy = "Check that weights and config.json belong together."
    rows = 0
    for source in part.sources:
        stored = tensors.get(source)
        if stored is None:
            raise InputError(str(folder), source, "missing tensor", remedy)
        if stored.dtype not in _STORED_DTYPES:
            problem = f"{source} has an unsupported dtype"
            raise InputError(str(stored.file), stored.dtype, problem, "Save as float32, float16 or bfloat16.")
        if len(stored.shape) != len(part.shape) or stored.shape[1:] != part.shape[1:]:
            raise InputError(str(stored.file), stored.shape, f"{source} has not the shape config.json says", remedy)
        rows += stored.shape[0]
    if rows != part.shape[0]:
        problem = f"{' + '.join(part.sources)} should have {part.shape[0]} rows"
        raise InputError(str(folder), rows, problem, remedy)


# --- exits and the rest of the config --------------------------------------------------------------------------------


def _read_exits(
    folder: Path, architecture: Architecture, layers: int, override: Sequence[int] | None
) -> tuple[ExitsKind, tuple[int, ...], Path | None]:
    """(kind, ascending exit layers ending with the last layer, file with trained heads)."""
    file = folder / "exits.json"
    if not file.is_file():
        if override is not None:
            # no trained heads to be had, so any exit reuses the model's own norm and head
            kind: ExitsKind = "fixed" if set(override) <= {layers} else "anywhere"
            return kind, _ascending("exits", list(override), layers), None
        if architecture == "opt":
            return "fixed", (layers,), None
        step = max(1, layers // 4)
        return "anywhere", _ascending("exits", list(range(step, layers + 1, step)), layers), None
    values = _read_object(file, "")
    if values.get("schema_version") != 1:
        raise InputError(f"{file}: schema_version", values.get("schema_version"), "must be 1", "Rewrite the file.")
    unknown = set(values) - {"schema_version", "kind", "exits", "head_file"}
    if unknown:
        raise InputError(f"{file}: {min(unknown)}", values[min(unknown)], "unknown field", "Remove it.")
    declared = values.get("kind")
    if declared not in ("fixed", "anywhere"):
        raise InputError(f"{file}: kind", declared, "must be 'fixed' or 'anywhere'", "Choose one.")
    exits = _ascending(f"{file}: exits", values.get("exits"), layers)
    if override is not None:
        exits = _ascending("exits", list(override), layers)
    head = values.get("head_file")
    if head is not None and not isinstance(head, str):
        raise InputError(f"{file}: head_file", head, "must be a file name or null", "Repair the field.")
    if declared == "anywhere" and head is not None:
        raise InputError(f"{file}: head_file", head, "exits anywhere use the model's own head", "Set it to null.")
    if declared == "fixed" and head is None and exits != (layers,):
        remedy = "Name the file with the trained heads, or use kind 'anywhere'."
        raise InputError(f"{file}: head_file", None, "fixed exits need trained heads", remedy)
    if head is None:
        return declared, exits, None
    if not (folder / head).is_file():
        raise InputError(f"{file}: head_file", head, "no such file", "Complete the checkpoint folder.")
    return declared, exits, folder / head


def _ascending(where: str, exits: object, layers: int) -> tuple[int, ...]:
    """Check exit layers; the last layer is always one and is added if absent."""
    remedy = f"Give layer numbers from 1 to {layers}, ascending."
    if not isinstance(exits, list) or not exits:
        raise InputError(where, exits, "must be a list of layers", remedy)
    for exit_layer in exits:
        if not isinstance(exit_layer, int) or isinstance(exit_layer, bool) or not 1 <= exit_layer <= layers:
            raise InputError(where, exit_layer, f"is no layer of a model with {layers}", remedy)
    if any(a >= b for a, b in pairwise(exits)):
        raise InputError(where, exits, "must be ascending", remedy)
    return tuple(exits) if exits[-1] == layers else (*exits, layers)


def _require_head(file: Path, exit_layer: int, hidden: int, heads: Mapping[str, Stored]) -> int:
    """Check that a trained head is there; returns its inner width."""
    name = f"exits.{exit_layer}.fc1.weight"
    stored = heads.get(name)
    if stored is None or len(stored.shape) != 2:
        raise InputError(str(file), name, f"no trained head for exit {exit_layer}", "Train it, or remove the exit.")
    for part in _head_parts(exit_layer, hidden, stored.shape[0]):
        _require(file, part, heads)
    return stored.shape[0]


def _activation(read: _Config, architecture: Architecture) -> str:
    key, default = ("activation_function", "relu") if architecture == "opt" else ("hidden_act", "silu")
    value = read.get(key, str, default)
    if value not in _ACTIVATIONS:
        raise read.error(key, "unsupported activation", f"Supported: {', '.join(_ACTIVATIONS)}.")
    return value


def _rope(read: _Config) -> Rope:
    """Rotary parameters in the old (rope_theta, rope_scaling) or the new (rope_parameters) spelling."""
    key = "rope_parameters" if read.values.get("rope_parameters") is not None else "rope_scaling"
    scaling = _Config(read.file, read.get(key, dict, {}))
    theta = scaling.get("rope_theta", float, read.get("rope_theta", float, 10000.0))
    kind = scaling.get("rope_type", str, scaling.get("type", str, "default"))
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, "linear", scaling.get("factor", float))
    if kind == "llama3":
        return Rope(
            theta,
            "llama3",
            scaling.get("factor", float),
            scaling.get("low_freq_factor", float),
            scaling.get("high_freq_factor", float),
            scaling.get("original_max_position_embeddings", int),
        )
    raise read.error(key, "unsupported rope type", "Supported: default, linear, llama3.")


def _eos_ids(read: _Config, folder: Path) -> tuple[int, ...]:
    """Ids that end a text; generation_config.json has the last word, as in transformers."""
    file = folder / "generation_config.json"
    generation = _read_object(file, "") if file.is_file() else {}
    value = generation.get("eos_token_id", read.values.get("eos_token_id"))
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) for i in ids):
        raise read.error("eos_token_id", "must be an id or a list of ids")
    return tuple(ids)


def _vocabulary(folder: Path, vocab: int) -> str:
    """A fingerprint that two models share exactly if they read and write the same token ids."""
    digest = hashlib.sha256()
    file = folder / "tokenizer.json"
    if file.is_file():
        content = _read_object(file, "")
        # settings of truncation, padding and templates may differ between models that share ids
        kept = [content.get("model"), content.get("added_tokens")]
        digest.update(json.dumps(kept, sort_keys=True, ensure_ascii=True).encode())
        return f"tokenizer:{digest.hexdigest()[:16]}"
    for names in (("vocab.json", "merges.txt"), ("tokenizer.model",)):
        if all((folder / name).is_file() for name in names):
            for name in names:
                digest.update((folder / name).read_bytes())
            return f"tokenizer:{digest.hexdigest()[:16]}"
    return f"size:{vocab}"
