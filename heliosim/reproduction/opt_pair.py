"""The OPT pair as the paper ran it: batch 1, 1087 requests in four blocks, seconds per layer as published.

Exits come from the spec ``opt-pair`` (``heliosim/synthetic``), drawn anew for each replication. Nothing was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from heliosim.costs import LOAD_TERMS, TERMS
from heliosim.formats.files import sha256_of
from heliosim.formats.profile import (
    CostFit,
    Derivation,
    Energy,
    HoldOut,
    LoadFit,
    ModelFacts,
    Profile,
    ProfileFile,
    Source,
    load_profile,
    write_profile,
)
from heliosim.reproduction import inputs
from heliosim.reproduction.inputs import LARGE, SMALL
from heliosim.reproduction.shapes import GIB, architecture
from heliosim.scenario import BatcherSpec, Memory, Scenario
from heliosim.synthetic.draw import behaviour_for
from heliosim.synthetic.spec import ExitSpec, load_spec
from heliosim.synthetic.table import BehaviourTable
from heliosim.workload import WorkloadSpec

NAME = "helios-opt-a100-40gb"
SYSTEMS: Mapping[str, Mapping[str, Any]] = {
    "vanilla 1.3B": {"kind": "vanilla", "model": SMALL},
    "vanilla 6.7B": {"kind": "vanilla", "model": LARGE},
    "early exit 1.3B": {"kind": "early-exit", "model": SMALL},
    "early exit 6.7B": {"kind": "early-exit", "model": LARGE},
    "HELIOS": {
        "kind": "helios",
        "candidates": [SMALL, LARGE],
        "coverage": inputs.COVERAGE,
        "probes_count": False,
    },
}


@cache
def exit_spec() -> ExitSpec:
    """The shipped spec of the pair, with the request effect that the state shares ask for."""
    content = load_spec("opt-pair").model_dump(mode="json")
    content["tokens"]["request_effect"] = {
        "value": inputs.REQUEST_EFFECT,
        "source": inputs.ASSUMPTIONS["request effect"].text,
    }
    return ExitSpec.model_validate(content)


def write(folder: Path, seed: int) -> None:
    """The pair's profile with the exits of replication ``seed``, into a folder that exists."""
    made = behaviour_for(inputs.EXITS, exit_spec(), seed)
    made.write(folder / "behaviour.parquet")
    write_profile(folder, facts(made, sha256_of(folder / "behaviour.parquet")))


@dataclass(frozen=True)
class Kept(Profile):
    """A profile whose folder is gone; ``digest``: that of its profile.json."""

    digest: str

    @property
    def hash(self) -> str:
        return self.digest


@lru_cache(maxsize=1)
def profile(seed: int) -> Profile:
    """The profile of a replication: the same exits for every system and change, other ones for another seed."""
    with TemporaryDirectory() as folder:
        write(Path(folder), seed)
        read = load_profile(Path(folder), verify=False)
        kept = Kept(Path(NAME), read.facts, read.hash)
        vars(kept)["behaviour"] = read.behaviour
    return kept


def scenario(controller: Mapping[str, Any], seed: int, share: float = 1.0) -> Scenario:
    """One system serving the four blocks, one request behind the other. ``share``: of the requests, for quick runs."""
    tasks = [
        {
            "task": name,
            "count": max(1, round(count * share)),
            "prompt_tokens": task.prompt_tokens,
            "output_tokens": {
                "kind": "uniform",
                "low": max(2, task.output_tokens // 2),
                "high": task.output_tokens * 3 // 2,
            },
        }
        for (name, task), count in zip(exit_spec().tasks.items(), inputs.REQUESTS, strict=True)
    ]
    workload = WorkloadSpec.model_validate(
        {"arrivals": {"kind": "closed", "users": 1}, "order": "blocks", "tasks": tasks}
    )
    return Scenario(
        name=NAME,
        seed=seed,
        profile=NAME,
        models=(SMALL, LARGE),
        workload=workload,
        memory=Memory(budget_bytes=round(inputs.HBM_GIB["A100-40GB"] * inputs.USABLE_SHARE * GIB)),
        batcher=BatcherSpec(max_batch=1, token_budget=2048),
        controller=dict(controller),
        clock="wall",
    )


def facts(made: BehaviourTable, digest: str) -> ProfileFile:
    """profile.json of the pair, beside a table with this digest."""
    assumed = ("prefill rate", "hidden loads", "power of the node")
    return ProfileFile(
        schema_version=1,
        kind="derived",
        derivation=Derivation(
            method="Seconds of a layer as the HELIOS paper implies them; sizes from the models' configuration files.",
            sources=(
                Source(
                    name="HELIOS",
                    used_for="seconds per layer, tokens by exit of each model alone, joint exits",
                    url="https://arxiv.org/abs/2504.10724",
                    licence="figures cited",
                ),
            ),
            assumptions=tuple(inputs.ASSUMPTIONS[name].text for name in assumed),
            synthetic=made.about,
        ),
        device={"device": "cuda", "gpu": "A100-40GB"},
        versions={},
        seed=made.seed or 0,
        models={name: _model(name) for name in (SMALL, LARGE)},
        energy=Energy(source="data-sheet", reason=inputs.ASSUMPTIONS["power of the node"].text, busy_w=_busy_watts()),
        behaviour=made.facts,
        files={"behaviour.parquet": digest},
    )


def watts(model: str) -> float:
    """Mean power of the node while a GPU decodes: that one by the share of its bandwidth it uses, the others idle."""
    share = architecture(model).layer_bytes("fp32") / inputs.LAYER_S[model] / inputs.HBM_BYTES_PER_S
    slope = (inputs.BUSY_SHARE * inputs.TDP_W - inputs.IDLE_W) / inputs.BUSY_AT_BANDWIDTH
    return inputs.NODE_GPUS * inputs.IDLE_W + slope * share


def _busy_watts() -> float:
    """What the controller is told: one number for both models."""
    return round((watts(SMALL) + watts(LARGE)) / 2, 1)


def _model(name: str) -> ModelFacts:
    shape = architecture(name)
    seconds = dict.fromkeys(TERMS, 0.0)
    seconds["layer"] = inputs.LAYER_S[name]
    seconds["layer_token_more"] = 2 * shape.layer_parameters() / inputs.PREFILL_FLOPS
    unmeasured = HoldOut(cells=0, median_abs_error=0.0, p90_abs_error=0.0, mean_signed_error=0.0, by_region={})
    step = CostFit(
        seconds_per=seconds, steps=0, cell_spread=0.0, max_rows=1, max_context=2048, max_tokens=2048, holdout=unmeasured
    )
    loads = {**dict.fromkeys(LOAD_TERMS, 0.0), "load": inputs.EXPOSED_LOAD_S}
    return ModelFacts(
        architecture="opt",
        checkpoint=name,
        weights_sha256="",
        dtype="float32",
        layers=shape.layers,
        exits=inputs.EXITS[name],
        exit_kind="fixed",
        layer_bytes=shape.layer_bytes("fp32"),
        base_bytes=shape.base_bytes("fp32"),
        exit_head_bytes={},
        kv_bytes_per_token_layer=shape.kv_bytes("fp32"),
        hidden_bytes=shape.hidden_bytes("fp32"),
        max_context=shape.max_context,
        vocabulary=shape.vocabulary_name,
        step={"wall": step},
        load={"wall": LoadFit(seconds_per=loads, loads=0, median_abs_error=None)},
        largest_batch=(),
    )
