"""Make the sample traces of this folder: ``python traces/prepare.py [FOLDER]``. The same seed gives the same files.

Lengths are made up: chat has short prompts and medium answers, code long prompts and long answers. They are sized for
the small shipped models (prompt and output together stay below 512 tokens).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from heliosim.arrivals import ArrivalProcess, Gamma, Poisson
from heliosim.formats.trace import TraceRow, save_trace
from heliosim.lengths import Lognormal
from heliosim.streams import stream
from heliosim.synth import drawn_trace
from heliosim.types import Seconds, tick
from heliosim.workload import TaskSpec, WorkloadSpec

SEED = 2025
CHAT = TaskSpec(
    task="chat",
    prompt_tokens=Lognormal(mean=60, cv=0.7, low=8, high=256),
    output_tokens=Lognormal(mean=60, cv=0.6, low=4, high=160),
    max_tokens=192,
)
CODE = TaskSpec(
    task="code",
    prompt_tokens=Lognormal(mean=120, cv=0.5, low=16, high=256),
    output_tokens=Lognormal(mean=90, cv=0.5, low=8, high=192),
    max_tokens=192,
)


def mix(arrivals: ArrivalProcess, chat_share: float, requests: int) -> list[TraceRow]:
    """Chat and code in random order."""
    tasks = tuple(
        task.model_copy(update={"share": share}) for task, share in ((CHAT, chat_share), (CODE, 1 - chat_share))
    )
    return drawn_trace(WorkloadSpec(requests=requests, arrivals=arrivals, tasks=tasks, order="mix"), SEED)


def shift(arrivals: ArrivalProcess, each: int) -> list[TraceRow]:
    """The task changes in the middle: first all chat, then all code."""
    tasks = tuple(task.model_copy(update={"count": each}) for task in (CHAT, CODE))
    return drawn_trace(WorkloadSpec(arrivals=arrivals, tasks=tasks, order="blocks"), SEED)


def day(requests: int, duration_s: Seconds) -> list[TraceRow]:
    """A day in ``duration_s`` seconds: a quiet night, a peak before noon, a lower one in the evening.

    Poisson arrivals of rate 1 are moved to where the running total of the day's rate reaches them.
    """
    hours = np.linspace(0, 24, 24 * 60 + 1)
    rate = 0.15 + np.exp(-(((hours - 11) / 2.5) ** 2)) + 0.7 * np.exp(-(((hours - 19.5) / 2.0) ** 2))
    total = np.concatenate([[0.0], np.cumsum((rate[1:] + rate[:-1]) / 2)])
    gaps = stream(SEED, "day").exponential(1.0, requests + 1)
    places = np.cumsum(gaps)[:-1] / gaps.sum() * total[-1]  # one gap more, so the day goes on after the last
    times = np.interp(places, total, hours / 24 * duration_s)
    rows = mix(Poisson(rate_per_s=1), 0.7, requests)
    return [replace(row, arrival_s=tick(float(time))) for row, time in zip(rows, times, strict=True)]


def main(folder: Path) -> None:
    """Write all samples into ``folder``."""
    samples = {
        "poisson_chat_code.jsonl": mix(Poisson(rate_per_s=4), 0.6, 400),
        "bursty_chat_code.jsonl": mix(Gamma(rate_per_s=4, cv=3), 0.6, 400),
        "shift_chat_to_code.jsonl": shift(Poisson(rate_per_s=4), 200),
        "day_chat_code.jsonl": day(600, 24 * 60),
    }
    for name, rows in samples.items():
        save_trace(rows, folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
