"""The memory of a profile's models for people: bytes by depth, largest batches, and the KV cliff. 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from heliosim.formats.profile import Profile
from heliosim.memory_model import cliff, largest_batch, needs_of
from heliosim.types import Bytes


def print_memory(profile: Profile, budget: Bytes, contexts: Sequence[int], wanted: int, step_tokens: int) -> None:
    """Print the tables for one GPU's ``budget``. ``wanted``: rows that would be served if KV did not end."""
    from heliosim.console import console
    from heliosim.fitted import Column, print_fitted
    from heliosim.tables import percent

    out = console()
    out.print(f"{profile.folder.name} · {profile.origin} · {budget / 1e9:.4g} GB for one GPU")
    clock = profile.clock()
    sizes, batches, falls = [], [], []
    needs = {name: needs_of(facts, step_tokens) for name, facts in profile.facts.models.items()}
    for name, facts in profile.facts.models.items():
        spec, need = facts.spec(name), needs[name]
        for depth in spec.exits:
            weights, kv = spec.weights_bytes(depth), spec.kv_bytes_per_token_layer * depth
            left = budget - weights - need.fixed
            sizes.append([name, str(depth), _mb(weights), f"{kv:,}", _mb(need.fixed), _mb(max(0, left))])
            fits = [largest_batch(spec, depth, c, budget, need) for c in contexts]
            batches.append([name, str(depth), *(f"{rows:,}" for rows in fits)])
        known = [c for c in contexts if c <= profile.step_cost(name, clock).max_context]
        for row in cliff(spec, profile.step_cost(name, clock), budget, known, wanted, need):
            falls.append(
                [name, str(row.depth), f"{row.context:,}", f"{row.rows:,}", f"{row.tok_per_s:,.0f}",
                 f"{row.wanted_tok_per_s:,.0f}", percent(-row.lost) if row.rows < row.wanted else "–"]
            )  # fmt: skip
    names = [Column("model", is_name=True), Column("depth", is_name=True)]
    heads = ("weights MB", "KV B/token", "beside MB", "left for KV MB")
    print_fitted(out, "Bytes of one rank", [*names, *map(Column, heads)], sizes)
    print_fitted(
        out, "Largest batch, rows of so many tokens each", [*names, *(Column(f"{c:,}") for c in contexts)], batches
    )
    title = f"The KV cliff: output tok/s of decoding with the rows KV holds, and with {wanted} (or the most fitted)"
    cliff_columns = [*names, Column("context", is_name=True), *map(Column, ("rows", "tok/s", "without end", "lost"))]
    print_fitted(out, title, cliff_columns, falls)
    known_beside = any(need.fixed or need.cap for need in needs.values())
    if not known_beside and not any(profile.spec(name).request_bytes for name in needs):
        out.print("beside weights and KV nothing is counted: the profile knows no activations or workspace")
    out.print("–: KV does not end before the rows wanted")


def _mb(count: Bytes) -> str:
    return f"{count / 1e6:,.1f}"
