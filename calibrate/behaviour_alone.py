"""Behaviour measured by itself: a behaviour folder of real models, no step timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from heliosim.errors import InputError
from heliosim.formats.checkpoint import checkpoint_path, inspect_checkpoint
from heliosim.formats.files import new_folder, sha256_of, write_json
from heliosim.synthetic.table import BEHAVIOUR_FOLDER, FACTS, TABLE, BehaviourFile
from heliosim.types import ModelSpec

from .behaviour_parts import Parts
from .behaviour_stage import BehaviourPlan, measure_behaviour, parts_folder
from .device import resolve_device, version_facts


def measure_table(
    plan: BehaviourPlan,
    models: Sequence[str],
    out: Path,
    *,
    device: str = "auto",
    dtype: Any = "float32",
    threads: int = 1,
    max_context: int = 256,
    overwrite: bool = False,
    progress: Callable[[str, float], None] = lambda _what, _share: None,
) -> None:
    """Write a behaviour folder. Parts that an interrupted call left beside it are gone on from. Raises InputError for
    models that cannot be scored on one text.
    """
    from heliosim.engines.torch import TorchEngine

    if not models:
        raise InputError("--models", "", "names no model", "Name at least one.")
    infos = {i.spec.name: i for i in (inspect_checkpoint(checkpoint_path(m), dtype) for m in models)}
    specs = {name: info.spec for name, info in infos.items()}
    require_shared_vocabulary(specs)
    with new_folder(out, BEHAVIOUR_FOLDER, overwrite=overwrite) as folder:
        room = min(max_context, *(s.max_context for s in specs.values()))
        coder = plan.coder(infos, room)
        prompts = plan.prompts(coder)
        where = resolve_device(device)
        folders = {name: info.folder for name, info in infos.items()}
        engine = TorchEngine(folders, device=where, dtype=dtype, threads=threads)
        parts = parts_folder(out)
        facts = measure_behaviour(plan, engine, infos, coder, prompts, folder / TABLE, parts, progress)
        weights = {name: info.weights_sha256() for name, info in infos.items()}
        said = BehaviourFile(
            origin="measured",
            about=(*(f"{name}: weights {w[:12]}, {dtype}, on {where}" for name, w in weights.items()), _versions()),
            exits={name: s.exits for name, s in specs.items()},
            facts=facts,
            seed=plan.seed,
            spec=None,
            sha256=sha256_of(folder / TABLE),
            weights=weights,
        )
        write_json(folder / FACTS, said.model_dump(mode="json"))
    Parts.remove_at(parts)


def _versions() -> str:
    return ", ".join(f"{name} {version}" for name, version in version_facts().items())


def require_shared_vocabulary(specs: dict[str, ModelSpec]) -> None:
    """Raise InputError unless all models read the same ids."""
    first = next(iter(specs.values()))
    for spec in specs.values():
        if spec.vocabulary != first.vocabulary:
            problem = f"does not share its tokenizer with {first.name}"
            raise InputError("--models", spec.name, problem, "Calibrate them apart, or choose others.")
