"""A profile's facts for a tensor-parallel engine: sizes of one rank, as the server's memory is that of one GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from heliosim.engines.parallel.cutting import rank_info
from heliosim.errors import InputError
from heliosim.formats.checkpoint import checkpoint_path, inspect_checkpoint
from heliosim.formats.profile import ModelFacts, Profile


def ranked(profile: Profile, models: Sequence[str], ranks: int) -> Profile:
    """The profile with the sizes that each of ``ranks`` GPUs holds of ``models``; times stay as they were measured.

    Raises InputError if a model cannot be cut so, or was measured on another number of GPUs than 1 and ``ranks``.
    """
    facts = {name: _model(profile, name, ranks) if name in models else f for name, f in profile.facts.models.items()}
    return replace(profile, facts=profile.facts.model_copy(update={"models": facts}))


def _model(profile: Profile, name: str, ranks: int) -> ModelFacts:
    facts = profile.model(name)
    if facts.tensor_parallel == ranks:
        return facts
    if facts.tensor_parallel != 1:
        problem = f"the profile was measured on {facts.tensor_parallel} GPUs"
        raise InputError("tensor_parallel", ranks, problem, f"Give {facts.tensor_parallel}, or calibrate on {ranks}.")
    if not profile.is_measured:
        remedy = f"Compose it with a tensor-parallel degree of {ranks}."
        raise InputError("tensor_parallel", ranks, "figures that were not measured have no model to run", remedy)
    whole = inspect_checkpoint(checkpoint_path(facts.checkpoint), facts.dtype, name=name, exits=facts.exits)
    spec = rank_info(whole, 0, ranks).spec
    return facts.model_copy(
        update={
            "tensor_parallel": ranks,
            "layer_bytes": spec.layer_bytes,
            "base_bytes": spec.base_bytes,
            "kv_bytes_per_token_layer": spec.kv_bytes_per_token_layer,
            "hidden_bytes": spec.hidden_bytes,
            "exit_head_bytes": dict(spec.exit_head_bytes),
        }
    )
