import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heliosim.streams import stream

names = st.lists(st.one_of(st.text(max_size=8), st.integers(-5, 5)), max_size=4)


def first(seed: int, *path: str | int) -> int:
    return int(stream(seed, *path).integers(2**62))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**70), names, names)
def test_equal_names_and_only_they_give_equal_numbers(seed: int, one: list[str | int], other: list[str | int]) -> None:
    assert first(seed, *one) == first(seed, *one)
    assert (first(seed, *one) == first(seed, *other)) == (one == other)


def test_names_do_not_run_into_each_other() -> None:
    paths = [(), ("",), ("ab", "c"), ("a", "bc"), ("abc",), ("1",), (1,), (11,), (1, 1), ("i1:1",), ("arrivals", 1)]
    assert len({first(7, *path) for path in paths}) == len(paths)


def test_seeds_differ_whatever_their_size() -> None:
    seeds = [0, 1, 2**32, 2**32 + 1, 2**64, 2**64 + 1]
    assert len({first(seed, "x") for seed in seeds}) == len(seeds)


def test_streams_look_independent() -> None:
    one, other = stream(3, "arrivals").random(20_000), stream(3, "lengths").random(20_000)
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.03


def test_another_process_draws_the_same() -> None:
    """Unlike hash(), which Python salts anew in every process."""
    code = "from heliosim.streams import stream; print(int(stream(5, 'exits', 3).integers(2**62)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(printed) == first(5, "exits", 3)


@pytest.mark.parametrize("seed", [-1, 1.5, True, "1"])
def test_bad_seed_is_named(seed: object) -> None:
    with pytest.raises(ValueError, match="seed must be an integer >= 0"):
        stream(seed)  # type: ignore[arg-type]


def test_bad_name_is_named() -> None:
    with pytest.raises(ValueError, match=r"1\.5"):
        stream(1, 1.5)  # type: ignore[arg-type]
