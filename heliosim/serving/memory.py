"""One pool of device memory for weights and KV, whose books balance.

The pool counts; it holds nothing. Engines allocate what the pool grants, and tests compare the two. Decoding requests
grow together, a block each every 16 steps: their growth is booked in one sum and settled when a request leaves.
"""

from __future__ import annotations

from heliosim.errors import MemoryBudgetError
from heliosim.types import Bytes, RequestId, blocks_for


class MemoryPool:
    """``total_bytes`` shared by the resident weights and KV blocks; whatever the weights leave becomes blocks.

    ``request_blocks``: what every request that holds KV needs beside it, in blocks; it takes and releases them with its
    KV, so whatever a request is said to hold includes them.
    """

    def __init__(self, total_bytes: Bytes) -> None:
        if total_bytes <= 0:
            raise MemoryBudgetError("memory.budget_bytes", total_bytes, "must be positive", "Give a budget in bytes.")
        self.total_bytes = total_bytes
        self.weights_bytes: Bytes = 0
        self.block_bytes: Bytes = 0
        self.reserved_bytes: Bytes = 0
        self.request_blocks = 0
        self._held: dict[RequestId, int] = {}
        self._grown = 0
        self.used_blocks = 0
        self.total_blocks = 0
        """KV blocks the pool can hold beside the present weights."""

    @property
    def free_blocks(self) -> int:
        return self.total_blocks - self.used_blocks

    @property
    def kv_used_bytes(self) -> Bytes:
        return self.used_blocks * self.block_bytes

    @property
    def kv_total_bytes(self) -> Bytes:
        return self.total_blocks * self.block_bytes

    @property
    def most_blocks(self) -> int:
        """KV blocks beside the present weights once nothing is reserved for others any more."""
        return (self.total_bytes - self.weights_bytes) // self.block_bytes if self.block_bytes else 0

    def can_reserve(self, more: Bytes) -> bool:
        """Whether ``more`` bytes of arriving weights and at least one block fit, beside the blocks in use."""
        least = max(1 + self.request_blocks, self.used_blocks)
        return self.weights_bytes + more + self.block_bytes * least <= self.total_bytes

    def blocks_for(self, tokens: int) -> int:
        """Blocks that a request with ``tokens`` tokens in KV holds."""
        return blocks_for(tokens) + self.request_blocks

    def reserve(self, more: Bytes) -> None:
        """Keep ``more`` bytes in all for weights that are on their way; KV blocks shrink by them (0: none any more)."""
        assert self.can_reserve(more), f"{more:,} B do not fit beside {self.weights_bytes:,} B and the KV in use"
        self.reserved_bytes = more
        if self.block_bytes:
            self.total_blocks = (self.total_bytes - self.weights_bytes - more) // self.block_bytes

    def resize(self, total_bytes: Bytes) -> None:
        """Have another size from now on. Blocks in use must fit it beside the weights; where these do not fit
        themselves nothing may be in use, and other weights must be placed next. Nothing may be reserved.
        """
        assert not self.reserved_bytes, f"{self.reserved_bytes:,} B are kept for weights on their way"
        self.total_bytes = total_bytes
        self.total_blocks = max(0, self.most_blocks)
        assert self.used_blocks <= self.total_blocks, f"{self.used_blocks} blocks in use, room for {self.total_blocks}"

    def _least_blocks(self, request_blocks: int) -> int:
        """Blocks in use, or one for one request, if a request takes so many beside its KV."""
        return max(1 + request_blocks, self.used_blocks + len(self._held) * (request_blocks - self.request_blocks))

    def can_place(self, weights: Bytes, block_bytes: Bytes, request_blocks: int = 0) -> bool:
        """Whether these weights and at least one block fit, beside the blocks in use."""
        return weights + block_bytes * self._least_blocks(request_blocks) <= self.total_bytes

    def place(self, weights: Bytes, block_bytes: Bytes, request_blocks: int = 0) -> None:
        """Replace the resident weights and the size of a block. Blocks of KV in use stay in use at the new size; what a
        request holds beside them is booked anew.

        Raises MemoryBudgetError if the weights, one block and the blocks in use do not fit.
        """
        least = self._least_blocks(request_blocks)
        need = weights + block_bytes * least
        if need > self.total_bytes:
            raise MemoryBudgetError(
                "memory.budget_bytes",
                self.total_bytes,
                f"too small: weights need {weights:,} B, {least} KV block(s) {need - weights:,} B",
                f"Give at least {need:,} B, a smaller model or fewer layers.",
            )
        self.weights_bytes, self.block_bytes, self.reserved_bytes = weights, block_bytes, 0
        if request_blocks != self.request_blocks:
            more, self.request_blocks = request_blocks - self.request_blocks, request_blocks
            self._held = {request: blocks + more for request, blocks in self._held.items()}
            self.used_blocks += more * len(self._held)
        self.total_blocks = (self.total_bytes - weights) // block_bytes if block_bytes else 0

    def clear(self) -> None:
        """Give up the weights (a server that stops). Every request must have been released."""
        assert not self._held, f"requests still hold KV: {sorted(self._held)[:5]}"
        assert not self._grown, f"{self._grown} blocks of growth are nobody's"
        self.weights_bytes = self.reserved_bytes = 0
        self.total_blocks = self.total_bytes // self.block_bytes if self.block_bytes else 0

    def vacate(self) -> None:
        """Give up the weights and the blocks with them, as before the first were placed."""
        self.clear()
        self.block_bytes = self.total_blocks = 0

    def holds(self, request: RequestId) -> int:
        """Blocks a request holds."""
        return self._held.get(request, 0)

    def take(self, request: RequestId, blocks: int) -> bool:
        """Let ``request`` hold ``blocks`` blocks in all (it never shrinks). False, and nothing changed, if they do not
        fit.
        """
        more = blocks - self._held.get(request, 0)
        if more <= 0:
            return True
        if more > self.free_blocks:
            return False
        self._held[request] = blocks
        self.used_blocks += more
        return True

    def grow(self, blocks: int) -> bool:
        """Let the requests that hold KV hold ``blocks`` more between them. False, and nothing changed, if too many."""
        if blocks > self.total_blocks - self.used_blocks:
            return False
        self._grown += blocks
        self.used_blocks += blocks
        return True

    def attribute(self, request: RequestId, blocks: int) -> None:
        """Book as one request's own what it holds of the common growth: ``blocks`` in all."""
        self._grown -= blocks - self._held[request]
        self._held[request] = blocks

    def release(self, request: RequestId, blocks: int | None = None) -> None:
        """Give back every block of a request; nothing if it holds none. ``blocks``: what it holds with its growth."""
        held = self._held.pop(request, 0)
        total = held if blocks is None else blocks
        self._grown -= total - held
        self.used_blocks -= total

    def check(self) -> None:
        """Raise AssertionError if the books do not balance."""
        assert self.used_blocks == sum(self._held.values()) + self._grown, (self.used_blocks, self._grown, self._held)
        assert self._grown >= 0, self._grown
        assert self.used_blocks >= 0
        held = self.weights_bytes + self.reserved_bytes + self.kv_used_bytes
        assert held <= self.total_bytes, f"{held} > {self.total_bytes}"
