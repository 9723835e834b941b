"""How an answer is said: one sentence, the tiles, the sensitivity. Pure functions from the planner's plain data."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from heliosim_app.answer import UNPRICED
from heliosim_app.parts import Tile, tile
from heliosim_app.question import MODELS, Question, slug, systems

from heliosim.plan_words import number, words_of
from heliosim.prices import Price
from heliosim.stats import Interval

Answer = Mapping[str, Any]


def interval_of(found: Mapping[str, Any] | None, count: int = 0) -> Interval | None:
    """An interval from its plain data."""
    return None if found is None else Interval(found["mean"], found["half_width"], count, found["confidence"])


def text_of(found: Mapping[str, Any] | None, unit: str = "", scale: float = 1.0) -> str:
    """``410 ± 30 ms``."""
    if found is None:
        return "unavailable"
    spread = "" if found["half_width"] is None else f" ± {number(scale * found['half_width'])}"
    return f"{number(scale * found['mean'])}{spread} {unit}".strip()


def fleet_text(count: int, gpus_per_replica: int, gpu: str) -> str:
    """``3 × H200-141GB``, ``2 × 4 A100-40GB``."""
    return f"{count} × {gpu}" if gpus_per_replica == 1 else f"{count} × {gpus_per_replica} {gpu}"


def sentence(question: Question, answer: Answer) -> str:
    """The answer in one sentence, with the limit that stands out and what one replica fewer would miss."""
    who = f"{question.system} over {MODELS.get(question.models, 'the uploaded models')}"
    winner = answer["winner"]
    if winner is None:
        last = answer["candidates"][0]
        verb = "is not shown to keep" if answer["answer"] == "undecided" else "cannot keep"
        return f"No fleet of up to 16 {question.device} with {who} {verb} these limits: {last['status']}."
    fleet = fleet_text(winner["count"], winner["candidate"]["gpus_per_replica"], question.device)
    verified = answer["verified_with_fresh_seeds"]
    first = f"{fleet} with {who}: {limits_text(verified)}"
    return f"{first}; {fewer_text(answer)}."


def system_of(question: Question, candidate: Mapping[str, Any]) -> str:
    """The system a candidate of a plan stands for."""
    gpu = candidate["gpu"]
    names = {f"{slug(gpu)}-{slug(name)}": name for name in systems(question.models, gpu)}
    return names.get(candidate["name"], candidate["name"])


def _fleet_of(question: Question, option: Mapping[str, Any]) -> str:
    held = option["candidate"]
    fleet = fleet_text(option["count"], held["gpus_per_replica"], held["gpu"])
    return f"{fleet} with {system_of(question, held)}"


def plan_sentence(question: Question, answer: Answer) -> str:
    """The cheapest fleet in one sentence."""
    winner = answer["winner"]
    if winner is None:
        verb = "is shown to keep" if answer["answer"] == "undecided" else "keeps"
        return f"No fleet of these candidates {verb} the limits."
    price = f" at {winner['price_per_hour']:,.2f} {answer['currency']}/h" if is_priced(winner) else ""
    verified = limits_text(answer["verified_with_fresh_seeds"])
    return f"{_fleet_of(question, winner)}{price}: {verified}; {fewer_text(answer)}."


def fewer_sentence(answer: Answer) -> str:
    """What one replica fewer does, as a sentence with the interval it rests on."""
    text, fewer = fewer_text(answer), answer["one_fewer"]
    said = f"{text[0].upper()}{text[1:]}"
    if fewer is None:
        return f"{said}."
    runs = f"{fewer['replications']} runs"
    reason = fewer["reason"].removeprefix("saturated, ")
    return f"{said} ({runs})." if reason in said else f"{said}: {reason} ({runs})."


def runner_up(question: Question, answer: Answer, currency: str) -> str:
    """The next cheapest fleet that keeps the limits."""
    other, winner = answer["runner_up"], answer["winner"]
    if other is None:
        return "No other candidate was shown to keep the limits."
    more = other["price_per_hour"] - winner["price_per_hour"]
    said = f", {more:,.2f} {currency}/h more" if more else ", at the same price"
    price = f": {other['price_per_hour']:,.2f} {currency}/h{said}" if is_priced(other) else ""
    return f"{_fleet_of(question, other)}{price}. {other['status']}."


def limits_text(judgement: Mapping[str, Any]) -> str:
    """``p99 TTFT 410 ± 30 ms``: the first latency limit."""
    for limit in judgement["limits"]:
        if limit["metric"].endswith("_ms"):
            name, _, unit = words_of(limit["metric"])
            return f"{name} {text_of(limit['interval'], unit)}"
    return str(judgement["reason"])


def fewer_text(answer: Answer) -> str:
    """What one replica fewer does, in words that follow a semicolon."""
    winner, fewer = answer["winner"], answer["one_fewer"]
    if winner["count"] == 1:
        return "none fewer can be asked for"
    count = winner["count"] - 1
    if fewer is None:
        return f"{count} was not looked at"
    if fewer["verdict"] == "undecided":
        return f"{count} may do too, the runs do not tell ({fewer['reason']})"
    if "saturated" in fewer["reason"]:
        return f"{count} would not keep up: {fewer['reason'].removeprefix('saturated, ')}"
    broken = [m for m in fewer["limits"] if m["verdict"] == "misses" and m["interval"] is not None]
    for limit in broken:
        if limit["metric"].endswith("_ms") and "most" in limit:
            name, _, unit = words_of(limit["metric"])
            by, spread = limit["interval"]["mean"] - limit["most"], limit["interval"]["half_width"]
            said = "" if spread is None else f" ± {number(spread)}"
            return f"{count} would miss the {name} limit by {number(by)}{said} {unit}"
    return f"{count} would not do: {fewer['reason']}"


def is_priced(option: Mapping[str, Any]) -> bool:
    return bool(option["price"]["source"] != UNPRICED)


def answer_tiles(question: Question, answer: Answer, currency: str) -> list[Tile]:
    """TTFT, TPOT, throughput, cost, energy, quality of the fleet, with intervals over fresh seeds."""
    winner = answer["winner"]
    judgement = answer["verified_with_fresh_seeds"] if winner else answer["candidates"][0]["judgement"]
    if judgement is None:
        return []
    count = judgement["replications"]
    by_name = {limit["metric"]: limit for limit in judgement["limits"]}
    figures = judgement["figures"]
    found = []
    for metric, label in (("p99_ttft_ms", "p99 TTFT"), ("p99_tpot_ms", "p99 TPOT")):
        limit = by_name.get(metric)
        if limit is not None:
            held = interval_of(limit["interval"], count)
            found.append(tile(label, held, "ms", note=f"limit {number(limit['most'])} ms", verdict=limit["verdict"]))
    out = interval_of(figures.get("output_tokens_per_s"), count)
    found.append(tile("Throughput", out, "tok/s", note=f"output tokens at {question.rate_per_s:g} requests/s"))
    return [*found, *money_tiles(winner, currency), *quality_tiles(figures, count)]


def money_tiles(winner: Mapping[str, Any] | None, currency: str) -> list[Tile]:
    """Cost per hour and per million output tokens; says so where there is no price."""
    if winner is None:
        return []
    if not is_priced(winner):
        return [Tile("Cost", "–", "no price for this device", "add one on the page Plan")]
    price = winner["price"]
    note = f"{price['gpu']} at {price['price_per_gpu_hour']:g} {currency}/h, {price['provider']}, {price['date']}"
    tokens = winner["price_per_million_output_tokens"]
    return [
        Tile("Cost per hour", f"{winner['price_per_hour']:,.2f} {currency}", "all GPUs of the fleet", note),
        Tile("Cost per million tokens", "–" if tokens is None else f"{tokens:,.2f} {currency}", "output tokens", note),
    ]


def quality_tiles(figures: Mapping[str, Any], count: int) -> list[Tile]:
    energy = interval_of(figures.get("energy_per_1000_j"), count)
    agreement = interval_of(figures.get("agreement"), count)
    perplexity = interval_of(figures.get("perplexity"), count)
    return [
        tile("Energy", energy, "kJ", scale=1e-3, note="per 1,000 requests, while stepping"),
        tile("Agreement", agreement, "%", scale=100, note="tokens the full model would have said too"),
        tile("Perplexity", perplexity, "", note="of its own tokens; lower is surer"),
    ]


def sensitivity_rows(answer: Answer, currency: str) -> list[dict[str, str]]:
    """What 20 % less and more load need."""
    winner = answer["winner"]
    if winner is None:
        return []
    each = winner["price_per_hour"] / winner["count"]
    rows = []
    for one in answer["sensitivity"]:
        count = one["count"]
        price = "–" if count is None or not is_priced(winner) else f"{count * each:,.2f}"
        rows.append(
            {
                "Load": f"{100 * (one['load'] - 1):+.0f}\u00a0%".replace("-", "−"),
                "Replicas needed": "none known" if count is None else str(count),
                f"{currency}/h": price,
                f"With {winner['count']} replica{'s' if winner['count'] > 1 else ''}": one["same_count"]["verdict"],
                "Because": one["same_count"]["reason"],
            }
        )
    return rows


def candidate_rows(question: Question, answer: Answer, currency: str) -> list[dict[str, Any]]:
    """Every candidate of a plan, the winner first."""
    winner = answer["winner"]
    rows = []
    for one in answer["candidates"]:
        is_winner = winner is not None and one["candidate"]["name"] == winner["candidate"]["name"]
        rows.append(
            {
                "GPU": one["candidate"]["gpu"],
                "System": system_of(question, one["candidate"]),
                "": "cheapest" if is_winner else "",
                "At least": one["least_count"],
                "Replicas": one["count"],
                f"{currency}/h": one["price_per_hour"] if is_priced(one) else None,
                f"{currency}/M tokens": one["price_per_million_output_tokens"] if is_priced(one) else None,
                "Why": one["status"],
            }
        )
    return sorted(rows, key=lambda row: not row[""])


def notes_of(answer: Answer) -> Sequence[str]:
    """What must be said beside the answer; the kind of profile stands in badges already."""
    kept = [note for note in answer["notes"] if "not measured" not in note and "prices older" not in note]
    used = [answer["winner"]["price"]] if answer["winner"] else [one["price"] for one in answer["candidates"]]
    today = datetime.datetime.now(tz=datetime.UTC).date()
    old = sorted({f"{p['gpu']}: {p['date']}" for p in used if p["source"] != UNPRICED and Price(**p).is_stale(today)})
    return [*kept, *([f"prices older than half a year ({', '.join(old)}); edit them on the page Plan"] if old else [])]
