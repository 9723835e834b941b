"""How a token is taken from a model's logits: the likeliest, or drawn.

Pure settings, part of a scenario. Only a live engine draws; a simulated one never sees a token, and its behaviour is
that of its profile whatever stands here.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from heliosim.formats.files import Strict
from heliosim.streams import stream


class Sampling(Strict):
    """``temperature`` 0 takes the likeliest token (greedy). Above 0 a token is drawn from softmax(logits/temperature),
    cut to the ``top_k`` likeliest (None: all) and then to the fewest of those whose probabilities reach ``top_p``.

    A request's draws depend on ``seed``, its number and how far its text is, and on nobody else in its batch.
    """

    temperature: float = Field(default=0.0, ge=0, le=100, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _means_something(self) -> Sampling:
        if self.is_greedy and (self.top_p < 1 or self.top_k is not None or self.seed):
            raise ValueError("top_p, top_k and seed have no effect at temperature 0; give a temperature above 0")
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = handler(self)
        return {k: v for k, v in content.items() if v != Sampling.model_fields[k].default}

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def request_seed(self, request: int) -> int:
        """The seed of a request's own draws, in [0, 2^63)."""
        return int(stream(self.seed, "sampling", request).integers(2**63))


GREEDY = Sampling()
