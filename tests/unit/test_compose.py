"""Composed models: sizes of a rank, steps added up by hand, curves and lines against the kernels, ranges, hosts."""

from __future__ import annotations

import pytest

from heliosim.composing import model_facts
from heliosim.costs import StepShape
from heliosim.errors import InputError, OutOfRangeError, UnknownNameError
from heliosim.hardware.architecture import ExitHead, open_architecture
from heliosim.hardware.compose import ComposedModel, Exits, compose_model
from heliosim.hardware.device import open_device
from heliosim.hardware.steps import StepTimes


def composed(name: str = "llama2-7b", device: str = "A100-80GB", **changes: object) -> ComposedModel:
    return compose_model(open_architecture(name), open_device(device), **changes)  # type: ignore[arg-type]


def times(name: str = "llama2-7b", device: str = "A100-80GB", **changes: object) -> StepTimes:
    values: dict[str, object] = {"dtype": "bf16"} | changes
    return StepTimes.of(open_architecture(name), open_device(device), **values)  # type: ignore[arg-type]


def test_sizes_are_those_of_one_rank() -> None:
    whole, quarter = composed("llama2-70b", tp=1), composed("llama2-70b", tp=4)
    assert quarter.tensor_parallel == 4
    assert whole.layer_bytes == 2 * 855_654_400
    assert quarter.layer_bytes == 2 * ((855_654_400 - 2 * 8192) // 4 + 2 * 8192)
    assert quarter.kv_bytes_per_token_layer == whole.kv_bytes_per_token_layer // 4 == 2 * 2 * 128 * 2
    assert quarter.hidden_bytes == whole.hidden_bytes == 2 * 8192


def test_a_layer_is_the_sum_of_its_kernels() -> None:
    t = times()
    k, h, m = t.kernels, 4096, 11008
    products = k.gemm(8, 3 * h, h) + k.gemm(8, h, h) + k.gemm(8, 2 * m, h) + k.gemm(8, h, m)
    small = 2 * k.elementwise("norm", 2 * 8 * h * 2) + 2 * k.elementwise("add", 3 * 8 * h * 2)
    small += k.elementwise("activation", 3 * 8 * m * 2) + k.elementwise("rope", 2 * 8 * 2 * h * 2)
    assert t.dense(8) == pytest.approx(products + small)
    attention = k.decode_attention(8, 500, 32, 32, 128)
    assert t.decode_step(8, 500) == pytest.approx(1e-3 + 32 * (products + small + attention) + t.head(8))


def test_ranks_add_two_all_reduces_and_cut_the_products() -> None:
    one, two = times(tp=1), times(tp=2)
    reduced = two.kernels.all_reduce("custom", 2, 16 * 4096 * 2)
    assert two.dense(16) > 2 * reduced
    assert one.dense(16) / 2 < two.dense(16) < one.dense(16)


def test_a_layer_takes_no_less_than_its_launches() -> None:
    eager = times(host="eager")
    layer_s = open_device("A100-80GB").host("eager").layer_s
    assert eager.decode_step(1, 256) == pytest.approx(32 * layer_s + eager.head(1))
    assert eager.prefill_step(4, 1024) > 32 * layer_s + eager.head(4)
    curve = composed(host="eager")
    assert curve.step_seconds(decode_rows=1, context=256) == pytest.approx(eager.decode_step(1, 256), rel=0.05)
    assert composed(host="compiled").step_seconds(decode_rows=1, context=256) < curve.step_seconds(
        decode_rows=1, context=256
    )


@pytest.mark.parametrize(
    ("name", "device", "tp"),
    [("llama2-7b", "A100-80GB", 1), ("llama2-70b", "H100-80GB", 4), ("opt-13b", "A100-40GB", 2)],
)
def test_curves_and_lines_follow_the_kernels(name: str, device: str, tp: int) -> None:
    model, t = composed(name, device, tp=tp), times(name, device, tp=tp)
    for rows, context in ((1, 256), (16, 512), (64, 1024)):
        found = model.step_seconds(decode_rows=rows, context=context)
        assert found == pytest.approx(t.decode_step(rows, context), rel=0.1)
    for prompts, tokens in ((1, 128), (1, 1024), (4, 512)):
        found = model.step_seconds(prompts=[(tokens, tokens)] * prompts)
        assert found == pytest.approx(t.prefill_step(prompts, tokens), rel=0.08)
    assert all(errors.p90_abs < 0.15 for region, errors in model.line_errors.items() if "layers" in region)


def test_a_partial_model_saves_its_layers() -> None:
    model = composed(exits=(8, 16))
    assert model.exits == (8, 16, 32)
    full, part = (model.step_seconds(decode_rows=4, context=512, depth=d) for d in (32, 8))
    head, step = model.head_seconds(4), model.seconds_per["step"]
    assert part - head - step == pytest.approx((full - head - step) / 4)


def test_a_check_costs_what_the_head_does_and_a_fill_less_than_a_layer() -> None:
    model, t = composed("llama3-8b"), times("llama3-8b")
    assert model.head_seconds(16) == pytest.approx(t.head(16))
    # 1,051 MB of head against 436 MB of a layer: HELIOS.md section 6 counts 2.4 layers of weights for Llama-3-8B
    assert 1.8 < t.head(1) / t.dense(1) < 2.8
    fill = model.seconds_per["fill_layer"] + 16 * model.seconds_per["fill_layer_token"]
    assert 0 < fill < t.dense(16) / 5


def test_exit_heads_of_fixed_exits_are_counted_in_bytes() -> None:
    exits = Exits((6, 12), "fixed", ExitHead(has_norm=True))
    model = composed("opt-1.3b", dtype="fp32", exits=exits)
    assert model.exits == (6, 12, 24)
    assert model.exit_head_bytes == {6: 4 * 2 * 2048, 12: 4 * 2 * 2048}
    assert composed("opt-1.3b", exits=(6,)).exit_head_bytes == {}


def test_loads_move_the_bytes_of_a_rank_over_the_host_link() -> None:
    model = composed("opt-6.7b", dtype="fp16")
    seconds = 8 * model.layer_bytes * model.load_seconds_per["weights_byte"]
    assert seconds == pytest.approx(8 * model.layer_bytes / 24.8e9)


def test_outside_the_fitted_range_is_refused_or_allowed() -> None:
    model = composed()
    for ask in (
        {"decode_rows": 1, "context": 5000},
        {"decode_rows": 600, "context": 64},
        {"prompts": [(4096, 4096)] * 3},
    ):
        with pytest.raises(OutOfRangeError, match="outside the fitted range"):
            model.step_seconds(**ask)  # type: ignore[arg-type]
        assert model.step_seconds(**ask, allow_extrapolation=True) > 0  # type: ignore[arg-type]
    assert model.out_of_range(rows=512, context=4096, tokens=8192) is None
    edge = model.step_seconds(prompts=[(4096, 4096)] * 2)
    beyond = model.step_seconds(prompts=[(4096, 4096)] * 4, allow_extrapolation=True)
    assert beyond == pytest.approx(2 * edge, rel=0.05)


def test_what_cannot_be_composed_is_said() -> None:
    with pytest.raises(UnknownNameError, match="eager"):
        composed(host="eagre")
    with pytest.raises(UnknownNameError, match="dtype"):
        composed(dtype="int8")
    with pytest.raises(InputError, match="32 layers"):
        composed(exits=(40,))
    with pytest.raises(InputError, match="not divisible"):
        composed("sheared-llama-2.7b", tp=8)


def test_derived_parts_are_told() -> None:
    said = " ".join(composed("opt-1.3b", "A100-40GB", dtype="fp32").assumptions)
    assert "float32 is derived" in said
    assert "heads of 64" in said
    assert "1,555" in said
    assert "float32" not in " ".join(composed().assumptions)


def test_a_gpu_that_waits_for_its_host_draws_less() -> None:
    busy, waiting = composed(host="graph").watts, composed(host="eager").watts
    assert busy["idle"] == waiting["idle"] < waiting["decode"] < busy["decode"]
    power = open_device("A100-80GB").power
    assert power.idle_w < busy["decode"] <= power.decode_w


def test_a_profile_says_the_same_as_the_composed_model() -> None:
    model = composed("llama2-70b", tp=4, exits=(40,), host="vllm-2024")
    facts = model_facts(model, 10**11)
    cost = facts.step["wall"].cost()
    decode = shape(rows=8, tokens=8, decode_rows=8, context=8 * 700, checked_rows=8, longest=700)
    assert cost.seconds(decode) == pytest.approx(model.step_seconds(decode_rows=8, context=700))
    prefill = shape(
        rows=2, tokens=1024, prefill_rows=2, prefill_products=2 * 512**2, checked_rows=2, started=2, longest=512
    )
    assert cost.seconds(prefill) == pytest.approx(model.step_seconds(prompts=[(512, 512)] * 2))
    spec = facts.spec("llama2-70b")
    assert spec.weights_bytes(40) == model.base_bytes + 40 * model.layer_bytes
    assert facts.tensor_parallel == 4
    assert facts.load["wall"].seconds_per_byte == {"disk": pytest.approx(1 / 12.6e9)}
    assert (cost.max_rows, cost.max_context, cost.max_tokens) == (512, 4096, 8192)


def shape(**changes: int) -> StepShape:
    values = dict.fromkeys(StepShape._fields, 0) | {"layers": 80, "checks": 1}
    return StepShape(**(values | changes))


def test_memory_beside_weights_and_kv() -> None:
    """By hand: residual and normed states of 4,096, gate, up and their product of 11,008 / tp, two bytes each."""
    for tp in (1, 4):
        model = compose_model(open_architecture("llama2-7b"), open_device("A100-80GB"), dtype="fp16", tp=tp)
        assert model.activation_bytes_per_token == 2 * (2 * 4096 + 3 * 11008 // tp)
        assert "by the model's shapes" in model.activation_source
    assert any("32 MiB of workspace (assumed)" in line for line in model.assumptions)
    device, preset = open_device("A100-80GB"), "fastertransformer-cpp"
    model = compose_model(open_architecture("opt-6.7b"), device, dtype="fp16", host=preset)
    assert model.activation_bytes_per_token == round(device.host(preset).activation_widths * 2 * 4096)
    memory = model_facts(model, 10**11).memory
    assert memory is not None
    assert preset in memory.sources["activation_bytes_per_token"]
    assert memory.sources["workspace_bytes"] == "assumed"
