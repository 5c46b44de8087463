"""Linear layers: the fast ones equal the plain ones, and no row depends on another, to the last bit."""

import platform
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from oasst_worker.model import kernels
from oasst_worker.model.linear import (
    CompiledLinear,
    PackedLinear,
    PlainLinear,
    PlainQuantizedLinear,
    QuantizedWeight,
    TiledLinear,
    build_linear,
    build_quantized_linear,
    build_row_exact_linear,
    is_row_exact,
)

FP32, BF16 = torch.float32, torch.bfloat16
compiled_int8 = partial(CompiledLinear, quantize=True)
tiled_by_128 = partial(TiledLinear, tile_rows=128)
ROWS_WITH_A_REST = (1, 2, 33, 512, 700)


def random_layer(outputs: int, inputs: int, dtype: torch.dtype = FP32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(outputs * inputs)
    weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    return weight.to(dtype), torch.randn(outputs, generator=generator).to(dtype)


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(192, 64), (1000, 80), (64, 256), (301, 40)])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (CompiledLinear, FP32),
        (CompiledLinear, BF16),
        (compiled_int8, FP32),
        (compiled_int8, BF16),
        (PlainQuantizedLinear, FP32),
        (PackedLinear, FP32),
        (TiledLinear, FP32),
        (tiled_by_128, FP32),
    ],
)
def test_rows_do_not_depend_on_each_other(kind, dtype, shape, activation):
    assert is_row_exact(kind(*random_layer(*shape, dtype), activation), shape[1], dtype)


@pytest.mark.parametrize("num_residuals", [0, 1, 2])
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
@pytest.mark.parametrize("kind", [CompiledLinear, PackedLinear, TiledLinear, tiled_by_128])
def test_a_fast_layer_equals_the_plain_one(kind, activation, num_residuals):
    weight, bias = random_layer(96, 64)
    x, residuals = torch.randn(700, 64), torch.randn(num_residuals, 700, 96)
    expected = PlainLinear(weight, bias, activation)(x, *residuals)
    for rows in ROWS_WITH_A_REST:
        outcome = kind(weight, bias, activation)(x[:rows], *residuals[:, :rows])
        torch.testing.assert_close(outcome, expected[:rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_residuals", [0, 2])
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(96, 64), (50, 100)])
def test_bf16_is_the_fp32_product_rounded_once(shape, activation, num_residuals):
    weight, bias = random_layer(*shape, BF16)
    x, residuals = torch.randn(700, shape[1]).to(BF16), torch.randn(num_residuals, 700, shape[0]).to(BF16)
    exact = PlainLinear(weight.float(), bias.float(), activation)(x.float(), *residuals.float())
    layer = CompiledLinear(weight, bias, activation)
    for rows in ROWS_WITH_A_REST:
        outcome = layer(x[:rows], *residuals[:, :rows])
        torch.testing.assert_close(outcome.float(), exact[:rows], rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (301, 40), (64, 5000)])
def test_the_int8_kernel_gives_the_plain_paths_bits(shape, dtype):
    weight, _ = random_layer(*shape, dtype)
    x = torch.randn(200, shape[1]).to(dtype)
    layer, plain = compiled_int8(weight, None), PlainQuantizedLinear(weight, None)
    for rows in (1, 2, 17, 200):
        assert torch.equal(layer(x[:rows]), plain(x[:rows]))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_the_int8_kernel_adds_what_the_plain_path_adds(activation):
    weight, bias = random_layer(96, 64)
    x, residuals = torch.randn(40, 64), torch.randn(2, 40, 96)
    outcome = compiled_int8(weight, bias, activation)(x, *residuals)
    expected = PlainQuantizedLinear(weight, bias, activation)(x, *residuals)
    torch.testing.assert_close(outcome, expected, rtol=1e-5, atol=1e-5)


def test_int8_is_near_the_weight_it_was_made_of():
    weight, _ = random_layer(64, 256)
    quantized = QuantizedWeight.of(weight)
    error = (quantized.values * quantized.scales[:, None] - weight).abs()
    assert (error <= quantized.scales[:, None] * 0.5001).all()
    assert quantized.values.abs().amax(dim=1).eq(127).all()


@pytest.mark.parametrize("kind", [compiled_int8, PlainQuantizedLinear])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_an_int8_row_that_is_not_finite_spoils_itself_alone(kind, bad):
    weight, bias = random_layer(50, 40)
    x = torch.randn(3, 40)
    expected = kind(weight, bias)(x)
    x[1, 39] = bad
    outcome = kind(weight, bias)(x)
    assert outcome[1].isnan().all()
    assert torch.equal(outcome[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("kind", [compiled_int8, PlainQuantizedLinear])
def test_int8_rows_and_outputs_of_nothing_give_the_bias(kind):
    weight, bias = random_layer(50, 40)
    weight[7] = 0
    outcome = kind(weight, bias)(torch.stack([torch.zeros(40), torch.randn(40)]))
    assert torch.equal(outcome[0], bias)
    assert outcome[1, 7] == bias[7]


# What GCC calls a processor, and what /proc/cpuinfo says of one that can run its code: vectors of 128, 256 and 512
# bits, the last with products of bf16 and int8, but without tiles.
PROCESSORS = {
    "x86-64": set(),
    "haswell": {"avx2", "fma", "bmi2"},
    "cooperlake": {"avx512_bf16", "avx512_vnni", "avx512bw"},
}


@pytest.fixture(params=PROCESSORS)
def processor(request, monkeypatch, no_kernels_yet):
    cpuinfo = Path("/proc/cpuinfo")
    if (
        platform.machine() != "x86_64"
        or not cpuinfo.exists()
        or not PROCESSORS[request.param] <= set(cpuinfo.read_text().split())
    ):
        pytest.skip(f"this machine cannot run {request.param}'s code")
    monkeypatch.setattr(
        kernels, "_FLAGS", [flag.replace("march=native", f"march={request.param}") for flag in kernels._FLAGS]
    )


@pytest.mark.usefixtures("processor")
@pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler")
def test_other_processors_give_the_same():
    x = torch.randn(45, 300)
    weight, bias = random_layer(70, 300)
    assert torch.equal(compiled_int8(weight, None)(x), PlainQuantizedLinear(weight, None)(x))
    layer = CompiledLinear(weight.to(BF16), bias.to(BF16), "gelu")
    exact = PlainLinear(weight.to(BF16).float(), bias.to(BF16).float(), "gelu")(x.to(BF16).float())
    torch.testing.assert_close(layer(x.to(BF16)).float(), exact, rtol=2**-8, atol=1e-5)
    assert is_row_exact(layer, 300, BF16)


@pytest.mark.parametrize("kind", [CompiledLinear, compiled_int8])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (301, 40), (64, 1000)])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_any_shape_gives_the_same_bits_on_any_number_of_threads(dtype, shape, kind):
    x = torch.randn(45, shape[1]).to(dtype)
    layer = kind(*random_layer(*shape, dtype))
    expected = layer(x)
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            assert torch.equal(layer(x), expected)
    finally:
        torch.set_num_threads(threads)


def test_the_kernel_takes_any_shape():
    for shape in [(1, 1), (7, 3), (301, 40), (64, 1000)]:
        weight, x = random_layer(*shape)[0], torch.randn(45, shape[1])
        torch.testing.assert_close(CompiledLinear(weight, None)(x), PlainLinear(weight, None)(x), rtol=1e-5, atol=1e-5)


def test_the_kernel_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="do not fit 8 -> 4"):
        CompiledLinear(torch.randn(4, 8), None)(torch.randn(2, 7))
    with pytest.raises(ValueError, match=r"rows must be torch\.float32"):
        CompiledLinear(torch.randn(4, 8), None)(torch.randn(2, 8).bfloat16())
    with pytest.raises(RuntimeError, match="float16"):
        CompiledLinear(torch.randn(4, 8).half(), None)


def test_without_a_compiler_int8_runs_on_the_plain_path(monkeypatch):
    monkeypatch.setattr("oasst_worker.model.linear.load_kernels", lambda *_: None)
    assert isinstance(build_quantized_linear(torch.randn(4, 8), None), PlainQuantizedLinear)


def test_the_check_of_rows_finds_a_layer_whose_rows_do_depend():
    assert not is_row_exact(lambda x: x + x.sum() * 1e-6, 64, FP32)


def test_on_other_devices_rows_are_kept_apart_where_it_is_asked_for():
    weight = torch.empty(48, 33, device="meta")
    assert isinstance(build_linear(weight, None), PlainLinear)
    assert isinstance(build_row_exact_linear(weight, None), TiledLinear)
