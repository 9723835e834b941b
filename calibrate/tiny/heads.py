"""Exit heads for the OPT pair: backbone frozen and untouched, one small residual MLP per early exit.

z = h + fc2(gelu(fc1(h))), h the hidden state after that many layers; logits = lm_head(final_layer_norm(z)). Each head
learns to say what the last layer says (Kullback-Leibler divergence), with a little of the text itself.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from .tokenizer import load_tokenizer
from .train import (
    WIDTH,
    Depths,
    Progress,
    Recipe,
    mixed_documents,
    optimizers,
    packed_batches,
    take_step,
    weighted_loss,
    write_json,
)

log = logging.getLogger(__name__)

HEAD_FILE = "exit_heads.safetensors"
HIDDEN = 512
STEPS = 600
MUON_RATE, ADAM_RATE = 6e-3, 2e-3
TEXT_WEIGHT = 0.1  # of the cross entropy with the text beside the divergence from the last layer


class ExitHead(nn.Module):
    """A residual MLP between a hidden state and the shared final norm; starts as the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, WIDTH)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """The adapted hidden state, of the same shape."""
        adapted: Tensor = hidden + self.fc2(nn.functional.gelu(self.fc1(hidden)))
        return adapted


class ExitHeads(nn.Module):
    """The heads of a model; parameter names are `exits.<layer>.fc1.weight` and so on."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.exits = nn.ModuleDict({str(layer): ExitHead() for layer in layers})

    def __getitem__(self, layer: int) -> nn.Module:
        return self.exits[str(layer)]


def load_heads(folder: Path) -> ExitHeads | None:
    """The heads of a checkpoint folder in float32, or None where every exit uses the shared head."""
    exits = json.loads((folder / "exits.json").read_text(encoding="utf-8"))
    if exits["head_file"] is None:
        return None
    heads = ExitHeads(tuple(exits["exits"][:-1]))
    heads.load_state_dict({name: value.float() for name, value in load_file(folder / exits["head_file"]).items()})
    return heads.eval()


def train_heads(recipe: Recipe, out: Path, *, steps: int = STEPS, minutes: float | None = None) -> Path:
    """Train the heads of one OPT member and add them to its folder; returns the head file."""
    if recipe.kind != "fixed":
        raise ValueError(f"{recipe.name} exits anywhere through its shared head: it has no heads to train")
    torch.set_num_threads(1)
    seed = recipe.seed + 1000
    torch.manual_seed(seed)
    folder = out / recipe.name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    depths = Depths(model)
    heads = ExitHeads(recipe.exits[:-1])
    using = optimizers(heads, MUON_RATE, ADAM_RATE)
    stream = mixed_documents(load_tokenizer(folder), recipe.mix, seed)
    progress, taken = Progress(steps, minutes), 0
    for step, (tokens, weights, first) in enumerate(
        packed_batches(stream, np.random.default_rng(seed), steps, repeats=False)
    ):
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                states = depths.hidden_states(tokens[:, :-1], first)
                wanted = depths.logits(states[-1]).float().log_softmax(-1)
            loss = torch.zeros(())
            for layer in recipe.exits[:-1]:
                logits = depths.logits(heads[layer](states[layer])).float()
                apart = nn.functional.kl_div(logits.log_softmax(-1), wanted, reduction="none", log_target=True).sum(-1)
                loss = loss + (apart * weights).sum() / weights.sum()
                loss = loss + TEXT_WEIGHT * weighted_loss(logits, tokens[:, 1:], weights)
        loss.backward()
        take_step(using, heads, step, progress.done(step))
        taken += 1
        if step % 20 == 0:
            log.info("%s heads %d/%d loss %.4f %.0f s", recipe.name, step, steps, loss.item(), progress.seconds)
        if progress.done(step) >= 1:
            break
    return _save(folder, heads, seed=seed, steps=taken, seconds=progress.seconds)


def _save(folder: Path, heads: ExitHeads, *, seed: int, steps: int, seconds: float) -> Path:
    file, beside = folder / HEAD_FILE, folder / f".{HEAD_FILE}.tmp"
    save_file({name: value.half().contiguous() for name, value in heads.state_dict().items()}, beside)
    os.replace(beside, file)
    exits = json.loads((folder / "exits.json").read_text(encoding="utf-8"))
    write_json(folder / "exits.json", exits | {"head_file": HEAD_FILE})
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    about = {"steps": steps, "seed": seed, "text_weight": TEXT_WEIGHT, "training_seconds": round(seconds)}
    write_json(folder / "training.json", training | {"heads": about})
    return file
