"""Train the four tiny backbones from scratch, each on one CPU thread in some minutes.

The OPT pair is trained as usual; its exit heads come later (`heads.py`) and leave it untouched. The Llama pair is
trained to exit anywhere, as LayerSkip does it: layer dropout that rises with depth, and a loss on one random exit
per step through the shared final norm and head. Small and large members see different mixes of tasks on purpose.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from heliosim.tasks import FAMILIES, Document, documents

from .tokenizer import POSITIONS, VOCABULARY, save_tokenizer, shared_tokenizer

log = logging.getLogger(__name__)

WIDTH, HEADS = 128, 4
BATCH, LENGTH = 16, 192  # sequences a step, tokens a sequence
PROMPT_WEIGHT = 0.3  # weight of the loss on prompt tokens; completions have 1
REPEATS_EARLY_STEPS = 120  # the first steps see many sequences of repeated random tokens, the rest some
REPEATS_EARLY, REPEATS_LATER = 6, 0  # of the sequences of a batch
MUON_RATE, ADAM_RATE, DECAY = 1e-2, 3e-3, 0.05
WARM_UP_STEPS, CONSTANT_SHARE = 40, 0.45
LAYER_DROPOUT, EXIT_WEIGHT = 0.1, 0.5  # anywhere members only

GENERAL = {"chat": 0.30, "qa": 0.30, "prose": 0.12, "arithmetic": 0.10, "lists": 0.06, "code": 0.12}
TECHNICAL = {"chat": 0.13, "qa": 0.15, "prose": 0.06, "arithmetic": 0.26, "lists": 0.12, "code": 0.28}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What one member is and how it is trained. ``ffn``: feed-forward width; 0: what the tiny members have."""

    name: str
    architecture: Literal["opt", "llama"]
    layers: int
    exits: tuple[int, ...]
    mix: dict[str, float] = field(hash=False)  # share of the training tokens per family
    steps: int
    seed: int
    width: int = WIDTH
    heads: int = HEADS
    ffn: int = 0

    @property
    def kind(self) -> Literal["fixed", "anywhere"]:
        """Exits at fixed layers with heads of their own, or anywhere through the shared head."""
        return "fixed" if self.architecture == "opt" else "anywhere"


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("tiny-opt-s", "opt", 6, (2, 4, 6), GENERAL, 1400, 101),
        Recipe("tiny-opt-l", "opt", 12, (4, 8, 12), TECHNICAL, 1150, 102),
        Recipe("tiny-llama-s", "llama", 6, (2, 4, 6), GENERAL, 1400, 103),
        Recipe("tiny-llama-l", "llama", 12, (3, 6, 9, 12), TECHNICAL, 1150, 104),
    )
}

CausalLM = OPTForCausalLM | LlamaForCausalLM


# --- text ---------------------------------------------------------------------------------------------------


def encode(tokenizer: PreTrainedTokenizerFast, batch: list[Document]) -> list[tuple[list[int], int]]:
    """Token ids of `<s>prompt completion</s>` per document, and how many of them belong to the prompt."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    prompts = tokenizer([document.prompt for document in batch], add_special_tokens=False)["input_ids"]
    endings = tokenizer([document.completion for document in batch], add_special_tokens=False)["input_ids"]
    return [([bos, *prompt, *ending, eos], 1 + len(prompt)) for prompt, ending in zip(prompts, endings, strict=True)]


def mixed_documents(
    tokenizer: PreTrainedTokenizerFast, mix: dict[str, float], seed: int
) -> Iterator[tuple[list[int], int]]:
    """Endless encoded training documents whose token shares follow the mix."""
    sources = {family: documents(family, "train", seed) for family in FAMILIES}
    seen = dict.fromkeys(FAMILIES, 1.0)
    rng = random.Random(seed)
    ready: dict[str, list[tuple[list[int], int]]] = {family: [] for family in FAMILIES}
    while True:
        lag = {family: mix[family] * sum(seen.values()) / seen[family] for family in FAMILIES}
        family = rng.choices(FAMILIES, weights=[lag[f] ** 4 * mix[f] for f in FAMILIES])[0]
        if not ready[family]:
            ready[family] = encode(tokenizer, list(islice(sources[family], 64)))
        ids, prompt = ready[family].pop()
        seen[family] += len(ids)
        yield ids, prompt


def packed_batches(
    stream: Iterator[tuple[list[int], int]], rng: np.random.Generator, steps: int, *, repeats: bool = True
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Per step: ids (batch, length + 1), loss weights of the ids to predict, first position per sequence."""
    ids: list[int] = []
    weights: list[float] = []
    need = BATCH * (LENGTH + 1)
    for step in range(steps):
        while len(ids) < need:
            document, prompt = next(stream)
            ids += document
            weights += [0.0] + [PROMPT_WEIGHT] * (prompt - 1) + [1.0] * (len(document) - prompt)
        tokens = np.array(ids[:need]).reshape(BATCH, LENGTH + 1)
        weight = np.array(weights[:need], dtype=np.float32).reshape(BATCH, LENGTH + 1)
        ids, weights = ids[need:], weights[need:]
        repeated = REPEATS_EARLY if step < REPEATS_EARLY_STEPS else REPEATS_LATER
        for row in range(repeated if repeats else 0):
            tokens[row], weight[row] = _repeated(rng)
        # Half of the sequences start somewhere else, so that all learned positions are trained.
        moved = rng.random(BATCH) < 0.5
        first = np.where(moved, rng.integers(0, POSITIONS - LENGTH + 1, BATCH), 0)
        yield torch.from_numpy(tokens), torch.from_numpy(weight[:, 1:]), torch.from_numpy(first)


def _repeated(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens said again and again: only induction predicts them, from the second time on."""
    period = int(rng.integers(8, 60))
    once = rng.integers(3, VOCABULARY, period)
    tokens = np.tile(once, LENGTH // period + 2)[: LENGTH + 1]
    weight = np.ones(LENGTH + 1, dtype=np.float32)
    weight[: period + 1] = 0.0
    return tokens, weight


# --- models -------------------------------------------------------------------------------------------------


def build(recipe: Recipe) -> CausalLM:
    """A fresh model with the start values of the recipe."""
    shared: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": recipe.width,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    }
    model: CausalLM
    if recipe.architecture == "opt":
        model = OPTForCausalLM(
            OPTConfig(
                **shared,
                ffn_dim=recipe.ffn or 512,
                activation_function="relu",
                do_layer_norm_before=True,
                word_embed_proj_dim=recipe.width,
                dropout=0.0,
                attention_dropout=0.0,
                layerdrop=0.0,
            )
        )
    else:
        config = LlamaConfig(**shared, intermediate_size=recipe.ffn or 352, num_key_value_heads=2)
        model = LlamaForCausalLM(config)
    _start_values(model, recipe)
    return model


@torch.no_grad()
def _start_values(model: CausalLM, recipe: Recipe) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        if "embed" in name:
            parameter.normal_(0.0, 0.05)
            continue
        parameter.normal_(0.0, 0.7 / math.sqrt(parameter.shape[1]))
        if name.endswith(("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")):
            parameter.mul_(1.0 / math.sqrt(2 * recipe.layers))
    if recipe.architecture == "opt":
        table = model.model.decoder.embed_positions.weight  # (positions + 2, width): OPT keeps two spare rows
        steps = torch.arange(table.shape[0], dtype=torch.float32)[:, None]
        rates = torch.exp(torch.arange(0, recipe.width, 2) * (-math.log(10_000.0) / recipe.width))
        table[:, 0::2] = 0.05 * torch.sin(steps * rates)
        table[:, 1::2] = 0.05 * torch.cos(steps * rates)


class Depths:
    """A Hugging Face decoder, taken apart: embed, run layers one by one, read out through norm and head."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.is_opt = isinstance(model, OPTForCausalLM)
        self.core: Any = model.model.decoder if self.is_opt else model.model
        self.layers: nn.ModuleList = self.core.layers

    def hidden_states(
        self, ids: Tensor, first: Tensor | None = None, skip: frozenset[int] = frozenset()
    ) -> list[Tensor]:
        """Hidden states (batch, length, width) after 0, 1, ..., all layers; causal, without padding."""
        start = torch.zeros(ids.shape[0], dtype=torch.long, device=ids.device) if first is None else first
        positions = start[:, None] + torch.arange(ids.shape[1], device=ids.device)
        hidden = self.core.embed_tokens(ids)
        extra: dict[str, Any] = {}
        if self.is_opt:
            hidden = hidden + self.core.embed_positions(None, 0, position_ids=positions)
        else:
            extra["position_embeddings"] = self.core.rotary_emb(hidden, position_ids=positions)
        states = [hidden]
        for index, layer in enumerate(self.layers):
            if index not in skip:
                out = layer(hidden, attention_mask=None, position_ids=positions, **extra)
                hidden = out[0] if isinstance(out, tuple) else out
            states.append(hidden)
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits through the shared final norm and head."""
        norm = self.core.final_layer_norm if self.is_opt else self.core.norm
        logits: Tensor = self.model.lm_head(norm(hidden))
        return logits


# --- training -----------------------------------------------------------------------------------------------


def weighted_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Mean cross entropy over the tokens, by weight."""
    each = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return (each * weights.flatten()).sum() / weights.sum().clamp(min=1.0)


def rate_factor(step: int, done: float) -> float:
    """Warm up, stay, then fall in a line to 3 %; `done` is the finished share of the training."""
    if step < WARM_UP_STEPS:
        return (step + 1) / WARM_UP_STEPS
    fall = (done - CONSTANT_SHARE) / (1 - CONSTANT_SHARE)
    return 1.0 - 0.97 * min(max(fall, 0.0), 1.0)


class Progress:
    """How much of a training is done: by steps, or by time where a time limit comes first."""

    def __init__(self, steps: int, minutes: float | None) -> None:
        self.steps, self.limit_s = steps, math.inf if minutes is None else 60 * minutes
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    def done(self, step: int) -> float:
        """The finished share, 1 at the end."""
        return min(1.0, max(step / self.steps, self.seconds / self.limit_s))


def optimizers(module: nn.Module, muon_rate: float = MUON_RATE, adam_rate: float = ADAM_RATE) -> list[Any]:
    """Muon for the matrices inside layers, AdamW for embeddings, norms and biases."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    matrices = [parameter for name, parameter in named if parameter.ndim == 2 and "embed" not in name]
    others = [parameter for name, parameter in named if parameter.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=muon_rate, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]


def take_step(using: list[Any], module: nn.Module, step: int, done: float) -> None:
    """One update at the rate that the schedule has for this step; gradients are cleared."""
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    for optimizer in using:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate_factor(step, done)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def train(
    recipe: Recipe, out: Path, *, steps: int | None = None, minutes: float | None = None, device: str = "cpu"
) -> Path:
    """Train one backbone on a device and write its checkpoint folder; returns the folder.

    With a time limit the learning rate falls in time for it, and fewer steps may be taken than the recipe has.
    """
    total = steps or recipe.steps
    if device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    tokenizer = shared_tokenizer(out)
    model = build(recipe).to(device).train()
    depths = Depths(model)
    using = optimizers(model)
    batches = packed_batches(
        mixed_documents(tokenizer, recipe.mix, recipe.seed), np.random.default_rng(recipe.seed), total
    )
    progress, taken = Progress(total, minutes), 0
    for step, (tokens, weights, first) in enumerate(batches):
        skip, exit_layer = _layers_of_step(recipe, rng)
        tokens, weights, first = tokens.to(device), weights.to(device), first.to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            states = depths.hidden_states(tokens[:, :-1], first, skip)
            loss = full = weighted_loss(depths.logits(states[-1]), tokens[:, 1:], weights)
            if exit_layer is not None:
                early = weighted_loss(depths.logits(states[exit_layer]), tokens[:, 1:], weights)
                loss = full + EXIT_WEIGHT * early
        loss.backward()
        take_step(using, model, step, progress.done(step))
        taken += 1
        if step % 20 == 0:
            log.info("%s step %d/%d loss %.4f %.0f s", recipe.name, step, total, full.item(), progress.seconds)
        if progress.done(step) >= 1:
            break
    return _save(recipe, model, tokenizer, out, steps=taken, seconds=progress.seconds)


def _layers_of_step(recipe: Recipe, rng: random.Random) -> tuple[frozenset[int], int | None]:
    """Which layers to leave out in this step, and which exit to train beside the last."""
    if recipe.kind == "fixed":
        return frozenset(), None
    last = recipe.layers - 1
    skip = frozenset(index for index in range(recipe.layers) if rng.random() < LAYER_DROPOUT * index / last)
    return skip, rng.randint(1, last)


@torch.no_grad()
def held_out_losses(model: CausalLM, tokenizer: PreTrainedTokenizerFast, count: int = 60) -> dict[str, float]:
    """Mean loss per completion token on the calibration split, by family."""
    depths = Depths(model.float().eval())
    device = model.device
    losses = {}
    for family in FAMILIES:
        total, tokens = 0.0, 0
        for ids, prompt in encode(tokenizer, list(islice(documents(family, "calibration", 0), count))):
            row = torch.tensor([ids[:POSITIONS]], device=device)
            logits = depths.logits(depths.hidden_states(row[:, :-1])[-1])[0, prompt - 1 :]
            total += nn.functional.cross_entropy(logits, row[0, prompt:], reduction="sum").item()
            tokens += row.shape[1] - prompt
        losses[family] = round(total / tokens, 4)
    return losses


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "numpy": np.__version__,
    }


def write_json(path: Path, value: Any) -> None:
    """Write next to the file, then rename: a reader never sees half of it."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)


def _save(
    recipe: Recipe,
    model: CausalLM,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    *,
    steps: int,
    seconds: float,
) -> Path:
    folder, beside = out / recipe.name, out / f".{recipe.name}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    model.half().save_pretrained(beside)
    save_tokenizer(tokenizer, beside)
    write_json(
        beside / "exits.json",
        {"schema_version": 1, "kind": recipe.kind, "exits": list(recipe.exits), "head_file": None},
    )
    training = {
        "schema_version": 1,
        "steps": steps,
        "tokens": steps * BATCH * LENGTH,
        "seed": recipe.seed,
        "mix": recipe.mix,
        "repeated_sequences_a_batch": {
            "early": REPEATS_EARLY,
            "early_steps": REPEATS_EARLY_STEPS,
            "later": REPEATS_LATER,
        },
        "training_seconds": round(seconds),
        "versions": versions(),
        "held_out_loss": held_out_losses(model, tokenizer),  # of the float16 weights, computed in float32
    }
    write_json(beside / "training.json", training)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)
    log.info("%s saved; held-out loss %s", recipe.name, training["held_out_loss"])
    return folder
