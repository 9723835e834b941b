"""What of four more layers of Llama3-8B is exposed, with twelve there, on a composed A100-40GB."""

from __future__ import annotations

import pytest

from heliosim.composing import model_facts
from heliosim.exposed import deepening, hiding_prompt
from heliosim.formats.profile import ModelFacts
from heliosim.hardware.architecture import open_architecture
from heliosim.hardware.compose import Exits, compose_model
from heliosim.hardware.device import open_device

PAPER_S = 0.004


@pytest.fixture(scope="module")
def facts() -> ModelFacts:
    exits = Exits((8, 12, 16, 24))
    model = compose_model(open_architecture("llama3-8b"), open_device("A100-40GB"), dtype="fp16", exits=exits)
    return model_facts(model, 36 * 10**9)


def test_the_transfer_is_bytes_over_the_link_and_blocking_exposes_it_whole(facts: ModelFacts) -> None:
    spec, cost, loads = facts.spec("llama3-8b"), facts.step["wall"].cost(), facts.load["wall"].seconds_per
    found = deepening(spec, cost, loads, 12, 16, decode_rows=1, context=512)
    heads = spec.weights_bytes(16) - spec.weights_bytes(12)
    assert found.transfer_s == pytest.approx(heads * loads["weights_byte"])
    assert found.blocking_s == pytest.approx(found.transfer_s + loads["load"])
    assert found.overlapped_s == loads["load"]


def test_the_reported_exposure_lies_between_the_two_ways_of_hiding(facts: ModelFacts) -> None:
    """One decode step hides next to nothing of it; a long prompt read on the twelve layers hides all but 4 ms."""
    spec, cost, loads = facts.spec("llama3-8b"), facts.step["wall"].cost(), facts.load["wall"].seconds_per
    decoding = deepening(spec, cost, loads, 12, 16, decode_rows=1, context=512)
    assert decoding.overlapped_s < PAPER_S < decoding.pipelined_s < decoding.blocking_s
    tokens = hiding_prompt(spec, cost, loads, 12, 16, PAPER_S)
    assert tokens is not None
    assert 1_000 < tokens < 4_000
    reading = deepening(spec, cost, loads, 12, 16, prompt_tokens=tokens)
    assert reading.pipelined_s <= PAPER_S < deepening(spec, cost, loads, 12, 16, prompt_tokens=tokens - 1).pipelined_s
    assert hiding_prompt(spec, cost, loads, 0, 32, 0.0) is None or reading.step_s > 0


def test_more_layers_there_hide_more(facts: ModelFacts) -> None:
    spec, cost, loads = facts.spec("llama3-8b"), facts.step["wall"].cost(), facts.load["wall"].seconds_per
    found = [
        deepening(spec, cost, loads, present, present + 4, prompt_tokens=1024).pipelined_s
        for present in (8, 12, 16, 24)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]
