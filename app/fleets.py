"""Several kinds of replica for one question, what their GPUs cost, and the search among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from heliosim_app.answer import search
from heliosim_app.jobs import Report
from heliosim_app.question import Question, devices, slug, systems

from heliosim.errors import InputError
from heliosim.planfile import PlanFile
from heliosim.prices import Price, PriceTable, load_prices

MOST_CANDIDATES = 8


@dataclass(frozen=True)
class Offer:
    """What a GPU costs per hour here, and how many replicas of it there may be. ``price`` None: not known."""

    gpu: str
    price: float | None
    most: int = 12
    provider: str = ""
    date: str = ""
    source: str = ""
    is_edited: bool = False


def offers(gpus: Sequence[str], provider: str, table: PriceTable | None = None) -> list[Offer]:
    """Prices of a provider, the catalogue's where it has none."""
    table = table or load_prices()
    found = []
    for gpu in gpus:
        of_kind = [p for p in table.prices if p.gpu == gpu]
        one = next((p for p in of_kind if p.provider == provider), of_kind[0] if of_kind else None)
        if one is None:
            found.append(Offer(gpu, None))
        else:
            found.append(Offer(gpu, one.price_per_gpu_hour, 12, one.provider, one.date, one.source))
    return found


def providers(table: PriceTable | None = None) -> tuple[str, ...]:
    """Sellers in the price table, in its order."""
    return tuple(dict.fromkeys(p.provider for p in (table or load_prices()).prices))


def offers_text(changed: Sequence[Offer]) -> str:
    """Edited offers as a link has them: ``H100-80GB:2.5:8``."""
    return ",".join(f"{o.gpu}:{'' if o.price is None else f'{o.price:g}'}:{o.most}" for o in changed)


def with_text(base: Sequence[Offer], text: str) -> list[Offer]:
    """Offers with what a link changes. Raises InputError for what cannot be read."""
    found = {o.gpu: o for o in base}
    for part in filter(None, text.split(",")):
        gpu, _, rest = part.partition(":")
        price, _, most = rest.partition(":")
        try:
            changed = Offer(gpu, float(price) if price else None, int(most or 12), "yours", "", "edited here", True)
        except ValueError:
            raise InputError("prices", part, "is not GPU:price:replicas", "Write H100-80GB:2.5:8.") from None
        check(changed)
        if gpu in found:
            found[gpu] = changed
    return list(found.values())


def check(offer: Offer) -> None:
    """Raise InputError for a price or count that makes no sense."""
    if offer.price is not None and not 0 < offer.price < 10_000:
        raise InputError(f"price of {offer.gpu}", offer.price, "is not a price per hour", "Give more than 0.")
    if not 1 <= offer.most <= 64:
        raise InputError(f"replicas of {offer.gpu}", offer.most, "is not between 1 and 64", "Give 1 to 64.")


def price_table(held: Sequence[Offer], currency: str) -> PriceTable:
    """The offers as the planner's price table."""
    prices = [
        Price(
            gpu=o.gpu,
            provider=o.provider or "yours",
            region="any",
            price_per_gpu_hour=o.price,
            date=o.date or load_prices().prices[0].date,
            source=o.source or "edited here",
        )
        for o in held
        if o.price is not None
    ]
    if not prices:
        raise InputError("prices", None, "no GPU has a price", "Fill in the table.")
    return PriceTable(schema_version=1, currency=currency, prices=tuple(prices))


def price_of(held: Offer) -> Price | None:
    """An offer as a price, or None."""
    if held.price is None:
        return None
    return price_table([held], load_prices().currency).prices[0]


def fleet_plan(question: Question, gpus: Sequence[str], names: Sequence[str], most: Mapping[str, int]) -> PlanFile:
    """Every chosen system on every chosen GPU as candidates of one plan. Raises InputError for none, or too many."""
    pairs = [
        (gpu, name)
        for gpu in gpus
        if gpu in devices(question.models)
        for name in names
        if name in systems(question.models, gpu)
    ]
    if not pairs:
        raise InputError("candidates", [*gpus, *names], "leave nothing to choose from", "Choose a device and a system.")
    if len(pairs) > MOST_CANDIDATES:
        said = f"are more than {MOST_CANDIDATES} candidates"
        raise InputError("candidates", len(pairs), said, "Choose fewer devices or systems.")
    made = []
    for gpu, name in pairs:
        asked = replace(question, device=gpu, system=name)
        one = asked.candidate(f"{slug(gpu)}-{slug(name)}")
        made.append(one.model_copy(update={"max_count": most.get(gpu, 12)}))
    base = replace(question, device=pairs[0][0], system=pairs[0][1]).plan()
    return base.model_copy(update={"candidates": tuple(made), "name": f"{question.load}-fleet"})


def find_fleet(plan: PlanFile, prices: PriceTable, folder: Any, *, report: Report) -> dict[str, Any]:
    """The cheapest fleet; probes are kept in ``folder``, so a search that was cancelled goes on from there."""
    return search(plan, prices, report, folder)


def said(plan: PlanFile, prices: PriceTable) -> dict[str, Any]:
    """A plan as plain data that names no folder of this machine, to look answers up by."""
    content = plan.model_dump(mode="json")
    for candidate in content["candidates"]:
        candidate["profile"] = candidate["profile"].rpartition("/")[2]
    return {"plan": content, "prices": [asdict_price(p) for p in prices.prices], "currency": prices.currency}


def asdict_price(price: Price) -> dict[str, Any]:
    return dict(price.model_dump(mode="json"))


def as_rows(held: Sequence[Offer]) -> list[dict[str, Any]]:
    """Offers as rows of a table to edit."""
    return [{k: v for k, v in asdict(o).items() if k != "is_edited"} for o in held]


def from_rows(rows: Sequence[Mapping[str, Any]], base: Sequence[Offer]) -> list[Offer]:
    """Offers of an edited table; those that differ from ``base`` are marked as edited."""
    known = {o.gpu: o for o in base}
    found = []
    for row in rows:
        was, price = known[row["gpu"]], row["price"]
        price = None if price is None or price != price else float(price)
        most = was.most if row["most"] is None or row["most"] != row["most"] else int(row["most"])
        if (price, most) == (was.price, was.most):
            found.append(was)
            continue
        changed = Offer(was.gpu, price, most, "yours", "", "edited here", True)
        check(changed)
        found.append(changed)
    return found
