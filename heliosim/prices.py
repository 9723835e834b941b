"""What a GPU costs per hour: a table of dated prices with their sources, for people to edit.

A price is a fact about a day and a seller. The shipped table is a starting point for comparing; bring your own with
``--prices``.
"""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from heliosim.errors import UnknownNameError
from heliosim.formats.files import Strict, read_yaml, validate

STALE_DAYS = 180
"""Prices older than this are pointed out."""


class Price(Strict):
    """Price of one GPU of a kind, from one provider, at one time. ``date``: ``YYYY-MM-DD`` or ``YYYY-MM``."""

    gpu: str = Field(min_length=1)
    provider: str = Field(min_length=1)
    region: str = Field(min_length=1)
    price_per_gpu_hour: float = Field(gt=0, allow_inf_nan=False)
    date: str
    source: str = Field(min_length=1)

    @field_validator("date", mode="before")
    @classmethod
    def _is_a_date(cls, value: object) -> str:
        text = value.isoformat() if isinstance(value, datetime.date) else value
        if not isinstance(text, str) or not re.fullmatch(r"\d{4}-\d{2}(-\d{2})?", text):
            raise ValueError("give a date as YYYY-MM-DD or YYYY-MM")
        _day(text)
        return text

    def age_days(self, today: datetime.date) -> int:
        """Days since the price was taken; a month counts from its first day."""
        return (today - _day(self.date)).days

    def is_stale(self, today: datetime.date) -> bool:
        return self.age_days(today) > STALE_DAYS


def _day(text: str) -> datetime.date:
    """The day a date names, the first of the month if it names none. Raises ValueError."""
    return datetime.date.fromisoformat(text if len(text) == 10 else f"{text}-01")


class PriceTable(Strict):
    """Prices of GPU kinds in one currency. One GPU, provider and region have one price."""

    schema_version: Literal[1]
    currency: str = Field(pattern="^[A-Z]{3}$")
    prices: tuple[Price, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _once(self) -> PriceTable:
        keys = [(p.gpu, p.provider, p.region) for p in self.prices]
        twice = next((k for k in keys if keys.count(k) > 1), None)
        if twice is not None:
            raise ValueError(f"two prices for {', '.join(twice)}")
        return self

    def price(self, gpu: str, provider: str | None = None, region: str | None = None) -> Price:
        """The first price of a GPU kind, from this provider and region where they are given.

        Raises UnknownNameError naming what the table has.
        """
        of_kind = [p for p in self.prices if p.gpu == gpu]
        if not of_kind:
            raise UnknownNameError("prices, gpu", gpu, {p.gpu for p in self.prices})
        found = [p for p in of_kind if provider in (None, p.provider)]
        if not found:
            raise UnknownNameError(f"prices of {gpu}, provider", str(provider), {p.provider for p in of_kind})
        there = [p for p in found if region in (None, p.region)]
        if not there:
            raise UnknownNameError(f"prices of {gpu}, region", str(region), {p.region for p in found})
        return there[0]


def shipped_prices() -> Path:
    """The price table in the package."""
    return Path(__file__).parent / "plans" / "prices.yaml"


def load_prices(path: Path | None = None) -> PriceTable:
    """Read a price table; None: the shipped one. Raises InputError naming file, field, value and remedy."""
    path = path or shipped_prices()
    raw = read_yaml(path, "a price table")
    return validate(PriceTable, raw, str(path))
