import math
from collections import Counter
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heliosim.arrivals import ARRIVALS, Gaps, register_arrivals
from heliosim.errors import HelioSimError, InputError, UnknownNameError
from heliosim.formats.files import validate
from heliosim.formats.trace import TraceRow, save_trace
from heliosim.lengths import Empirical, Fixed, LengthDistribution, Lognormal, Uniform
from heliosim.synth import TextTask, drawn_trace, find_tokenizer, text_trace
from heliosim.types import TICK, Arrival, Content, tick
from heliosim.workload import Body, ClosedLoop, OpenLoop, Source, WorkloadSpec, build, build_arrivals, contents

ROOT = Path(__file__).parents[2]
CHAT = {"task": "chat", "prompt_tokens": {"kind": "uniform", "low": 10, "high": 90}, "output_tokens": 20}
CODE = {"task": "code", "prompt_tokens": 200, "output_tokens": {"kind": "lognormal", "mean": 50, "cv": 1, "high": 300}}
POISSON = {"kind": "poisson", "rate_per_s": 4}


def spec(**fields: Any) -> WorkloadSpec:
    return validate(WorkloadSpec, fields, "workload")


def chat(requests: int = 10, **fields: Any) -> WorkloadSpec:
    return spec(**{"requests": requests, "arrivals": POISSON, "tasks": [CHAT], **fields})


def times(arrivals: list[Arrival]) -> list[float]:
    return [arrival.request.arrival_s for arrival in arrivals]


def bodies(arrivals: list[Arrival]) -> list[tuple[int, int, Content]]:
    return [(a.request.prompt_tokens, a.request.max_tokens, a.content) for a in arrivals]


def trace_file(folder: Path, rows: list[TraceRow]) -> str:
    save_trace(rows, folder / "trace.jsonl")
    return str(folder / "trace.jsonl")


# --- arrivals -----------------------------------------------------------------------------------------------

processes = st.one_of(
    st.fixed_dictionaries({"kind": st.just("poisson"), "rate_per_s": st.floats(1e-3, 1e4)}),
    st.fixed_dictionaries({"kind": st.just("constant"), "rate_per_s": st.floats(1e-3, 1e4)}),
    st.fixed_dictionaries({"kind": st.just("gamma"), "rate_per_s": st.floats(1e-2, 1e4), "cv": st.floats(0.01, 10)}),
)


@settings(max_examples=60, deadline=None)
@given(processes, st.integers(0, 2**40), st.integers(1, 60))
def test_arrivals_are_sorted_on_ticks_and_numbered(process: dict[str, Any], seed: int, count: int) -> None:
    arrivals = build_arrivals(chat(count, arrivals=process), seed)
    at = times(arrivals)
    assert at == sorted(at)
    assert all(t >= 0 and t == tick(t) and (t / TICK).is_integer() for t in at)
    assert [a.request.id for a in arrivals] == list(range(count))
    assert arrivals == build_arrivals(chat(count, arrivals=process), seed)
    # a longer workload begins with the shorter one
    assert build_arrivals(chat(count + 7, arrivals=process), seed)[:count] == arrivals


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("process", "cv"),
    [
        (POISSON, 1.0),
        ({"kind": "gamma", "rate_per_s": 4, "cv": 0.25}, 0.25),
        ({"kind": "gamma", "rate_per_s": 4, "cv": 3}, 3.0),
        ({"kind": "constant", "rate_per_s": 4}, 0.0),
    ],
)
def test_rate_and_burstiness(process: dict[str, Any], cv: float, seed: int) -> None:
    count = 20_000
    gaps = np.diff([0.0, *times(build_arrivals(chat(count, arrivals=process), seed))])
    standard_error = 0.25 * cv / math.sqrt(count)
    assert mean(gaps) == pytest.approx(0.25, abs=4 * standard_error + 1e-9)
    # the CV of a heavy-tailed sample is itself uncertain: its relative error grows with cv
    assert stdev(gaps) / mean(gaps) == pytest.approx(cv, abs=1e-6 + 4 * cv * max(1.0, cv) / math.sqrt(count))


def test_constant_arrivals_do_not_drift() -> None:
    at = times(build_arrivals(chat(3000, arrivals={"kind": "constant", "rate_per_s": 3}), 0))
    assert at == [tick(k / 3) for k in range(1, 3001)]


def test_the_same_draws_serve_every_rate() -> None:
    slow, fast = (times(build_arrivals(chat(50, arrivals={**POISSON, "rate_per_s": r}), 1)) for r in (1, 2))
    assert fast == pytest.approx([t / 2 for t in slow], abs=50 * TICK)


def test_too_slow_for_exact_times_is_said() -> None:
    with pytest.raises(InputError, match=r"arrivals.rate_per_s: too slow for 10 requests"):
        build(chat(10, arrivals={"kind": "poisson", "rate_per_s": 1e-9}), 0)


def test_an_arrival_process_can_be_added() -> None:
    @register_arrivals
    class Pairs(Gaps):
        kind: str = "pairs"

        def gaps(self, count: int, rng: np.random.Generator) -> Any:
            return np.array([2 / self.rate_per_s if k % 2 == 0 else 0.0 for k in range(count)])

    try:
        made = chat(4, arrivals={"kind": "pairs", "rate_per_s": 1})
        assert times(build_arrivals(made, 0)) == [2, 2, 4, 4]
        assert spec(**made.model_dump(mode="json")) == made
    finally:
        del ARRIVALS["pairs"]


# --- bodies -------------------------------------------------------------------------------------------------


def test_body_depends_on_seed_and_place_alone() -> None:
    """Neither the arrival process, nor the number of requests, nor another task's lengths move a request's body."""
    mix = {"tasks": [{**CHAT, "share": 3}, {**CODE, "share": 1}], "order": "mix"}
    reference = bodies(build_arrivals(chat(60, **mix), 5))
    for arrivals in ({"kind": "constant", "rate_per_s": 9}, {"kind": "gamma", "rate_per_s": 1, "cv": 2}):
        assert bodies(build_arrivals(chat(60, arrivals=arrivals, **mix), 5)) == reference
    assert bodies(build_arrivals(chat(90, **mix), 5))[:60] == reference
    assert bodies(build_arrivals(chat(60, **mix), 6)) != reference
    closed = build(chat(60, arrivals={"kind": "closed", "users": 60}, **mix), 5)
    assert bodies(closed.take(0.0)) == reference
    shorter = {"tasks": [{**CHAT, "share": 3}, {**CODE, "share": 1, "prompt_tokens": 8}], "order": "mix"}
    changed = bodies(build_arrivals(chat(60, **shorter), 5))
    assert [b for b in changed if b[2].task == "chat"] == [b for b in reference if b[2].task == "chat"]
    assert [b[2] for b in changed] == [b[2] for b in reference]
    assert times(build_arrivals(chat(60, **shorter), 5)) == times(build_arrivals(chat(60, **mix), 5))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 99))
def test_blocks_are_consecutive_and_counted(counts: list[int], seed: int) -> None:
    tasks = [{**CHAT, "task": f"t{i}", "count": n} for i, n in enumerate(counts)]
    found = [a.content.task for a in build_arrivals(spec(arrivals=POISSON, tasks=tasks, order="blocks"), seed)]
    assert found == [f"t{i}" for i, n in enumerate(counts) for _ in range(n)]
    mixed = [a.content.task for a in build_arrivals(spec(arrivals=POISSON, tasks=tasks, order="mix"), seed)]
    assert Counter(mixed) == Counter(found)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.integers(1, 200))
def test_blocks_of_shares_are_within_one_of_their_share(shares: list[float], requests: int) -> None:
    tasks = [{**CHAT, "task": f"t{i}", "share": share} for i, share in enumerate(shares)]
    found = [a.content.task for a in build_arrivals(chat(requests, tasks=tasks, order="blocks"), 0)]
    assert found == sorted(found)
    for i, share in enumerate(shares):
        assert abs(found.count(f"t{i}") - requests * share / sum(shares)) < 1 + 1e-9


def test_mix_follows_the_shares() -> None:
    tasks = [{**CHAT, "share": 3}, {**CODE, "share": 1}]
    found = Counter(a.content.task for a in build_arrivals(chat(8000, tasks=tasks, order="mix"), 2))
    assert found["code"] == pytest.approx(2000, abs=4 * math.sqrt(8000 * 0.25 * 0.75))


distributions = st.one_of(
    st.integers(1, 10_000).map(lambda n: Fixed(tokens=n)),
    st.tuples(st.integers(1, 500), st.integers(0, 5000)).map(lambda t: Uniform(low=t[0], high=t[0] + t[1])),
    st.tuples(st.floats(5, 500), st.floats(0.1, 3), st.integers(0, 3000)).map(
        lambda t: Lognormal(mean=t[0], cv=t[1], low=2, high=max(10, int(t[0])) + t[2])
    ),
    st.lists(st.integers(1, 999), min_size=1, max_size=6).map(lambda v: Empirical(values=tuple(v))),
)


@settings(max_examples=80, deadline=None)
@given(distributions, st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
def test_lengths_rise_with_the_quantile_and_stay_in_range(dist: LengthDistribution, one: float, other: float) -> None:
    low, high = dist.draw(min(one, other)), dist.draw(max(one, other))
    assert min(low, high) >= 1
    assert max(low, high) <= dist.largest
    if not isinstance(dist, Empirical):
        assert low <= high
        assert dist.draw(1 - 2**-53) == dist.largest or isinstance(dist, Lognormal)


def test_length_distributions_have_their_moments() -> None:
    u = np.random.default_rng(0).random(20_000)
    uniform = [Uniform(low=1, high=6).draw(x) for x in u]
    assert all(3100 < n < 3570 for n in Counter(uniform).values())
    lognormal = [Lognormal(mean=200, cv=0.8, high=100_000).draw(x) for x in u]
    assert mean(lognormal) == pytest.approx(200, rel=0.03)
    assert stdev(lognormal) / mean(lognormal) == pytest.approx(0.8, rel=0.06)
    cut = [Lognormal(mean=200, cv=0.8, low=100, high=150).draw(x) for x in u]
    assert (min(cut), max(cut)) == (100, 150)
    assert max(Counter(cut).values()) < 800  # nothing piles up at the ends
    weighted = [Empirical(values=(5, 7, 9), weights=(1, 0, 3)).draw(x) for x in u]
    assert weighted.count(7) == 0
    assert weighted.count(9) == pytest.approx(15_000, abs=300)


def test_limit_says_nothing_of_a_requests_own_length() -> None:
    arrivals = build_arrivals(chat(200, tasks=[CODE]), 0)
    assert {a.request.max_tokens for a in arrivals} == {300}
    assert len({a.content.output_tokens for a in arrivals}) > 30
    limited = build_arrivals(chat(200, tasks=[{**CODE, "max_tokens": 400}]), 0)
    assert {a.request.max_tokens for a in limited} == {400}


def test_natural_lengths_are_the_models() -> None:
    task = {"task": "chat", "prompt_tokens": 10, "max_tokens": 64}
    arrivals = build_arrivals(chat(3, tasks=[task], lengths="natural"), 0)
    assert {(a.content.output_tokens, a.request.max_tokens) for a in arrivals} == {(None, 64)}


# --- traces -------------------------------------------------------------------------------------------------

ROWS = [
    TraceRow(0.5, 10, 20, max_tokens=50, task="chat"),
    TraceRow(1.0, 2, 30, task="code", prompt_ids=(7, 8)),
    TraceRow(3.0, 12, 40, task="chat"),
]


def test_trace_is_replayed(tmp_path: Path) -> None:
    path = trace_file(tmp_path, ROWS)
    arrivals = build_arrivals(spec(trace=path), 3)
    assert times(arrivals) == [0.5, 1.0, 3.0]
    assert bodies(arrivals) == [
        (10, 50, Content("chat", None, 20)),
        (2, 40, Content("code", (7, 8), 30)),
        (12, 40, Content("chat", None, 40)),
    ]
    fast = spec(trace=path, requests=2, arrivals={"kind": "replay", "speed": 2})
    assert times(build_arrivals(fast, 3)) == [0.25, 0.5]
    # fewer requests leave the others as they were
    assert bodies(build_arrivals(fast, 3)) == bodies(arrivals)[:2]


def test_trace_with_other_arrivals_lengths_and_limits(tmp_path: Path) -> None:
    path = trace_file(tmp_path, ROWS)
    drawn = build_arrivals(spec(trace=path, arrivals=POISSON, max_tokens=64, lengths="natural"), 3)
    assert times(drawn) == times(build_arrivals(chat(3), 3))
    assert bodies(drawn) == [
        (10, 50, Content("chat", None, None)),
        (2, 64, Content("code", (7, 8), None)),
        (12, 64, Content("chat", None, None)),
    ]
    closed = build(spec(trace=path, arrivals={"kind": "closed", "users": 2, "think_s": 1}), 3)
    assert [a.request.prompt_tokens for a in closed.take(0.0)] == [10, 2]


def test_nameless_trace_is_given_tasks(tmp_path: Path) -> None:
    nameless = [TraceRow(float(k), 5, 5) for k in range(4)]
    path = trace_file(tmp_path, nameless)
    tasks = [{"task": "chat", "share": 1}, {"task": "code", "share": 1}]
    arrivals = build_arrivals(spec(trace=path, tasks=tasks, order="blocks"), 0)
    assert [a.content.task for a in arrivals] == ["chat", "chat", "code", "code"]
    assert times(arrivals) == [0, 1, 2, 3]
    with pytest.raises(InputError, match=r"task: the trace names its tasks \(value: 'chat'\)"):
        build(spec(trace=trace_file(tmp_path, ROWS), tasks=tasks, order="blocks"), 0)


@pytest.mark.parametrize(
    ("rows", "fields", "part"),
    [
        (ROWS, {"requests": 4}, "requests: the trace has only 3 requests (value: 4)"),
        (ROWS, {"max_tokens": 10}, "request 2, output_length: more than the workload's max_tokens 10 (value: 30)"),
        ([TraceRow(0.0, 1, None, 5)], {}, "request 1, output_length: unknown length"),
        (ROWS, {"arrivals": {"kind": "replay", "speed": 1e-9}}, "arrivals.speed: too slow"),
    ],
)
def test_trace_that_cannot_be_used(tmp_path: Path, rows: list[TraceRow], fields: dict[str, Any], part: str) -> None:
    with pytest.raises(InputError) as caught:
        build(spec(trace=trace_file(tmp_path, rows), **fields), 0)
    assert part in str(caught.value)


def test_trace_without_times_needs_arrivals(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text("input_length,output_length\n3,4\n5,6\n")
    with pytest.raises(InputError, match="the trace has no arrival times"):
        build(spec(trace=str(path)), 0)
    assert bodies(build_arrivals(spec(trace=str(path), arrivals=POISSON), 0)) == [
        (3, 6, Content("", None, 4)),
        (5, 6, Content("", None, 6)),
    ]


def test_missing_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.jsonl: no such file"):
        build(spec(trace=str(tmp_path / "none.jsonl")), 0)


def test_drawn_trace_is_the_workload(tmp_path: Path) -> None:
    made = chat(30, tasks=[{**CHAT, "share": 1}, {**CODE, "share": 1}], order="mix")
    path = trace_file(tmp_path, drawn_trace(made, 9))
    assert build_arrivals(spec(trace=path), 0) == build_arrivals(made, 9)


# --- specification ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        (
            {"arrivals": {"kind": "poison", "rate_per_s": 1}},
            "arrivals, field kind: unknown name (value: 'poison'). Did",
        ),
        ({"arrivals": {"rate_per_s": 1}}, "arrivals, field kind: missing field"),
        ({"arrivals": {"kind": ["poisson"]}}, "arrivals, field kind: unknown name"),
        ({"arrivals": "poisson"}, "field arrivals"),
        ({"arrivals": {"kind": "poisson", "rate": 1}}, "arrivals poisson, field"),
        ({"arrivals": {"kind": "poisson", "rate_per_s": 1, "cv": 2}}, "field cv: unknown field (value: 2)"),
        ({"arrivals": {"kind": "poisson", "rate_per_s": 0}}, "field rate_per_s: Input should be greater than 0"),
        ({"arrivals": {"kind": "poisson", "rate_per_s": math.nan}}, "field rate_per_s"),
        ({"arrivals": {"kind": "poisson", "rate_per_s": math.inf}}, "field rate_per_s"),
        ({"arrivals": {"kind": "gamma", "rate_per_s": 1}}, "field cv: missing field"),
        ({"arrivals": {"kind": "gamma", "rate_per_s": 1, "cv": -1}}, "field cv"),
        ({"arrivals": {"kind": "closed", "users": 0}}, "field users"),
        ({"arrivals": {"kind": "closed", "users": 1, "think_s": -1}}, "field think_s"),
        ({"arrivals": {"kind": "replay"}}, "replay needs a trace"),
        ({"arrivals": None}, "arrivals: give a process; known: closed, constant, gamma, poisson, replay"),
        ({"requests": 0}, "field requests"),
        ({"requests": None}, "requests: give a number, or each task a count"),
        ({"tasks": []}, "give tasks or a trace"),
        ({"task": [CHAT]}, "Did you mean 'task"),
        ({"tasks": [CHAT, CODE]}, "order: say blocks or mix"),
        ({"tasks": [], "trace": "x", "order": "mix"}, "order: there are no tasks"),
        ({"tasks": [{**CHAT, "share": 0}]}, "share"),
        ({"tasks": [{**CHAT, "share": 1, "count": 1}]}, "give share or count, not both"),
        ({"tasks": [{**CHAT, "count": 3}, CODE], "order": "mix"}, "give all a count or none"),
        ({"tasks": [{**CHAT, "count": 3}]}, "requests (10) is not the sum of the tasks' counts (3)"),
        ({"tasks": [{**CHAT, "max_tokens": 19}]}, "max_tokens (19) is less than the largest of output_tokens (20)"),
        ({"tasks": [{"task": "a", "output_tokens": 1}]}, "task 'a': prompt_tokens is missing"),
        ({"tasks": [{"task": "a", "prompt_tokens": 1}]}, "task 'a': output_tokens is missing"),
        ({"lengths": "natural"}, "natural lengths need max_tokens and no output_tokens"),
        ({"lengths": "forces"}, "lengths"),
        ({"max_tokens": 5}, "max_tokens: is for a trace"),
        ({"trace": "x"}, "lengths come from the trace"),
        ({"tasks": [{**CHAT, "prompt_tokens": 0}]}, "greater than or equal to 1"),
        ({"tasks": [{**CHAT, "prompt_tokens": 2.5}]}, "prompt_tokens"),
        ({"tasks": [{**CHAT, "prompt_tokens": {"kind": "unifrm", "low": 1, "high": 2}}]}, "prompt_tokens"),
        ({"tasks": [{**CHAT, "prompt_tokens": {"kind": "uniform", "low": 3, "high": 2}}]}, "low (3) must not exceed"),
        ({"tasks": [{**CHAT, "prompt_tokens": {"kind": "fixed", "tokens": 3, "x": 1}}]}, "unknown field"),
        (
            {"tasks": [{**CHAT, "prompt_tokens": {"kind": "lognormal", "mean": 1e6, "cv": 0.1, "high": 9}}]},
            "cuts off all of the distribution",
        ),
        ({"tasks": [{**CHAT, "prompt_tokens": {"kind": "empirical", "values": []}}]}, "values"),
        ({"tasks": [{**CHAT, "prompt_tokens": {"kind": "empirical", "values": [0]}}]}, "values"),
        ({"tasks": [{**CHAT, "prompt_tokens": {"kind": "empirical", "values": [1], "weights": [0]}}]}, "sum > 0"),
        ({"tasks": [{**CHAT, "prompt_tokens": {"kind": "empirical", "values": [1], "weights": [1, 2]}}]}, "2 weights"),
    ],
)
def test_bad_specification_is_named(fields: dict[str, Any], part: str) -> None:
    with pytest.raises(HelioSimError) as caught:
        chat(**{"requests": 10, **fields})
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_specification_survives_a_file_and_can_be_hashed() -> None:
    made = chat(
        tasks=[{**CHAT, "share": 2}, {**CODE, "share": 1}], order="mix", arrivals={**POISSON, "rate_per_s": 2.5}
    )
    again = spec(**made.model_dump(mode="json"))
    assert again == made
    assert hash(again) == hash(made)
    build(made, 0)  # what it computes on the way must not change it
    assert again == made
    assert made.model_dump(mode="json")["arrivals"] == {"kind": "poisson", "rate_per_s": 2.5}
    with pytest.raises(ValueError, match="frozen"):
        made.requests = 3


def test_contents_are_known_without_times() -> None:
    closed = chat(arrivals={"kind": "closed", "users": 2})
    assert contents(closed, 4) == {a.request.id: a.content for a in build_arrivals(chat(), 4)}


def test_closed_loop_has_no_list_of_arrivals() -> None:
    with pytest.raises(InputError, match="a closed loop has no arrival times"):
        build_arrivals(chat(arrivals={"kind": "closed", "users": 2}), 0)


# --- sources ------------------------------------------------------------------------------------------------


def body(tokens: int = 1) -> Body:
    return Body(tokens, 10, Content("chat", None, 5))


def test_open_loop() -> None:
    source: Source = OpenLoop([body().at(k, t) for k, t in enumerate((1.0, 2.0, 2.0, 5.0))])
    assert (source.next_s, source.is_exhausted) == (1.0, False)
    assert source.take(0.5) == []
    assert [a.request.id for a in source.take(2.0)] == [0, 1, 2]
    source.finished(0, 3.0)
    assert (source.next_s, source.is_exhausted) == (5.0, False)
    assert [a.request.id for a in source.take(9.0)] == [3]
    assert (source.next_s, source.is_exhausted, source.take(9.0)) == (None, True, [])
    with pytest.raises(ValueError, match="request 1 is too early"):
        OpenLoop([body().at(0, 2.0), body().at(1, 1.0)])


def test_closed_loop() -> None:
    source: Source = ClosedLoop([body(k + 1) for k in range(5)], users=2, think_s=0.5)
    assert (source.next_s, source.is_exhausted) == (0.0, False)
    first = source.take(0.0)
    assert [(a.request.id, a.request.prompt_tokens, a.request.arrival_s) for a in first] == [(0, 1, 0.0), (1, 2, 0.0)]
    assert (source.next_s, source.is_exhausted) == (None, False)
    source.finished(1, 2.0)
    assert (source.next_s, source.take(2.4)) == (2.5, [])
    source.finished(0, 2.0)
    assert [(a.request.id, a.request.arrival_s) for a in source.take(3.0)] == [(2, 2.5), (3, 2.5)]
    source.finished(3, 3.0)
    source.finished(2, 4.0)  # nothing is left for this user
    assert [(a.request.id, a.request.arrival_s) for a in source.take(9.0)] == [(4, 3.5)]
    assert (source.next_s, source.is_exhausted) == (None, True)
    source.finished(4, 10.0)
    with pytest.raises(ValueError, match="request 4 is not in flight"):
        source.finished(4, 10.0)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(1, 6), st.floats(0, 2), st.randoms(use_true_random=False))
def test_closed_loop_keeps_its_users(count: int, users: int, think_s: float, random: Any) -> None:
    source = ClosedLoop([body()] * count, users, think_s)
    now, seen = 0.0, 0
    running: list[Arrival] = []
    while not source.is_exhausted or running:
        due = source.take(now)
        assert all(a.request.arrival_s <= now and a.request.arrival_s == tick(a.request.arrival_s) for a in due)
        assert [a.request.id for a in due] == list(range(seen, seen + len(due)))
        seen += len(due)
        running += due
        assert len(running) <= users
        if running:
            now = tick(now + 0.1)
            source.finished(running.pop(random.randrange(len(running))).request.id, now)
        else:
            assert source.next_s is not None
            now = source.next_s
    assert seen == count


@pytest.mark.parametrize(("users", "think_s"), [(0, 1.0), (1, -1.0), (1, math.nan)])
def test_bad_closed_loop(users: int, think_s: float) -> None:
    with pytest.raises(ValueError, match="users >= 1"):
        ClosedLoop([body()], users, think_s)


# --- text ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    """A tokenizer that knows two words: enough to see what goes in."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<s>": 0, "<unk>": 1, "User": 2, ":": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def text(tokenizer_file: Path, order: Any = "blocks", seed: int = 1) -> list[TraceRow]:
    process = ARRIVALS["poisson"](kind="poisson", rate_per_s=4)  # type: ignore[call-arg]
    assert isinstance(process, Gaps)
    tasks = [TextTask("chat", 5, (4, 9)), TextTask("arithmetic", 3, (10, 10))]
    return text_trace(tasks, order=order, arrivals=process, seed=seed, tokenizer_file=tokenizer_file)


def test_text_trace(tokenizer_file: Path, tmp_path: Path) -> None:
    rows = text(tokenizer_file)
    assert [row.task for row in rows] == ["chat"] * 5 + ["arithmetic"] * 3
    assert all(row.prompt_ids is not None and len(row.prompt_ids) == row.prompt_tokens for row in rows)
    assert all(4 <= (row.output_tokens or 0) <= 9 == row.max_tokens for row in rows[:5])
    assert {(row.output_tokens, row.max_tokens) for row in rows[5:]} == {(10, 10)}
    assert rows[0].prompt_ids is not None
    assert rows[0].prompt_ids[:2] == (2, 3)
    assert rows == text(tokenizer_file)
    assert rows != text(tokenizer_file, seed=2)
    save_trace(rows, tmp_path / "t.jsonl")
    arrivals = build_arrivals(spec(trace=str(tmp_path / "t.jsonl")), 0)
    assert [a.content.prompt_ids for a in arrivals] == [row.prompt_ids for row in rows]
    # another order moves requests, not what the k-th request of a family asks
    mixed = text(tokenizer_file, "mix")
    assert [r.prompt_ids for r in mixed if r.task == "chat"] == [r.prompt_ids for r in rows if r.task == "chat"]


def test_prompts_begin_as_the_model_was_trained(tokenizer_file: Path) -> None:
    plain = [row.prompt_ids for row in text(tokenizer_file)]
    config = tokenizer_file.with_name("tokenizer_config.json")
    config.write_text('{"bos_token": "<s>"}')
    assert [row.prompt_ids for row in text(tokenizer_file)] == [(0, *(ids or ())) for ids in plain]
    config.write_text('{"bos_token": "<s>", "add_bos_token": false}')
    assert [row.prompt_ids for row in text(tokenizer_file)] == plain
    config.write_text('{"bos_token": "<nowhere>"}')
    with pytest.raises(InputError, match="bos_token: not in the vocabulary"):
        text(tokenizer_file)


@pytest.mark.parametrize(
    ("tasks", "part"),
    [
        ([], "no task"),
        ([TextTask("chatt", 1, (1, 2))], "Did you mean 'chat'"),
        ([TextTask("chat", 0, (1, 2))], "tasks.chat.count: less than 1"),
        ([TextTask("chat", 1, (3, 2))], "tasks.chat.output_tokens: not a range"),
        ([TextTask("chat", 1, (0, 2))], "tasks.chat.output_tokens: not a range"),
    ],
)
def test_bad_text_tasks_are_named(tokenizer_file: Path, tasks: list[TextTask], part: str) -> None:
    process = ARRIVALS["constant"](kind="constant", rate_per_s=1)  # type: ignore[call-arg]
    assert isinstance(process, Gaps)
    with pytest.raises(InputError) as caught:
        text_trace(tasks, order="mix", arrivals=process, seed=0, tokenizer_file=tokenizer_file)
    assert part in str(caught.value)


def test_tokenizer_is_found_or_named(tokenizer_file: Path) -> None:
    assert find_tokenizer(str(tokenizer_file)) == tokenizer_file
    assert find_tokenizer(str(tokenizer_file.parent)) == tokenizer_file
    with pytest.raises(UnknownNameError, match=r"tokenizer .*'no-such-model'"):
        find_tokenizer("no-such-model")
    tokenizer_file.write_text("{}")
    with pytest.raises(InputError, match="cannot be read"):
        text(tokenizer_file)


def test_shipped_models_have_a_tokenizer() -> None:
    pytest.importorskip("tokenizers")
    shipped = ROOT / "heliosim" / "checkpoints"
    names = [path.parent.name for path in shipped.glob("[!.]*/exits.json")]
    for name in names:
        ids = text(find_tokenizer(name))[0].prompt_ids
        assert ids is not None
        assert ids[0] == 1  # <s>, as in training
