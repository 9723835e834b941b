"""What an exit is worth on held-out text: how many tokens it is sure of, and how often it says what the model says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ExitFigures:
    """Of one exit over held-out tokens; shares from 0 to 1.

    ``confident``: tokens at the threshold or above; ``agreement``: tokens on which it says what the last layer says;
    ``agreement_if_confident``: the same of confident ones, None without any; ``exit_share``: the most tokens that can
    leave here, most confident first, with the wanted agreement among them; ``divergence``: mean Kullback-Leibler
    divergence from the last layer, nats.
    """

    tokens: int
    confident: float
    agreement: float
    agreement_if_confident: float | None
    exit_share: float
    divergence: float

    def row(self) -> dict[str, float | int | None]:
        """Plain data."""
        return asdict(self)


def figures_of(
    confidences: npt.NDArray[np.float64],
    agrees: npt.NDArray[np.bool_],
    divergence: float,
    *,
    threshold: float,
    wanted_agreement: float,
) -> ExitFigures:
    """Figures of one exit from its tokens' confidences and agreement with the last layer."""
    is_confident = confidences >= threshold
    return ExitFigures(
        tokens=len(confidences),
        confident=float(is_confident.mean()),
        agreement=float(agrees.mean()),
        agreement_if_confident=float(agrees[is_confident].mean()) if is_confident.any() else None,
        exit_share=share_at_agreement(confidences, agrees, wanted_agreement),
        divergence=divergence,
    )


def share_at_agreement(confidences: npt.NDArray[np.float64], agrees: npt.NDArray[np.bool_], wanted: float) -> float:
    """The largest share of tokens at or above some confidence of which at least ``wanted`` agree; 0 if there is none.
    Tokens of one confidence leave together.
    """
    if not len(confidences):
        return 0.0
    order = np.argsort(-confidences, kind="stable")
    ranked = confidences[order]
    agreement = np.cumsum(agrees[order]) / np.arange(1, len(order) + 1)
    is_end = np.append(ranked[1:] != ranked[:-1], True)
    good = np.flatnonzero(is_end & (agreement >= wanted))
    return float((good[-1] + 1) / len(order)) if len(good) else 0.0


Figures = Mapping[int, ExitFigures]
