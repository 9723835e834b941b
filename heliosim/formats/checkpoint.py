"""What a local Hugging Face checkpoint says about itself: shapes, bytes, exits. Reads headers only, never weights.

Knows nothing of torch, so sizes of a model can be asked for where only the simulator is installed. Supported are OPT
(pre-norm, no projections) and Llama in safetensors files, single or sharded. Exits come from ``exits.json``:

    {"schema_version": 1, "kind": "fixed", "exits": [2, 4, 6], "head_file": "exit_heads.safetensors"}

``kind`` is "fixed" (a trained head for each exit but the last layer, see ``exit_heads.py``) or "anywhere"
(``head_file`` null: the model's own norm and head serve every exit). A name ``random:ARCHITECTURE`` stands for random
weights of that architecture (``random_weights.py``), of which there are no files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from heliosim.errors import InputError, UnknownNameError
from heliosim.formats.exit_heads import ExitsKind, HeadShape, ascending, quarters, read_exits, require_head
from heliosim.formats.random_weights import SCHEME as RANDOM_SCHEME
from heliosim.formats.random_weights import RandomName, canonical, is_random, parse_name
from heliosim.formats.weight_files import Part, Stored, read_header, read_object, read_tensors, require_part
from heliosim.types import BLOCK_TOKENS, ModelSpec

__all__ = [
    "ITEM_BYTES",
    "SHIPPED",
    "CheckpointInfo",
    "ExitsKind",
    "HeadShape",
    "Part",
    "Rope",
    "Stored",
    "checkpoint_path",
    "inspect_checkpoint",
]

Architecture = Literal["opt", "llama"]
T = TypeVar("T")

SHIPPED = ("tiny-opt-s", "tiny-opt-l", "tiny-llama-s", "tiny-llama-l")
"""Names of the checkpoints in the package."""

ITEM_BYTES: Mapping[str, int] = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2})
"""Bytes of one value in the dtypes an engine can run in."""

_ACTIVATIONS = ("relu", "gelu", "silu")
_PREFIXES = {"opt": ("model.decoder.", "decoder.", ""), "llama": ("model.", "")}
_EXACT_FLOAT32_INTEGERS = 2**24


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
class CheckpointInfo:
    """Facts of one checkpoint for one runtime dtype. ``spec`` is byte-exact for an engine that holds these parts.

    ``head_shapes``: what the trained heads hold, by exit. ``random``: of random weights, which no file holds;
    ``folder`` is then their name.
    """

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
    head_shapes: Mapping[int, HeadShape]
    head_file: Path | None
    random: RandomName | None
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
        shape = self.head_shapes.get(exit_layer)
        return () if shape is None else _head_parts(self.architecture, exit_layer, self.hidden, shape)

    def _drawn_from(self) -> tuple[object, ...]:
        """Everything that random weights depend on, their dtype apart."""
        assert self.random is not None
        sizes = (self.hidden, self.heads, self.kv_heads, self.head_dim, self.ffn, self.vocab, self.positions)
        heads = tuple((e, shape.width, shape.has_norm) for e, shape in sorted(self.head_shapes.items()))
        return (self.architecture, self.spec.layers, sizes, self.is_tied, heads, self.random.seed, RANDOM_SCHEME)

    @property
    def tokenizer_file(self) -> Path | None:
        """Its ``tokenizer.json``; None where there is none: random weights read and write ids alone."""
        file = self.folder / "tokenizer.json"
        return file if self.random is None and file.is_file() else None

    def weights_sha256(self) -> str:
        """Hash of all weight files, in order of their names: reads them whole, seconds for a large model. Of random
        weights, hash of what they are drawn from.
        """
        if self.random is not None:
            return hashlib.sha256(repr(self._drawn_from()).encode()).hexdigest()
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
    """The folder of a checkpoint given by a shipped name or by a path; of random weights, their name."""
    text = str(name_or_folder)
    if is_random(text):
        return Path(canonical(text))
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
    if is_random(folder):
        return _inspect_random(folder, dtype, name, exits)
    if not folder.is_dir():
        raise InputError(str(folder), str(folder), "no such checkpoint folder", "Give a folder with config.json.")
    config = read_object(folder / "config.json", "Give a Hugging Face checkpoint folder.")
    tensors = read_tensors(folder)
    facts = _Facts(_Config(folder / "config.json", config))
    prefix = _prefix(folder, facts.architecture, tensors)
    for part in facts.base_parts(prefix):
        require_part(folder, part, tensors)
    for layer in range(facts.layers):
        for part in _layer_parts(facts.architecture, f"{prefix}layers.{layer}.", facts.widths):
            require_part(folder, part, tensors)
    is_opt = facts.architecture == "opt"
    kind, exit_layers, head_file = read_exits(folder, is_opt, facts.layers, exits)
    shapes: dict[int, HeadShape] = {}
    if head_file is not None:
        heads = read_header(head_file)
        for e in exit_layers:
            if e < facts.layers:
                shapes[e] = require_head(head_file, e, facts.widths.hidden, heads, has_norm_bias=is_opt)
        tensors = {**heads, **tensors}
    spec = facts.spec(folder.resolve().name if name is None else name, dtype, kind, exit_layers, shapes)
    spec = replace(spec, vocabulary=_vocabulary(folder, facts.vocab))
    info = facts.info(folder, dtype, spec, prefix, shapes, eos_ids=_eos_ids(facts.read, folder))
    return replace(info, head_file=head_file, tensors=tensors)


def _inspect_random(folder: Path, dtype: str, name: str | None, exits: Sequence[int] | None) -> CheckpointInfo:
    """Facts of random weights. OPT exits have heads of their own, Llama ones use the model's."""
    asked = parse_name(str(folder))
    facts = _Facts(_Config(asked.config, read_object(asked.config, "Give a Hugging Face configuration file.")))
    layers = quarters(facts.layers)
    wanted = asked.exits if exits is None else exits
    if wanted is not None:
        layers = ascending(f"{folder}: exits" if exits is None else "exits", list(wanted), facts.layers)
    kind: ExitsKind = "fixed" if facts.architecture == "opt" else "anywhere"
    if asked.mlp and kind == "anywhere":
        remedy = "Leave mlp out: a Llama model exits through its own norm and head."
        raise InputError(f"{folder}: mlp", asked.mlp, "exits anywhere have no heads of their own", remedy)
    shapes = {e: HeadShape(asked.mlp, has_norm=True) for e in layers if e < facts.layers and kind == "fixed"}
    spec = facts.spec(asked.name if name is None else name, dtype, kind, layers, shapes)
    info = facts.info(folder, dtype, spec, "", shapes, eos_ids=())
    return replace(info, random=asked)


# --- config.json ------------------------------------------------------------------------------------------------------


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


def _prefix(folder: Path, architecture: Architecture, tensors: Mapping[str, Stored]) -> str:
    """What tensor names begin with: it differs between whole models and bare decoders."""
    for prefix in _PREFIXES[architecture]:
        if f"{prefix}embed_tokens.weight" in tensors:
            return prefix
    wanted = f"{_PREFIXES[architecture][0]}embed_tokens.weight"
    raise InputError(str(folder), wanted, "missing tensor", "Check that weights and config.json belong together.")


class _Facts:
    """What a configuration says, checked."""

    def __init__(self, read: _Config) -> None:
        self.read = read
        self.architecture = _architecture(read)
        self.widths, self.layers, self.vocab, self.positions = _sizes(read, self.architecture)
        self.is_tied = read.get("tie_word_embeddings", bool, self.architecture == "opt")

    def base_parts(self, prefix: str) -> tuple[Part, ...]:
        return _base_parts(self.architecture, prefix, self.widths.hidden, self.vocab, self.positions, self.is_tied)

    def spec(
        self, name: str, dtype: str, kind: ExitsKind, exits: tuple[int, ...], shapes: Mapping[int, HeadShape]
    ) -> ModelSpec:
        """Byte-exact sizes in a runtime dtype."""
        item, w = ITEM_BYTES[dtype], self.widths

        def size(parts: Sequence[Part]) -> int:
            return item * sum(part.elements for part in parts)

        return ModelSpec(
            name=name,
            layers=self.layers,
            exits=exits,
            kind=kind,
            layer_bytes=size(_layer_parts(self.architecture, "", w)),
            base_bytes=size(self.base_parts("")),
            kv_bytes_per_token_layer=item * 2 * w.kv_heads * w.head_dim,
            hidden_bytes=item * hidden_room(w.hidden, 2 * w.kv_heads * w.head_dim),
            max_context=self.positions,
            vocabulary=f"size:{self.vocab}",
            exit_head_bytes={e: size(_head_parts(self.architecture, e, w.hidden, s)) for e, s in shapes.items()},
        )

    def info(
        self,
        folder: Path,
        dtype: str,
        spec: ModelSpec,
        prefix: str,
        shapes: Mapping[int, HeadShape],
        *,
        eos_ids: tuple[int, ...],
    ) -> CheckpointInfo:
        """The facts of a checkpoint without files."""
        read, w, is_opt = self.read, self.widths, self.architecture == "opt"
        return CheckpointInfo(
            folder=folder,
            architecture=self.architecture,
            dtype=dtype,
            spec=spec,
            hidden=w.hidden,
            heads=w.heads,
            kv_heads=w.kv_heads,
            head_dim=w.head_dim,
            ffn=w.ffn,
            vocab=self.vocab,
            positions=self.positions,
            activation=_activation(read, self.architecture),
            norm_eps=1e-5 if is_opt else read.get("rms_norm_eps", float, 1e-6),
            rope=None if is_opt else _rope(read),
            is_tied=self.is_tied,
            eos_ids=eos_ids,
            head_shapes=shapes,
            head_file=None,
            random=None,
            prefix=prefix,
            tensors={},
        )


def _head_parts(architecture: Architecture, exit_layer: int, hidden: int, shape: HeadShape) -> tuple[Part, ...]:
    return shape.parts(exit_layer, hidden, has_norm_bias=architecture == "opt")


# --- the rest of the config --------------------------------------------------------------------------------


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
    for values in (scaling, read):
        if values.get("partial_rotary_factor", float, 1.0) != 1.0:
            raise values.error("partial_rotary_factor", "rotates a part of each head", "Supported: 1, all of it.")
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
    generation = read_object(file, "") if file.is_file() else {}
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
        content = read_object(file, "")
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
