"""What of a load is exposed: the arithmetic of one deepening, for a model's own costs.

Loading more layers of the model that serves can be hidden in two ways: steps go on with the layers that are there
until the new ones have come, or the next step begins at once and waits where a layer is not there yet. The first hides
the whole transfer, the second as much as the layers that are there have to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from heliosim.costs import StepCost, StepShape, load_seconds, stall_seconds, transfer_seconds
from heliosim.types import BLOCK_TOKENS, Arriving, Load, ModelSpec, Placement, Seconds, blocks_for


@dataclass(frozen=True)
class Deepening:
    """A load of the layers behind ``present`` up to ``depth``, and the step behind it. All in seconds.

    ``transfer_s``: weights under way; ``step_s``: that step with every layer there; ``blocking_s``: exposed if nothing
    runs meanwhile; ``pipelined_s``: if the step begins at once; ``overlapped_s``: if steps go on until all has come.
    """

    transfer_s: Seconds
    step_s: Seconds
    blocking_s: Seconds
    pipelined_s: Seconds
    overlapped_s: Seconds


def deepening(
    spec: ModelSpec,
    cost: StepCost,
    loads: Mapping[str, Seconds],
    present: int,
    depth: int,
    *,
    prompt_tokens: int = 0,
    decode_rows: int = 0,
    context: int = 0,
) -> Deepening:
    """Exposed seconds of a load, and of its kinds, if the step behind it reads one prompt and decodes ``decode_rows``
    rows of ``context`` tokens.
    """
    load = Load(Placement(spec.name, depth), 0, "load")
    moved_s = transfer_seconds(loads, load, spec, present)
    once_s = load_seconds(loads, (1.0, 0.0, 0.0, 0.0, 0.0))
    shape = _shape(depth, prompt_tokens, decode_rows, context)
    step_s, tail_s = cost.seconds(shape), cost.seconds(shape._replace(layers=0))
    stall_s = stall_seconds(step_s, tail_s, depth, Arriving(present, moved_s))
    return Deepening(moved_s, step_s, once_s + moved_s, once_s + stall_s, once_s)


def hiding_prompt(
    spec: ModelSpec, cost: StepCost, loads: Mapping[str, Seconds], present: int, depth: int, exposed_s: Seconds
) -> int | None:
    """Fewest tokens of one prompt whose reading leaves at most ``exposed_s`` of a pipelined load exposed; None if none
    inside the range the costs were fitted to does.
    """
    low, high = 1, cost.max_tokens

    def is_enough(tokens: int) -> bool:
        return deepening(spec, cost, loads, present, depth, prompt_tokens=tokens).pipelined_s <= exposed_s

    if not is_enough(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
    return low


def _shape(depth: int, prompt_tokens: int, decode_rows: int, context: int) -> StepShape:
    prompts = int(prompt_tokens > 0)
    rows = prompts + decode_rows
    values = dict.fromkeys(StepShape._fields, 0) | {
        "rows": rows,
        "tokens": prompt_tokens + decode_rows,
        "decode_rows": decode_rows,
        "gathered": decode_rows * blocks_for(context) * BLOCK_TOKENS,
        "prefill_rows": prompts,
        "prefill_products": prompt_tokens**2,
        "layers": depth,
        "checks": 1,
        "checked_rows": rows,
        "started": prompts,
        "longest": max(prompt_tokens, context),
        "context": decode_rows * context,
    }
    return StepShape(**values)
