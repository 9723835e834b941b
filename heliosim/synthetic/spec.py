"""The exit spec: what is known of how models leave, as a file. YAML or JSON, strict: unknown fields are refused.

Every figure names its source, or says ``assumed``. Fields are described in docs/behaviour.md.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from heliosim.errors import UnknownNameError
from heliosim.formats.files import Strict, read_yaml, validate

ASSUMED = "assumed"
Share = Annotated[float, Field(ge=0, le=1)]
Said = Annotated[str, Field(min_length=3)]
Ease = Annotated[float, Field(ge=-5, le=5, allow_inf_nan=False)]


class Figure(Strict):
    """A number and where it comes from; ``assumed`` (and why) if from nowhere."""

    value: float
    source: Said

    @property
    def is_assumed(self) -> bool:
        return self.source.startswith(ASSUMED)


class Shares(Strict):
    """Share of tokens that leave at each exit of the full model at the spec's threshold."""

    by_exit: dict[int, Share]
    source: Said

    @property
    def is_assumed(self) -> bool:
        return self.source.startswith(ASSUMED)


class Agreement(Strict):
    """Share of an exit's top tokens that the last layer keeps: ``low`` at confidence 0, ``high`` at 1, linear between.

    One pair, or one for each exit but the last; deeper need not be higher.
    """

    low: Share | dict[int, Share]
    high: Share | dict[int, Share]
    source: Said

    def at(self, depth: int) -> tuple[float, float]:
        """``low`` and ``high`` of an exit."""
        low, high = (v[depth] if isinstance(v, dict) else v for v in (self.low, self.high))
        return low, high


class ModelExits(Strict):
    """How one model's tokens leave."""

    layers: int = Field(ge=1)
    left: Shares
    confident_of_rest: Figure = Field(description="of tokens that reach the last layer, the share confident there")
    sigma: Figure | None = Field(default=None, description="spread of the confidence's logit; or perplexity")
    perplexity: Figure | None = Field(default=None, description="of the full model under the threshold; gives sigma")
    agreement: Agreement

    @model_validator(mode="after")
    def _is_whole(self) -> ModelExits:
        exits = self.exits
        if not exits or exits[0] < 1 or exits[-1] != self.layers:
            raise ValueError(f"exits {list(exits)} must end with the last of {self.layers} layers")
        total = sum(self.left.by_exit.values())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"shares by exit add up to {total:.6g}, not to 1")
        if len(exits) > 1 and self.left.by_exit[self.layers] <= 0:
            raise ValueError("some tokens must reach the last layer")
        if (self.sigma is None) == (self.perplexity is None):
            raise ValueError("give sigma or perplexity, one of the two")
        if self.sigma is not None and not 0.05 <= self.sigma.value <= 20:
            raise ValueError("sigma must lie between 0.05 and 20")
        if not 0 <= self.confident_of_rest.value <= 1:
            raise ValueError("confident_of_rest is a share, 0 to 1")
        for values in (self.agreement.low, self.agreement.high):
            if isinstance(values, dict) and (lacking := sorted(set(exits[:-1]) - set(values))):
                raise ValueError(f"agreement has no value for exit {lacking[0]}")
        return self

    @property
    def exits(self) -> tuple[int, ...]:
        return tuple(sorted(self.left.by_exit))

    @property
    def shares(self) -> list[float]:
        """Shares in the order of the exits."""
        return [self.left.by_exit[e] for e in self.exits]


class TaskSpec(Strict):
    """A task: its weight in the published mix of requests, and lengths in tokens.

    ``ease``: how much easier than average its tokens are, in standard deviations of the latent ease; for all models, or
    by model.
    """

    weight: float = Field(default=1.0, gt=0)
    prompt_tokens: int = Field(ge=1)
    output_tokens: int = Field(ge=1)
    output_cv: float = Field(
        default=0.0, ge=0, le=3, description="standard deviation of output lengths over their mean"
    )
    ease: Ease | dict[str, Ease] = 0.0
    source: Said

    def ease_of(self, model: str) -> float:
        return self.ease.get(model, 0.0) if isinstance(self.ease, dict) else self.ease


class Given(Strict):
    """Tokens of one model that have not left by an exit."""

    model: str
    beyond: int


class Then(Strict):
    """... and what another does with them: it has left by an exit."""

    model: str
    by: int


class Pair(Strict):
    """How alike two models find the tokens: a published conditional, or a correlation of their latent eases."""

    given: Given
    then: Then
    share: Figure


class Correlation(Strict):
    """The correlation of two models' eases, given as such."""

    models: tuple[str, str]
    correlation: Figure


class TokenSpec(Strict):
    """What tokens of one text have in common."""

    depth_correlation: Figure = Field(description="of one token's latent score between two exits, 0.1 to 0.98")
    autocorrelation: Figure = Field(description="of the latent ease from one token to the next, within -1 and 1")
    request_effect: Figure = Field(description="share of the ease's variance that all tokens of a text have in common")
    floor: Figure = Field(description="least confidence there is")

    @model_validator(mode="after")
    def _in_range(self) -> TokenSpec:
        if not 0.1 <= self.depth_correlation.value <= 0.98:
            raise ValueError("depth_correlation must lie between 0.1 and 0.98")
        if not -0.99 <= self.autocorrelation.value <= 0.99:
            raise ValueError("autocorrelation must lie between -0.99 and 0.99")
        if not 0 <= self.request_effect.value <= 0.95:
            raise ValueError("request_effect must lie between 0 and 0.95")
        if not 0 <= self.floor.value < 0.5:
            raise ValueError("floor must lie between 0 and 0.5")
        return self


class ExitSpec(Strict):
    """Schema of an exit spec."""

    schema_version: Literal[1]
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
    about: str = ""
    threshold: Figure = Field(description="confidence threshold the shares were published for")
    models: dict[str, ModelExits] = Field(min_length=1)
    tasks: dict[str, TaskSpec] = Field(min_length=1)
    pairs: tuple[Pair | Correlation, ...] = ()
    tokens: TokenSpec
    texts_per_task: int = Field(default=64, ge=1, le=2000, description="on average; tasks have them by weight")
    text_factor: float = Field(default=2.0, ge=1, le=16, description="length of texts over the task's output tokens")

    @model_validator(mode="after")
    def _hangs_together(self) -> ExitSpec:
        if not self.tokens.floor.value < self.threshold.value < 1:
            raise ValueError("threshold must lie between floor and 1")
        for pair in self.pairs:
            for name, depth in ends_of(pair):
                if name not in self.models:
                    raise ValueError(f"pairs name {name!r}; models are {', '.join(self.models)}")
                if depth is not None and depth not in self.models[name].exits[:-1]:
                    raise ValueError(f"{name} has no early exit {depth}: {self.models[name].exits}")
        wanted = {frozenset((a, b)) for a in self.models for b in self.models if a != b}
        given = [frozenset(name for name, _ in ends_of(pair)) for pair in self.pairs]
        if any(len(g) < 2 for g in given) or len(set(given)) < len(given):
            raise ValueError("pairs must name two different models, each pair once")
        if lacking := sorted(" and ".join(sorted(w)) for w in wanted - set(given)):
            raise ValueError(f"pairs say nothing of {lacking[0]}")
        for name, task in self.tasks.items():
            if isinstance(task.ease, dict) and (odd := sorted(set(task.ease) - set(self.models))):
                raise ValueError(f"ease of task {name} names {odd[0]!r}; models are {', '.join(self.models)}")
        return self

    @property
    def weights(self) -> list[float]:
        """Share of each task in all tokens, but for a factor: published shares are of tokens, weights of requests."""
        return [task.weight * task.output_tokens for task in self.tasks.values()]

    def eases(self, model: str) -> list[float]:
        """Shift of each task for a model."""
        return [task.ease_of(model) for task in self.tasks.values()]


def ends_of(pair: Pair | Correlation) -> list[tuple[str, int | None]]:
    """Models of a pair, with the exits it speaks of."""
    if isinstance(pair, Pair):
        return [(pair.given.model, pair.given.beyond), (pair.then.model, pair.then.by)]
    return [(model, None) for model in pair.models]


def shipped_specs() -> dict[str, Path]:
    """Specs in the package, by name."""
    root = Path(str(resources.files("heliosim.synthetic") / "specs"))
    return {path.stem: path for path in sorted(root.glob("*.yaml"))}


def load_spec(name_or_file: str | Path) -> ExitSpec:
    """A spec by file, or by the name of a shipped one. Raises InputError naming field, value and remedy."""
    path, shipped = Path(name_or_file), shipped_specs()
    if not path.exists() and str(name_or_file) in shipped:
        path = shipped[str(name_or_file)]
    elif not path.exists() and path.suffix not in (".yaml", ".yml", ".json"):
        raise UnknownNameError("exit spec", str(name_or_file), shipped)
    return validate(ExitSpec, read_yaml(path, "an exit spec", "docs/behaviour.md"), str(path))
