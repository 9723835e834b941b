"""Models of a group and the engine that runs them; on a CPU, stand-ins with as many layers and little width."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

from heliosim.runs import engine_mode

from .book import Book
from .plan import LLAMA, PAIR, Options, Shape

STAND_IN_WIDTH, STAND_IN_VOCABULARY = 64, 512
STAND_IN_NOTE = (
    f"Not the named models: stand-ins with their numbers of layers, {STAND_IN_WIDTH} wide, so that the same code runs."
)


def shapes_of(group: str) -> tuple[Shape, ...]:
    """The shapes that a group measures."""
    return PAIR if group == "opt-pair" else (LLAMA,)


def checkpoint_of(shape: Shape, options: Options, work: Path) -> str:
    """The name of a shape's random weights."""
    exits = f"@exits={','.join(map(str, shape.exits))}"
    if options.is_gpu:
        return f"random:{shape.model}{exits}"
    return f"random:{_stand_in(shape, work)}{exits}"


def _stand_in(shape: Shape, work: Path) -> Path:
    """The configuration file of a narrow model with the layers and the name of ``shape``."""
    from heliosim.hardware.architecture import open_architecture

    real = open_architecture(shape.model)
    common = {
        "model_type": real.family,
        "hidden_size": STAND_IN_WIDTH,
        "num_hidden_layers": real.layers,
        "num_attention_heads": 4,
        "vocab_size": STAND_IN_VOCABULARY,
        "max_position_embeddings": real.max_context if real.family == "opt" else 2048,
        "tie_word_embeddings": real.is_tied,
    }
    opt = {"ffn_dim": 2 * STAND_IN_WIDTH, "word_embed_proj_dim": STAND_IN_WIDTH}
    llama = {"intermediate_size": 2 * STAND_IN_WIDTH, "num_key_value_heads": 2}
    folder = work / "shapes"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{shape.model}.json"
    path.write_text(json.dumps(common | (opt if real.family == "opt" else llama), indent=1), encoding="utf-8")
    return path


def dtype_of(options: Options) -> str:
    """A CPU computes in float32: its half precisions are emulated."""
    return options.dtype if options.is_gpu else "float32"


def engine_options(options: Options) -> dict[str, Any]:
    """What the engine is made with: on a GPU the fast path."""
    return {
        "device": options.device,
        "dtype": dtype_of(options),
        "mode": engine_mode("auto", options.device),
    }


def engine_of(book: Book) -> Any:
    """The group's engine over its shapes, made when it is first asked for."""
    if "engine" not in book.shared:
        from heliosim.engines.torch import TorchEngine

        shapes = shapes_of(book.shared["group"])
        names = {s.model: checkpoint_of(s, book.options, book.shared["work"]) for s in shapes}
        made = engine_options(book.options)
        if book.options.is_gpu:
            import torch

            made["budget_bytes"] = int(0.75 * torch.cuda.get_device_properties(book.options.device).total_memory)
        book.shared["engine"] = TorchEngine(names, **made)
    if not book.options.is_gpu:
        book.note(STAND_IN_NOTE)
    return book.shared["engine"]


def drop_engine(book: Book) -> None:
    """Free the device and host memory of the group's engine for what comes next."""
    engine = book.shared.pop("engine", None)
    if engine is not None:
        engine.reset()
        engine.close()
    del engine
    gc.collect()
    if book.options.is_gpu:
        import torch

        torch.cuda.empty_cache()
