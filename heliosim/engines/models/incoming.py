"""Weights on their way to a device while something else goes on: a thread copies them, one piece after the other.

On a GPU the copies go through a stream of their own (not tested on one here). On a CPU the thread takes processor time
that steps could use, so a clock that counts processor time sees nothing hidden.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from heliosim.engines.models.host import Flat, HostModel

Piece = tuple[Literal["base", "layer", "head"], int]


class Incoming:
    """The layers of ``host`` behind ``present`` up to ``depth``, each exit's head behind its layer; the base first if
    nothing is present. ``done_at``: when the last piece was there, on ``time.perf_counter``; None: not yet.
    """

    def __init__(self, host: HostModel, present: int, depth: int, device: torch.device, dtype: torch.dtype) -> None:
        self.host, self.present, self.depth, self.device, self.dtype = host, present, depth, device, dtype
        self.done_at: float | None = None
        self.stalled_s = 0.0
        pieces: list[Piece] = [] if present else [("base", 0)]
        for i in range(present, depth):
            pieces.append(("layer", i))
            if i + 1 in host.heads:
                pieces.append(("head", i + 1))
        self._pieces = {piece: Event() for piece in pieces}
        self._there: dict[Piece, Flat] = {}
        self._error: BaseException | None = None
        self._is_cancelled = False
        self._thread = Thread(target=self._copy, daemon=True)
        self._thread.start()

    @property
    def heads(self) -> list[int]:
        """Exits whose heads come."""
        return [number for kind, number in self._pieces if kind == "head"]

    def take(self, kind: Literal["base", "layer", "head"], number: int) -> Flat:
        """A piece, waited for. Raises what its copy raised."""
        event = self._pieces[kind, number]
        if not event.is_set():
            began = time.perf_counter()
            event.wait()
            self.stalled_s += time.perf_counter() - began
        if self._error is not None:
            raise self._error
        return self._there[kind, number]

    def wait(self) -> None:
        """Until every piece is there."""
        for kind, number in self._pieces:
            self.take(kind, number)
        self._thread.join()

    def cancel(self) -> None:
        """Stop behind the piece under way and forget what came."""
        self._is_cancelled = True
        self._thread.join()
        self._there.clear()

    def _copy(self) -> None:
        is_cuda = self.device.type == "cuda"
        stream = torch.cuda.Stream(self.device) if is_cuda else None
        context: Any = torch.cuda.stream(stream) if stream is not None else nullcontext()
        try:
            with torch.inference_mode(), context:
                for piece, event in self._pieces.items():
                    if self._is_cancelled:
                        break
                    flat = self.host.flat(*piece).copied(self.device, self.dtype)
                    if stream is not None:
                        stream.synchronize()
                        flat.data.record_stream(torch.cuda.default_stream(self.device))
                    self._there[piece] = flat
                    event.set()
                else:
                    self.done_at = time.perf_counter()
        except RuntimeError as error:  # the device is full: said where the piece is asked for
            self._error = error
        finally:
            for event in self._pieces.values():
                event.set()


class Awaited(list[Any]):
    """Bound layers, those of an arrival waited for when they are first asked for."""

    def __init__(self, bound: list[Any], bind: Any, count: int) -> None:
        super().__init__(bound)
        self._bind = bind
        self.extend([None] * (count - len(bound)))

    def __getitem__(self, i: Any) -> Any:
        layer = super().__getitem__(i)
        if layer is None:
            layer = self._bind(i)
            super().__setitem__(i, layer)
        return layer
