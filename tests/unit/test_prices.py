"""The price table: strict, dated, and the shipped one names a source for everything."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from heliosim.errors import InputError
from heliosim.prices import Price, load_prices

ROW = {"gpu": "X", "provider": "p", "region": "r", "price_per_gpu_hour": 2.0, "date": "2026-03-09", "source": "s"}


def write(path: Path, rows: list[dict[str, Any]], **changes: Any) -> Path:
    file = path / "prices.yaml"
    file.write_text(yaml.safe_dump({"schema_version": 1, "currency": "EUR", "prices": rows} | changes), "utf-8")
    return file


def test_the_shipped_table_has_the_gpus_of_the_shipped_profiles() -> None:
    table = load_prices()
    assert table.currency == "USD"
    for gpu in ("A100-80GB", "H100-80GB"):
        assert table.price(gpu).provider == "catalogue"
        assert table.price(gpu, "specialty-cloud").price_per_gpu_hour < table.price(gpu).price_per_gpu_hour
    assert all(p.source and p.date >= "2026" for p in table.prices)


def test_provider_and_region_choose(tmp_path: Path) -> None:
    rows = [ROW, ROW | {"region": "q", "price_per_gpu_hour": 3.0}, ROW | {"provider": "o", "price_per_gpu_hour": 4.0}]
    table = load_prices(write(tmp_path, rows))
    assert table.price("X").price_per_gpu_hour == 2.0
    assert table.price("X", "p", "q").price_per_gpu_hour == 3.0
    assert table.price("X", "o").price_per_gpu_hour == 4.0
    for gpu, provider, region, said in (("Y", None, None, "X"), ("X", "pp", None, "'p'"), ("X", "o", "q", "r")):
        with pytest.raises(InputError, match=said):
            table.price(gpu, provider, region)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"price_per_gpu_hour": 0}, "price_per_gpu_hour"),
        ({"price_per_gpu_hour": float("inf")}, "price_per_gpu_hour"),
        ({"date": "March"}, "date"),
        ({"date": "2026-13"}, "date"),
        ({"source": ""}, "source"),
        ({"prise": 3}, "unknown field"),
    ],
)
def test_bad_rows_are_refused_with_their_field(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        load_prices(write(tmp_path, [ROW | changes]))
    assert "prices.yaml" in str(caught.value)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two prices for X, p, r"):
        load_prices(write(tmp_path, [ROW, ROW]))
    with pytest.raises(InputError, match="currency"):
        load_prices(write(tmp_path, [ROW], currency="money"))
    with pytest.raises(InputError, match="no such file"):
        load_prices(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(InputError, match=r"bad\.yaml, line 1"):
        load_prices(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("date", "age", "stale"), [("2026-03-09", 30, False), ("2026-03", 38, False), ("2025-01-01", 462, True)]
)
def test_age_counts_from_the_day_or_the_first_of_the_month(date: str, age: int, stale: bool) -> None:
    price, today = Price(**ROW | {"date": date}), datetime.date(2026, 4, 8)
    assert price.age_days(today) == age
    assert price.is_stale(today) == stale


def test_yaml_dates_need_no_quotes(tmp_path: Path) -> None:
    file = write(tmp_path, [ROW])
    file.write_text(file.read_text(encoding="utf-8").replace("'2026-03-09'", "2026-03-09"), encoding="utf-8")
    assert load_prices(file).price("X").date == "2026-03-09"
