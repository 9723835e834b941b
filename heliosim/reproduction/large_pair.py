"""Row about the large pair: CodeLlama-34B and Llama2-70B on ShareGPT-like lengths against vanilla decoding."""

from __future__ import annotations

from heliosim.reproduction.rows import Answer, Experiment, Row, Runs, Value, samples, value_of
from heliosim.reproduction.settings import LARGE

USERS = (1, 256)
"""One user is the paper's batch of its throughput runs; 256 are as many as memory serves at once."""
MODELS = (("small", "CodeLlama-34B"), ("large", "Llama2-70B"))


def of(system: str, users: int) -> Experiment:
    return Experiment(LARGE, system, (("users", users),))


def gains(runs: Runs) -> Answer:
    """Output tokens per second over those of vanilla decoding, one model or the other, replication by replication."""
    values: list[Value] = []
    beside: list[Value] = []
    for users in USERS:
        where = f"batch up to {users}"

        def rate(system: str, users: int = users) -> list[float]:
            return samples(runs, of(system, users), "output_throughput")

        for short, model in MODELS:
            for name, system in ((f"early exit {model}", f"early exit {short}"), ("HELIOS", "HELIOS")):
                ratio = [a / b for a, b in zip(rate(system), rate(f"vanilla {short}"), strict=True)]
                values.append(value_of(f"{name} / vanilla {model}, {where}", ratio))
        beside += [
            value_of(f"{system}, {where}: {word}", samples(runs, of(system, users), metric))
            for system in SYSTEMS
            for word, metric in (("tokens/s", "output_throughput"), ("rows, mean", "mean_batch_size"))
        ]
        beside += [
            value_of(f"HELIOS, {where}: {word}", samples(runs, of("HELIOS", users), metric))
            for word, metric in (
                ("seconds a run", "duration"),
                ("evaluations", "evaluations"),
                ("seconds of probes per evaluation", "probe_s"),
                ("seconds of exposed loads", "exposed_load_s"),
                ("agreement with the full model", "agreement"),
            )
        ]
    return Answer(tuple(values), beside=tuple(beside))


SYSTEMS = ("vanilla small", "vanilla large", "early exit small", "early exit large", "HELIOS")

ROWS = (
    Row(
        "large-pair",
        "large pair on ShareGPT against vanilla decoding: early exit and HELIOS",
        "calibrated",
        "x",
        gains,
        inputs=("shapes", "tensor parallel degrees", "helios depth of the large pair"),
        assumptions=("composed large pair", "sharegpt lengths", "agreement by depth", "usable memory", "threshold"),
        needs=tuple(of(system, users) for users in USERS for system in SYSTEMS),
        remark=(
            "The paper names neither batch nor reference, so both references and both ends of the batch are shown. At "
            "batch 1 the exits decide; they are assumed, no table of this pair is published. In large batches a step "
            "of early exit lasts as long as its deepest token, and HELIOS pays for evaluations: five requests on each "
            "full model, in turn, while all others wait. That takes a large part of so short a run."
        ),
        why="exits of this pair are assumed; in large batches evaluations stop everybody else",
    ),
)
