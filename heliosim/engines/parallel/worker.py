"""One worker rank: it does what the driver does, on its own part of the weights and the KV, and decides nothing.

It reaches the same tokens by itself, because logits are whole on every rank; so what comes through the pipe is what the
server says to an engine, and nothing about what happened.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from heliosim.engines.parallel.links import Linked, Seat
from heliosim.errors import HelioSimError
from heliosim.types import Load


def serve(pipe: Connection, seat: Seat, device: str, options: dict[str, Any]) -> None:
    """Be rank ``seat.rank`` until the driver closes the pipe. ``options``: the rest of what ``TorchEngine`` takes."""
    import torch

    from heliosim.engines.torch import TorchEngine

    pipe.send(("here", None))
    linked = Linked(seat, torch.device(device))
    engine = TorchEngine(**options, device=device, ranks=linked)
    pipe.send(("ready", None))
    while True:
        try:
            command, arguments = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            break
        if command == "perform" and isinstance(arguments[0], Load):
            pipe.send(_loaded(engine, arguments[0]))
            continue
        if command == "drop":
            engine.residency.clear()
            continue
        with suppress(HelioSimError):  # the driver meets the same one and raises it
            getattr(engine, command)(*arguments)
    linked.close(is_broken=True)


def _loaded(engine: Any, action: Load) -> tuple[str, Any]:
    """Load; what the driver needs to know of it. A failure in which others may wait for this rank is not survived."""
    try:
        engine.perform(action)
    except HelioSimError as error:
        if action.kept:
            raise
        return "failed", (held(engine), str(error))
    return "done", (held(engine), "")


def held(engine: Any) -> tuple[Any, int]:
    """What must be the same on all ranks between two actions: placement and KV blocks."""
    return engine.placement, engine.books()["kv_blocks"]


def _end_with(parent: int) -> None:
    """End this process when its parent is gone, whatever it waits for."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


def main() -> None:
    pipe, parent = Connection(int(sys.argv[1])), int(sys.argv[2])
    _end_with(parent)
    try:
        serve(pipe, **pickle.loads(pipe.recv_bytes()))
    except Exception as error:
        with suppress(OSError):
            pipe.send(("died", f"{type(error).__name__}: {error}".splitlines()[0]))
        raise


if __name__ == "__main__":
    main()
