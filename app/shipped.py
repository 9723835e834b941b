"""Examples that are answered already, so that no page opens empty. ``python -m heliosim_app.shipped`` makes them again.

Each is a question by the inputs that ask it; its answer lies in ``shipped.json`` beside this module, as plain data with
the version that computed it. A test recomputes one and compares.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from heliosim_app.question import Question

from heliosim.planfile import PlanFile
from heliosim.prices import PriceTable, load_prices

FILE = Path(__file__).with_name("shipped.json")


@dataclass(frozen=True)
class Example:
    """A question with a title. ``question`` differs from the default one in what is said."""

    title: str
    question: Question

    @property
    def inputs(self) -> dict[str, Any]:
        """The question as inputs of a page."""
        asked = self.question
        return {
            "models": asked.models,
            "device": asked.device,
            "system": asked.system,
            "load": asked.load,
            "rate": asked.rate_per_s,
            "prompt": asked.prompt_tokens,
            "output": asked.output_tokens,
            "ttft": asked.ttft_ms or 0.0,
            "tpot": asked.tpot_ms or 0.0,
            "requests": asked.requests,
            "seed": asked.seed,
        }


CHAT = Question()
EXAMPLES: Mapping[str, Example] = {
    "chat": Example("Chat, 20 requests/s", CHAT),
    "chat-early-exit": Example("The same with early exit alone", replace(CHAT, system="early exit llama2-7b")),
    "code": Example(
        "Code completion, 120 requests/s",
        replace(
            CHAT, device="H100-80GB", load="code", rate_per_s=120.0, prompt_tokens=300, output_tokens=64, ttft_ms=200.0
        ),
    ),
    "summarise": Example(
        "Summarising, three Llamas",
        replace(
            CHAT,
            models="llama-three",
            device="A100-40GB",
            load="summarise",
            rate_per_s=25.0,
            prompt_tokens=800,
            output_tokens=80,
            ttft_ms=1000.0,
        ),
    ),
}


def said(question: Question) -> dict[str, Any]:
    """A question as plain data, to look answers up by."""
    return json.loads(json.dumps(asdict(question)))


@lru_cache(maxsize=1)
def _held() -> dict[str, Any]:
    try:
        return dict(json.loads(FILE.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {"version": None, "answers": []}


def shipped_answer(question: Question) -> dict[str, Any] | None:
    """The answer that was shipped with this very version, or None."""
    from heliosim import __version__

    held = _held()
    if held["version"] != __version__:
        return None
    wanted = said(question)
    return next((one["answer"] for one in held["answers"] if one["question"] == wanted), None)


def shipped_plan(plan: PlanFile, prices: PriceTable) -> dict[str, Any] | None:
    """The answer to the page Plan's first question, if this is it and this version computed it."""
    from heliosim_app.fleets import said as said_plan

    from heliosim import __version__

    held = _held()
    if held["version"] != __version__ or "plan" not in held:
        return None
    return held["plan"]["answer"] if held["plan"]["asked"] == said_plan(plan, prices) else None


def first_plan() -> tuple[PlanFile, PriceTable]:
    """What the page Plan asks when nothing was changed."""
    from heliosim_app import inputs
    from heliosim_app.fleets import fleet_plan, offers, price_table
    from heliosim_app.question import devices

    default = {one.key: one.default for one in inputs.SHARED}
    held = offers(devices(CHAT.models), default["provider"])
    table = price_table(held, load_prices().currency)
    return fleet_plan(CHAT, default["plan_devices"], default["plan_systems"], {o.gpu: o.most for o in held}), table


def main() -> None:
    """Answer every example, or those that are named (``plan`` for the plan), and write the file."""
    import sys

    from heliosim_app.answer import find
    from heliosim_app.fleets import find_fleet
    from heliosim_app.fleets import said as said_plan

    from heliosim import __version__
    from heliosim.formats.files import write_json

    wanted = sys.argv[1:] or [*EXAMPLES, "plan"]
    held = _held() if _held()["version"] == __version__ else {"answers": []}
    known = {one["name"]: one for one in held["answers"]}
    for name, example in EXAMPLES.items():
        if name in wanted:
            print(f"{name} ...", flush=True)
            found = find(example.question, report=lambda text, share: None)
            known[name] = {"name": name, "question": said(example.question), "answer": found}
    first = held.get("plan")
    if "plan" in wanted:
        print("plan ...", flush=True)
        plan, prices = first_plan()
        found = find_fleet(plan, prices, None, report=lambda text, share: None)
        first = {"asked": said_plan(plan, prices), "answer": found}
    answers = [known[name] for name in EXAMPLES if name in known]
    made_by = "python -m heliosim_app.shipped"
    write_json(FILE, {"made_by": made_by, "version": __version__, "answers": answers, "plan": first})
    print(f"Written: {FILE.name}, {FILE.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
