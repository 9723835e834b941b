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
    ModelPower,
    Profile,
    ProfileFile,
    Source,
    load_profile,
    write_profile,
)
from heliosim.hardware.device import Device, open_device
from heliosim.hardware.steps import StepTimes
from heliosim.reproduction import inputs
from heliosim.reproduction.inputs import LARGE, SMALL
from heliosim.reproduction.setups import Setup
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
    "HELIOS": {"kind": "helios", "candidates": [SMALL, LARGE]},
}


def controller(system: Mapping[str, Any], setup: Setup) -> dict[str, Any]:
    """A system's controller under a set-up, which says something about HELIOS alone."""
    if system["kind"] != "helios":
        return dict(system)
    return {**system, "coverage": setup.coverage, "probes_count": setup.probes_count}


@cache
def exit_spec(request_effect: float | None = None) -> ExitSpec:
    """The shipped spec of the pair; ``request_effect``: in the place of its own."""
    content = load_spec("opt-pair").model_dump(mode="json")
    own = content["tokens"]["request_effect"]
    if request_effect is not None and request_effect != own["value"]:
        source = "varied by the reproduction of the paper; see there"
        content["tokens"]["request_effect"] = {"value": request_effect, "source": source}
    return ExitSpec.model_validate(content)


def write(folder: Path, seed: int, request_effect: float) -> None:
    """The pair's profile with the exits of replication ``seed``, into a folder that exists."""
    made = behaviour_for(inputs.EXITS, exit_spec(request_effect), seed)
    made.write(folder / "behaviour.parquet")
    write_profile(folder, facts(made, sha256_of(folder / "behaviour.parquet")))


@dataclass(frozen=True)
class Kept(Profile):
    """A profile whose folder is gone; ``digest``: that of its profile.json."""

    digest: str

    @property
    def hash(self) -> str:
        return self.digest


@lru_cache(maxsize=4)
def profile(seed: int, request_effect: float) -> Profile:
    """The profile of a replication: the same exits for every system and change, other ones for another seed."""
    with TemporaryDirectory() as folder:
        write(Path(folder), seed, request_effect)
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
        memory=Memory(budget_bytes=round(inputs.HBM_GIB["A100-40GB"] * inputs.USABLE_SHARE * GIB), loads="overlapped"),
        batcher=BatcherSpec(max_batch=1, token_budget=2048),
        controller=dict(controller),
        clock="wall",
    )


def facts(made: BehaviourTable, digest: str) -> ProfileFile:
    """profile.json of the pair, beside a table with this digest."""
    assumed = ("prefill rate", "host link", "power of the node")
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
        energy=Energy(
            source="published",
            reason=inputs.ASSUMPTIONS["power of the node"].text,
            idle_w=device().power.idle_w,
            decode_w=device().power.decode_w,
            gpus=inputs.NODE_GPUS,
            models={name: power(name) for name in (SMALL, LARGE)},
        ),
        behaviour=made.facts,
        files={"behaviour.parquet": digest},
    )


@cache
def device() -> Device:
    return open_device(inputs.DEVICE)


@cache
def power(model: str) -> ModelPower:
    """Mean power of one GPU: while kernels run that of its device, while it waits for launches that of an idle one."""
    d = device()
    times = StepTimes.of(architecture(model), d, dtype="fp32")
    rows, context, prompt = 1, 512, 512
    decoding = times.dense(rows) + times.decode_attention(rows, context)
    reading = times.dense(prompt) + times.prefill_attention(1, prompt)
    taken = inputs.LAYER_S[model] + (prompt - 1) * _seconds_per_prompt_token(model)
    busy, read = (min(1.0, kernels / s) for kernels, s in ((decoding, inputs.LAYER_S[model]), (reading, taken)))
    idle = d.power.idle_w
    return ModelPower(
        decode_w=idle + busy * (d.power.decode_w - idle), prefill_w=idle + read * (d.power.prefill_w - idle)
    )


def _seconds_per_prompt_token(model: str) -> float:
    return 2 * architecture(model).layer_parameters() / inputs.PREFILL_FLOPS


def _model(name: str) -> ModelFacts:
    shape = architecture(name)
    seconds = dict.fromkeys(TERMS, 0.0)
    seconds["layer"] = inputs.LAYER_S[name]
    seconds["layer_token_more"] = _seconds_per_prompt_token(name)
    unmeasured = HoldOut(cells=0, median_abs_error=0.0, p90_abs_error=0.0, mean_signed_error=0.0, by_region={})
    step = CostFit(
        seconds_per=seconds, steps=0, cell_spread=0.0, max_rows=1, max_context=2048, max_tokens=2048, holdout=unmeasured
    )
    loads = {**dict.fromkeys(LOAD_TERMS, 0.0), "weights_byte": 1 / device().links.host_bytes_per_s}
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
