"""What a live engine knows of its requests and the server must not: token ids, and when a text ends."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from heliosim.engines.made_up import MadeUpPrompts
from heliosim.errors import InputError
from heliosim.types import Arrival, Request, RequestId


@dataclass(slots=True)
class Text:
    """A request as the engine knows it. ``known``: prompt and generated ids; ``seed``: of its draws; ``logprob_sum``:
    of the natural-log probabilities of its tokens. ``replayed_tokens``: the length it has where exits are replayed,
    whatever the model says; None: they are not.
    """

    request: Request
    known: list[int]
    output_tokens: int | None
    seed: int = 0
    logprob_sum: float = 0.0
    replayed_tokens: int | None = None

    @property
    def generated(self) -> list[int]:
        return self.known[self.request.prompt_tokens :]

    @property
    def heeds_eos(self) -> bool:
        """Whether an end-of-sequence token ends it."""
        return self.output_tokens is None and self.replayed_tokens is None

    @property
    def most(self) -> int:
        """Tokens it may generate in all."""
        if self.replayed_tokens is not None:
            return self.replayed_tokens
        return self.request.max_tokens if self.output_tokens is None else self.output_tokens

    @property
    def left(self) -> int:
        """Tokens it may still generate."""
        return self.most - (len(self.known) - self.request.prompt_tokens)


@dataclass
class Texts:
    """Requests under way by number, and what those that ended said until somebody takes it. ``made_up``: prompts of
    requests that come without text; None: those are refused.
    """

    made_up: MadeUpPrompts | None = None
    going: dict[RequestId, Text] = field(default_factory=dict)
    outputs: dict[RequestId, list[int]] = field(default_factory=dict)

    def accept(self, arrival: Arrival, vocab: int, seed: int = 0) -> None:
        """Take a request's content. Raises InputError for one that this engine cannot serve."""
        request, content = arrival.request, arrival.content
        where = f"request {request.id}"
        if content.prompt_ids is None and self.made_up is not None:
            content = replace(content, prompt_ids=self.made_up.of(request))
        if content.prompt_ids is None:
            raise InputError(f"{where}: prompt_ids", None, "a live engine needs token ids", "Use a workload with text.")
        if not content.prompt_ids or len(content.prompt_ids) != request.prompt_tokens:
            problem = f"prompt_tokens says {request.prompt_tokens}"
            raise InputError(f"{where}: prompt_ids", len(content.prompt_ids), problem, "Make them agree.")
        for i in content.prompt_ids:
            if not 0 <= i < vocab:
                remedy = "Encode the text with the checkpoints' own tokenizer."
                raise InputError(f"{where}: prompt_ids", i, f"not in a vocabulary of {vocab}", remedy)
        if content.output_tokens is not None and content.output_tokens < 1:
            raise InputError(f"{where}: output_tokens", content.output_tokens, "must be at least 1", "Ask for a token.")
        self.going[request.id] = Text(request, list(content.prompt_ids), content.output_tokens, seed)

    def append(self, request: RequestId, token: int, logprob: float, eos_ids: Collection[int]) -> bool:
        """Add a token; True, and the text is among the outputs, if it was the last."""
        text = self.going[request]
        text.known.append(token)
        text.logprob_sum += logprob
        is_last = text.left <= 0 or (text.heeds_eos and token in eos_ids)
        if is_last:
            self.outputs[request] = text.generated
            del self.going[request]
        return is_last

    def generated(self, request: RequestId) -> list[int]:
        """Ids generated so far, or in all if it has ended and its output was not taken."""
        if request in self.outputs:
            return list(self.outputs[request])
        return self.going[request].generated

    def take_outputs(self) -> dict[RequestId, list[int]]:
        """Ids of the requests that ended since the last call."""
        taken, self.outputs = self.outputs, {}
        return taken

    def clear(self) -> None:
        """Know nobody."""
        self.going.clear()
        self.outputs.clear()
