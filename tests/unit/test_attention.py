"""Attention backends: the same as plain attention where they run, and a reason where they do not."""

from __future__ import annotations

from typing import get_args

import pytest

torch = pytest.importorskip("torch")

from heliosim.engines.attention import choose as choosing  # noqa: E402
from heliosim.engines.attention.base import Paged  # noqa: E402
from heliosim.engines.attention.choose import BACKENDS, NAMES, choose, differs, table_width  # noqa: E402
from heliosim.engines.attention.flashinfer import paged_arrays  # noqa: E402
from heliosim.engines.attention.flex import Flex  # noqa: E402
from heliosim.engines.attention.sdpa import Sdpa  # noqa: E402
from heliosim.engines.fast.triton_decode import combined_reference, split_reference  # noqa: E402
from heliosim.engines.models.paged import KVShape, PagedKV  # noqa: E402
from heliosim.errors import InputError, UnknownNameError  # noqa: E402
from heliosim.scenario import LiveSpec  # noqa: E402

CPU = torch.device("cpu")
SHAPES = [KVShape(4, 4, 12), KVShape(6, 2, 8), KVShape(8, 1, 16)]


def case(shape: KVShape, lengths: list[int], width: int = 6) -> tuple[PagedKV, Paged, torch.Tensor]:
    torch.manual_seed(1)
    kv = PagedKV(len(lengths) * width + 3, 2, shape, CPU, torch.float32)
    for layer in kv.layers:
        layer.data.normal_()
    tables = torch.randperm(len(lengths) * width).int().view(len(lengths), width) + kv.first_block
    paged = Paged(tables, torch.tensor(lengths, dtype=torch.int32), torch.arange(len(lengths)))
    return kv, paged, torch.randn(len(lengths), shape.query_width)


def by_the_book(kv: PagedKV, paged: Paged, query: torch.Tensor, layer: int) -> torch.Tensor:
    """Row by row, head by head."""
    shape, rows = kv.shape, []
    for row, length in enumerate(paged.lengths.tolist()):
        slots = [int(paged.tables[row, p // 16]) * kv.block_rows + p % 16 for p in range(length)]
        pair = kv.layers[layer].tokens[slots].view(length, 2, shape.kv_heads, shape.head_dim)
        heads = []
        for head in range(shape.heads):
            keys, values = pair[:, :, head * shape.kv_heads // shape.heads].unbind(1)
            q = query[row].view(shape.heads, -1)[head]
            heads.append((keys @ q / shape.head_dim**0.5).softmax(0) @ values)
        rows.append(torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_attention_is_attention(shape: KVShape) -> None:
    kv, paged, query = case(shape, [37, 1, 96, 16])
    for layer in (0, 1):
        rows = Sdpa().rows(kv, paged)
        rows.begin()
        assert torch.allclose(rows.decode(query, kv.layers[layer]), by_the_book(kv, paged, query, layer), atol=1e-5)


@pytest.mark.parametrize("splits", [1, 4, 32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_splits_of_the_triton_kernel_add_up(shape: KVShape, splits: int) -> None:
    kv, paged, query = case(shape, [90, 1, 64, 65])
    parts, sums = split_reference(query, kv.layers[1].tokens, paged.tables, paged.lengths, kv, splits)
    assert parts.shape == (4, shape.heads, splits, shape.head_dim)
    assert torch.allclose(combined_reference(parts, sums), by_the_book(kv, paged, query, 1), atol=1e-5)


def test_flex_attention_is_attention() -> None:
    assert differs(Flex(), SHAPES[1], CPU, torch.float32) == ""


def test_rows_that_fill_a_step_up_see_what_the_first_sees() -> None:
    kv, paged, query = case(SHAPES[1], [37, 5])
    again = Paged(paged.tables[[0, 1, 0]], paged.lengths[[0, 1, 0]], torch.tensor([0, 1, 0]))
    rows = Flex().rows(kv, again)
    rows.begin()
    out = rows.decode(query[[0, 1, 0]], kv.layers[0])
    assert torch.allclose(out, by_the_book(kv, again, query[[0, 1, 0]], 0), atol=1e-5)


def test_a_backend_that_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Sdpa):
        name = "triton"

        def rows(self, kv: PagedKV, paged: Paged) -> object:  # type: ignore[override]
            made = super().rows(kv, paged)
            made.begin = lambda: None  # type: ignore[method-assign]
            return made

    class Broken(Sdpa):
        def rows(self, kv: PagedKV, paged: Paged) -> object:  # type: ignore[override]
            raise RuntimeError("no kernel image")

    assert "differs from plain attention" in differs(Wrong(), SHAPES[0], CPU, torch.float32)
    assert "no kernel image" in differs(Broken(), SHAPES[0], CPU, torch.float32)
    monkeypatch.setitem(choosing.BACKENDS, "triton", (Wrong, lambda *_: ""))
    with pytest.raises(InputError, match="differs from plain attention"):
        choose("triton", SHAPES[0], CPU, torch.float32)


def test_auto_says_what_it_passed_over() -> None:
    """As on a GPU, where all are tried; there is none here, so each gives its reason."""
    made, reasons = None, {}
    for name in BACKENDS:
        found, reason = choosing._tried(name, SHAPES[0], CPU, torch.float32)
        made = made or found
        reasons[name] = reason
    assert made is not None
    assert "not installed" in reasons["flash-infer"]
    assert reasons["varlen"]
    assert reasons["sdpa"] == ""
    assert choose("auto", SHAPES[0], CPU, torch.float32).attention.name == "sdpa"


def test_names_of_a_scenario_are_those_there_are() -> None:
    assert get_args(LiveSpec.model_fields["attention"].annotation) == NAMES
    with pytest.raises(UnknownNameError):
        choose("flash", SHAPES[0], CPU, torch.float32)


def test_pages_as_flash_infer_is_told_of_them() -> None:
    assert paged_arrays([[7, 3, 9], [4, 8], [5]], [33, 16, 1]) == ([0, 3, 4, 5], [7, 3, 9, 4, 5], [1, 16, 1])


def test_tables_have_few_widths() -> None:
    assert [table_width(n) for n in (0, 1, 16, 17, 32, 33, 80, 2048)] == [1, 1, 1, 2, 2, 4, 8, 128]
