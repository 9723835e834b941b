"""Freed memory stays with the process."""

from __future__ import annotations

import ctypes

import pytest

from heliosim.engines.allocator import keep_freed_memory


def test_glibc_takes_the_request() -> None:
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        assert keep_freed_memory() is False
        return
    assert keep_freed_memory() is True


@pytest.mark.parametrize("error", [OSError, TypeError])
def test_elsewhere_nothing_happens(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_name: object) -> object:
        raise error("no such library")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert keep_freed_memory() is False
