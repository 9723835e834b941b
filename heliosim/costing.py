"""What a run's tokens cost in money: GPUs rented for its duration at a dated price."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from heliosim.energy_metrics import CAUSES
from heliosim.errors import UnknownNameError
from heliosim.prices import Price, PriceTable, load_prices

if TYPE_CHECKING:
    from heliosim.formats.results import RunResults
    from heliosim.metrics import Summary, SystemResult


@dataclass(frozen=True)
class TokenCost:
    """Money per million generated tokens. ``per_million`` None: no price, for the ``reason`` given."""

    per_million: float | None
    currency: str = ""
    reason: str = ""
    prices: tuple[Price, ...] = ()

    @property
    def text(self) -> str:
        """One line for people."""
        if self.per_million is None:
            return self.reason
        sources = "; ".join(
            f"{p.gpu} at {p.price_per_gpu_hour:g} {self.currency} per GPU and hour, {p.provider}, {p.date}"
            for p in self.prices
        )
        return f"{self.per_million:,.2f} {self.currency} per million output tokens ({sources})"


def energy_rows(systems: Sequence[SystemResult]) -> list[list[str | None]]:
    """For people: of each system's simulated run (else its first live one) its name, energy per token and prompt, its
    shares by cause, idle energy, and cost. Systems of which neither energy nor price is known are left out.
    """
    from heliosim.metrics import metric_spec, summarise
    from heliosim.tables import percent

    rows: list[list[str | None]] = []
    for system in systems:
        run = next(iter(system.runs))
        found = summarise(run, system.after_s, system.slo)
        cost = token_cost(run, found)
        if found.energy_j is None and cost.per_million is None:
            continue
        cells: list[str | None] = [system.name]
        for name in ("joules_per_token", "wh_per_prompt"):
            cells.append(None if found.value(name) is None else metric_spec(name).text(found.value(name)))
        for cause in CAUSES:
            joules = found.value(f"{cause}_energy_j")
            cells.append(
                None if joules is None or not found.energy_j else percent(joules / found.energy_j, signed=False)
            )
        cells.append(None if found.idle_energy_j is None else metric_spec("idle_energy_j").text(found.idle_energy_j))
        rows.append([*cells, cost.text])
    return rows


ENERGY_COLUMNS = (
    "System",
    "J per token",
    "Wh per prompt",
    "Reading",
    "Decoding",
    "Loads",
    "Evaluations",
    "Idle, J",
    "Cost",
)


def token_cost(results: RunResults, summary: Summary, table: PriceTable | None = None) -> TokenCost:
    """What a million output tokens of a run cost: every GPU of every server, idle or not, for the run's duration.

    The first price of each kind of GPU in the table counts (None: the shipped table).
    """
    deployed = results.info.deployed
    if not deployed:
        return TokenCost(None, reason="no price: the run does not say what it ran on")
    if not summary.duration or not summary.total_output_tokens:
        return TokenCost(None, reason="no price: no request was completed")
    table = table or load_prices()
    per_hour, used = 0.0, {}
    for server in deployed.values():
        if server.gpu is None:
            return TokenCost(None, reason="no price for a run without a GPU")
        try:
            price = table.price(server.gpu)
        except UnknownNameError:
            return TokenCost(None, reason=f"no price for {server.gpu}")
        used[server.gpu] = price
        per_hour += server.count * server.gpus * price.price_per_gpu_hour
    spent = per_hour * summary.duration / 3600
    return TokenCost(1e6 * spent / summary.total_output_tokens, table.currency, "", tuple(used.values()))
