"""Weights on their way to their places on a device, one piece after the other; beside steps, a thread sees to it.

On a GPU the copies go through a stream of their own: a piece is usable behind an event that the stream of steps waits
for (not tested on one here). On a CPU the thread takes processor time that steps could use, so a clock that counts
processor time sees nothing hidden.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from heliosim.engines.models.ring import Ring

if TYPE_CHECKING:
    from heliosim.engines.models.host import Flat, HostModel

Piece = tuple[Literal["base", "layer", "head"], int]
"""The base, a layer (from 0) or the head of an exit."""

Slots = Callable[[str, int], Tensor]
"""Where a piece lies on a device: a flat tensor."""


class Copy(NamedTuple):
    """One piece that was copied: when, on ``time.perf_counter`` (s). ``source``: what it came from."""

    model: str
    kind: str
    number: int
    nbytes: int
    source: Literal["host", "disk"]
    began_s: float
    ended_s: float


class Incoming:
    """The pieces of ``host`` behind ``present`` layers up to ``depth``, on their way to ``slots``.

    ``first``: where the slots begin (for who asks later). ``done_at``: when the last piece was there, on
    ``time.perf_counter``; None: not yet. ``failed``: what stopped it, else None. ``copies``: where pieces that are
    there are put on record. ``ring``: buffers for what comes from disk. ``is_background``: by a thread (otherwise it
    is over, or has raised, when it is made).
    """

    def __init__(
        self,
        host: HostModel,
        present: int,
        depth: int,
        slots: Slots,
        device: torch.device,
        *,
        first: int = 0,
        ring: Ring | None = None,
        copies: list[Copy] | None = None,
        is_background: bool = True,
    ) -> None:
        self.host, self.present, self.depth, self.device, self.first = host, present, depth, device, first
        self.done_at: float | None = None
        self.failed: Exception | None = None
        self.stalled_s = 0.0
        self.copies: list[Copy] = [] if copies is None else copies
        self._slots, self._ring = slots, ring or Ring(host.largest)
        self._issued = {piece: Event() for piece in host.pieces(depth, behind=present)}
        self._there: dict[Piece, Tensor] = {}
        self._arrived: dict[Piece, torch.cuda.Event] = {}
        self._is_cancelled = False
        is_cuda = device.type == "cuda"
        # behind what steps issued so far: their KV may have lain where weights come
        self._behind = torch.cuda.current_stream(device).record_event() if is_cuda else None
        self._thread: Thread | None = None
        if is_background:
            self._thread = Thread(target=self._copy, daemon=True)
            self._thread.start()
        else:
            self._copy()
            if self.failed is not None:
                raise self.failed

    @property
    def heads(self) -> list[int]:
        """Exits whose heads come."""
        return [number for kind, number in self._issued if kind == "head"]

    def take(self, kind: Literal["base", "layer", "head"], number: int) -> Flat:
        """A piece, waited for. Raises what stopped the transfer before it came."""
        from heliosim.engines.models.host import Flat

        piece: Piece = kind, number
        if not self._issued[piece].is_set():
            began = time.perf_counter()
            self._issued[piece].wait()
            self.stalled_s += time.perf_counter() - began
        if self.failed is not None:
            raise self.failed
        if piece in self._arrived:
            torch.cuda.current_stream(self.device).wait_event(self._arrived[piece])
        return Flat(self._there[piece], self.host.shapes(piece))

    def wait(self) -> None:
        """Until every piece is there. Raises what stopped it."""
        self._join()
        if self.failed is not None:
            raise self.failed
        assert not self._is_cancelled, "a transfer that was given up is waited for"

    def cancel(self) -> None:
        """Stop behind the piece under way; nothing is written any more when this returns."""
        self._is_cancelled = True
        self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _copy(self) -> None:
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        context: Any = torch.cuda.stream(stream) if stream is not None else nullcontext()
        try:
            with torch.inference_mode(), context:
                self._copy_pieces(stream)
        except Exception as error:  # a full device, a file that cannot be read: said to who waits
            self.failed = error
        finally:
            if stream is not None and self.failed is not None:
                stream.synchronize()  # nothing is written any more
            self._ring.close()
            for event in self._issued.values():
                event.set()

    def _copy_pieces(self, stream: torch.cuda.Stream | None) -> None:
        if stream is not None and self._behind is not None:
            stream.wait_event(self._behind)
        before: tuple[Piece, Copy, Any] | None = None
        for piece in self._issued:
            if self._is_cancelled:
                break
            began, source = time.perf_counter(), self._source(piece)
            slot = self._there[piece] = self._slots(*piece)
            for first, values in self.host.stream(piece, self._ring):
                slot[first : first + len(values)].copy_(values, non_blocking=True)
            copy = Copy(self.host.info.spec.name, *piece, slot.nbytes, source, began, began)
            event = None
            if stream is not None:
                event = self._arrived[piece] = stream.record_event()
            self._issued[piece].set()
            # one piece behind: the next copy is under way while this one is waited for
            self._book(before)
            before = piece, copy, event
        self._book(before)
        if not self._is_cancelled:
            self.done_at = time.perf_counter()

    def _source(self, piece: Piece) -> Literal["host", "disk"]:
        return "host" if self.host.has(piece) else "disk"

    def _book(self, issued: tuple[Piece, Copy, Any] | None) -> None:
        """Put on record a copy that was issued, when it has arrived."""
        if issued is None:
            return
        _, copy, event = issued
        if event is not None:
            event.synchronize()
        self.copies.append(copy._replace(ended_s=time.perf_counter()))


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
