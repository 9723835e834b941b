"""Rows about what HELIOS pays for adapting, and about perplexity."""

from __future__ import annotations

from heliosim.reproduction.opt_pair import device
from heliosim.reproduction.rows import Answer, Row, Runs, Value, samples, value_of
from heliosim.reproduction.shapes import architecture
from heliosim.reproduction.systems import ALONE_LARGE, ALONE_SMALL, ASSUMED, HELIOS, SIMULATED, THREE

LD_BEHIND, LD_LAYERS = 12, 4


def transitions(runs: Runs) -> Answer:
    """Reactions to breaches; loads of evaluations are counted apart."""
    profiling = [
        1e3 * load / count
        for load, count in zip(samples(runs, HELIOS, "load_s"), samples(runs, HELIOS, "evaluations"), strict=True)
    ]
    return Answer(
        (
            value_of("reactions (LD or SW)", samples(runs, HELIOS, "reactions")),
            value_of("transfers per evaluation, ms", profiling),
        ),
        beside=(
            value_of("exposed of all loads, ms a run", [1e3 * x for x in samples(runs, HELIOS, "exposed_load_s")]),
            value_of("loads of more layers (LD)", samples(runs, HELIOS, "reaction:load")),
            value_of("switches (SW)", samples(runs, HELIOS, "reaction:switch")),
            value_of("evaluations", samples(runs, HELIOS, "evaluations")),
            value_of("every change of placement", samples(runs, HELIOS, "transitions")),
            value_of("busy with probes per evaluation, ms", [1e3 * x for x in samples(runs, HELIOS, "probe_s")]),
            Value("copying the layers of OPT-6.7B beyond 9, nothing hidden, ms", _copy_ms("opt-6.7b", 23, "fp32")),
        ),
    )


def _copy_ms(model: str, layers: int, dtype: str) -> float:
    """Layers over the host link."""
    return 1e3 * layers * architecture(model).layer_bytes(dtype) / device().links.host_bytes_per_s


def ld_exposed(_: Runs) -> Answer:
    """Four more layers of Llama3-8B behind 12, composed: blocking, pipelined, and overlapped."""
    from heliosim.composing import model_facts
    from heliosim.exposed import deepening
    from heliosim.hardware.compose import compose_model

    facts = model_facts(compose_model(architecture("llama3-8b"), device(), dtype="fp16"), 0)
    spec, cost, loads = facts.spec("llama3-8b"), facts.step["wall"].cost(), facts.load["wall"].seconds_per
    step = deepening(spec, cost, loads, LD_BEHIND, LD_BEHIND + LD_LAYERS, decode_rows=1, context=512)
    prompt = deepening(spec, cost, loads, LD_BEHIND, LD_BEHIND + LD_LAYERS, prompt_tokens=2048)
    return Answer(
        (Value("overlapped", 1e3 * step.overlapped_s),),
        beside=(
            Value("nothing hidden", 1e3 * step.blocking_s),
            Value("pipelined behind one decode step", 1e3 * step.pipelined_s),
            Value("pipelined behind a prompt of 2048 tokens", 1e3 * prompt.pipelined_s),
        ),
    )


def perplexity(runs: Runs) -> Answer:
    """From the models' own probabilities of the tokens they emitted."""
    small, large, ours = (samples(runs, x, "perplexity") for x in THREE)
    return Answer(
        (
            value_of("HELIOS less OPT-1.3B", [a - b for a, b in zip(ours, small, strict=True)]),
            value_of("OPT-6.7B / OPT-1.3B", [a / b for a, b in zip(large, small, strict=True)]),
        ),
        beside=(
            value_of("OPT-1.3B", small),
            value_of("OPT-6.7B", large),
            value_of("HELIOS", ours),
            *(
                value_of(f"{name}: agreement with the full model, %", [100 * v for v in samples(runs, x, "agreement")])
                for name, x in (("OPT-1.3B", ALONE_SMALL), ("OPT-6.7B", ALONE_LARGE), ("HELIOS", HELIOS))
            ),
        ),
    )


ROWS = (
    Row(
        "perplexity",
        "perplexity against OPT-1.3B",
        "calibrated",
        "",
        perplexity,
        inputs=(*SIMULATED, "live perplexity"),
        assumptions=ASSUMED,
        needs=THREE,
        why="a partial model emits its unsure tokens with the probability it had",
        remark=(
            "Live perplexities of the models alone (1.47, 1.49) are inputs of the exit spec. A partial model emits its "
            "unsure tokens with the probability it had, so its own perplexity is higher; the paper's +0.01 needs "
            "unsure "
            "tokens about as probable at layer 6 as at layer 24. The repository's 1.91 and 1.68 are of other texts: "
            "not modelled."
        ),
    ),
    Row(
        "transitions",
        "transitions in 1087 requests; profiling cost per evaluation",
        "calibrated",
        "",
        transitions,
        inputs=SIMULATED,
        assumptions=ASSUMED,
        needs=(HELIOS,),
        why="what counts, and what the 220 ms hold, is not described",
        remark=(
            "The paper does not say what counts as a transition, nor what its 220 ms per evaluation hold. Shown are "
            "the transfers of all loads over the number of evaluations; they run beside steps, so that of a run next "
            "to nothing is exposed. The probes themselves, ten requests on full models, keep the server busy far "
            "longer, and count as service."
        ),
    ),
    Row(
        "ld-exposed",
        "exposed part of loading 4 more layers of Llama3-8B behind 12",
        "calibrated",
        "ms",
        ld_exposed,
        inputs=("shapes",),
        assumptions=("host link", "overlapped loads"),
        why="ours hides the whole transfer; the paper does not say how much it hides",
        remark=(
            "While the placement that is there serves on, nothing need be exposed; a copy that blocks exposes all of "
            "it. The paper's 4 ms lie between and say that most was hidden, not how."
        ),
    ),
)
