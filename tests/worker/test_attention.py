"""The compiled attention gives what the plain one gives, and a row's bits depend on its own positions alone."""

import random
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from attention_samples import NUM_BLOCKS, attend_in_chunks, make_config, make_inputs, make_unread_cache
from oasst_worker.model import kernels
from oasst_worker.model.attention import FP8, INT8, CompiledAttention, PlainAttention, build_attention
from oasst_worker.model.attention.interface import from_int8, to_fp8, to_int8

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(64, 16), (64, 64), (128, 32), (80, 20), (40, 10), (8, 2), (20, 0)]
)
@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "tolerance"),
    [
        (torch.float32, None, 1e-5),
        (torch.float32, INT8, 1e-2),  # Two ways may round a number to neighbours.
        (torch.bfloat16, None, 3e-2),
        (torch.bfloat16, INT8, 4e-2),
    ],
)
def test_it_equals_the_plain_path(head_dim, rotary_dim, dtype, kv_dtype, tolerance):
    config = make_config(head_dim, rotary_dim)
    qkv = torch.randn(333, 3 * config.hidden_size, dtype=dtype)
    blocks = random.Random(0).sample(range(NUM_BLOCKS), 21)
    plain = PlainAttention(config, dtype=dtype, device=CPU, kv_dtype=kv_dtype)
    expected = attend_in_chunks(plain, qkv, [], blocks)
    outcome = attend_in_chunks(CompiledAttention(config, dtype=dtype, kv_dtype=kv_dtype), qkv, [], blocks)
    torch.testing.assert_close(outcome, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kv_dtype", [None, INT8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 40])
def test_a_rows_bits_depend_neither_on_chunks_nor_on_blocks_nor_on_threads(head_dim, dtype, kv_dtype):
    config = make_config(head_dim, rotary_dim=head_dim // 4 // 2 * 2)
    qkv = torch.randn(200, 3 * config.hidden_size, dtype=dtype)
    attention = CompiledAttention(config, dtype=dtype, kv_dtype=kv_dtype)
    rng = random.Random(0)
    expected = attend_in_chunks(attention, qkv, list(range(1, 200)), list(range(13)))
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            borders = sorted(rng.sample(range(1, 200), 5))
            blocks = rng.sample(range(NUM_BLOCKS), 13)
            assert torch.equal(attend_in_chunks(attention, qkv, borders, blocks), expected), (num_threads, borders)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kv_dtype", [None, INT8])
def test_sequences_beside_each_other_do_not_touch(kv_dtype):
    config = make_config(64, 16)
    attention = CompiledAttention(config, dtype=torch.float32, kv_dtype=kv_dtype)
    one, other = torch.randn(70, 3 * config.hidden_size), torch.randn(33, 3 * config.hidden_size)
    cache = make_unread_cache(attention)
    inputs = make_inputs([(0, 70, [9, 3, 5, 40, 41]), (0, 33, [2, 0, 7])])
    together = attention.prepare(inputs)(torch.cat([one, other]), cache[0])
    assert torch.equal(together[:70], attend_in_chunks(attention, one, [], list(range(5))))
    assert torch.equal(together[70:], attend_in_chunks(attention, other, [], list(range(3))))


@pytest.mark.parametrize("kv_dtype", [None, INT8])
def test_a_sequence_that_is_not_finite_leaves_the_others_finite(kv_dtype):
    config = make_config(64, 16)
    attention = CompiledAttention(config, dtype=torch.float32, kv_dtype=kv_dtype)
    broken, sound = torch.full((20, 3 * config.hidden_size), torch.nan), torch.randn(20, 3 * config.hidden_size)
    cache = attention.make_cache(NUM_BLOCKS)
    inputs = make_inputs([(0, 20, [0, 1]), (0, 20, [2, 3])])
    outcome = attention.prepare(inputs)(torch.cat([broken, sound]), cache[0])
    assert outcome[:20].isnan().all()
    assert outcome[20:].isfinite().all()


def test_fp8_takes_the_nearest_number_and_the_largest_for_what_is_larger():
    exact = [0.0, 2**-9, 7 * 2**-9, 2**-6, 1.0, 1.125, 448.0]
    rounded = {1.0624: 1.0, 1.0625: 1.0, 1.0626: 1.125, 1.1875: 1.25, 2**-10: 0.0, 3 * 2**-10: 2**-8, 1e-30: 0.0}
    numbers = {**dict(zip(exact, exact, strict=True)), **rounded, 460.0: 448.0, 470.0: 448.0, 1e38: 448.0}
    for sign in (1, -1):
        outcome = to_fp8(sign * torch.tensor([*numbers])).float()
        assert torch.equal(outcome, sign * torch.tensor([*numbers.values()]))
    assert to_fp8(torch.tensor([torch.nan, torch.inf, -torch.inf])).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_off_by_half_a_127th_of_the_largest_at_most(dtype):
    x = torch.randn(50, 64).to(dtype) * torch.logspace(-20, 20, 50)[:, None].to(dtype)
    held = to_int8(x)
    assert held.shape == (50, 68)
    assert (held[:, :64].abs().amax(dim=1) == 127).all()
    off = (from_int8(held, torch.float32) - x.float()).abs() / x.float().abs().amax(dim=1, keepdim=True)
    assert off.max() < 0.5001 / 127
    assert torch.equal(from_int8(to_int8(torch.zeros(1, 8)), dtype), torch.zeros(1, 8, dtype=dtype))


def test_the_kernel_attends_to_keys_and_values_as_int8_holds_them():
    config = make_config(64, 0)  # Nothing is rotated, so what the cache holds can be said beforehand.
    qkv = torch.randn(100, 3 * 192)
    held = from_int8(to_int8(qkv[:, 192:].unflatten(1, (6, 64))), torch.float32).flatten(1)
    attention = CompiledAttention(config, dtype=torch.float32, kv_dtype=INT8)
    blocks = random.Random(0).sample(range(NUM_BLOCKS), 7)
    outcome = attend_in_chunks(attention, qkv, [64, 97], blocks)
    expected = attend_in_chunks(
        CompiledAttention(config, dtype=torch.float32), torch.cat([qkv[:, :192], held], dim=1), [64, 97], blocks
    )
    torch.testing.assert_close(outcome, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_plain_path_attends_to_keys_and_values_as_fp8_holds_them(dtype):
    config = make_config(64, 0)  # Nothing is rotated, so what the cache holds can be said beforehand.
    qkv = torch.randn(100, 3 * 192).to(dtype)
    qkv[:, 384:] *= 300  # Some values are too large for fp8.
    held = torch.cat([qkv[:, :192], to_fp8(qkv[:, 192:]).to(dtype)], dim=1)
    attention = PlainAttention(config, dtype=dtype, device=CPU, kv_dtype=FP8)
    assert attention.make_cache(NUM_BLOCKS).itemsize == 1
    blocks = random.Random(0).sample(range(NUM_BLOCKS), 7)
    outcome = attend_in_chunks(attention, qkv, [64, 97], blocks, prompt_end=97)
    expected = attend_in_chunks(PlainAttention(config, dtype=dtype, device=CPU), held, [64, 97], blocks, prompt_end=97)
    assert torch.equal(outcome, expected)
    assert not torch.equal(held, qkv)


@pytest.mark.parametrize(
    "make_attention",
    [
        partial(PlainAttention, device=CPU, kv_dtype=FP8),
        partial(PlainAttention, device=CPU, kv_dtype=INT8),
        partial(CompiledAttention, kv_dtype=INT8),
    ],
)
@pytest.mark.parametrize("part", [1, 2])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_a_key_or_value_that_is_not_finite_is_seen_in_a_narrow_cache_too(number, part, make_attention):
    config = make_config(64, 16)
    qkv = torch.randn(40, 3, config.hidden_size)
    qkv[24, part] = number  # The first of rows that share loads: those behind it are lost anyway.
    attention = make_attention(config, dtype=torch.float32)
    outcome = attend_in_chunks(attention, qkv.flatten(1), [], [2, 0, 1], prompt_end=0)
    assert outcome[:24].isfinite().all()
    assert outcome[24:].isnan().all()


def test_on_a_cpu_an_fp8_cache_is_the_plain_paths(caplog):
    attention = build_attention(make_config(64, 16), dtype=torch.float32, device=CPU, kv_dtype=FP8)
    assert isinstance(attention, PlainAttention)
    assert attention.make_cache(1).dtype is FP8
    assert (
        "attention runs on the plain path: no attention kernel for rows of torch.float32 and a cache of" in caplog.text
    )


@pytest.mark.usefixtures("no_kernels_yet")
@pytest.mark.parametrize("fault", ["no compiler", "a compiler that fails"])
def test_without_a_working_compiler_the_plain_path_serves(fault, monkeypatch, caplog):
    def fail(command, **_):
        raise subprocess.CalledProcessError(1, command, stderr="unknown option")

    if fault == "no compiler":
        monkeypatch.setattr(kernels.shutil, "which", lambda _: None)
    else:
        monkeypatch.setattr(kernels.subprocess, "run", fail)
    attention = build_attention(make_config(64, 16), dtype=torch.float32, device=CPU)
    assert isinstance(attention, PlainAttention)
    assert "attention runs on the plain path" in caplog.text


@pytest.mark.usefixtures("no_kernels_yet")
def test_a_kernel_that_is_compiled_and_cannot_be_loaded_says_what_may_be_wrong(monkeypatch, caplog):
    # As on a mount that is noexec: the compiler is content, and the loader will not map what it wrote.
    def write_what_is_no_library(command, **_):
        Path(command[command.index("-o") + 1]).write_bytes(b"")

    monkeypatch.setattr(kernels.subprocess, "run", write_what_is_no_library)
    assert kernels.load_kernels("attention") is None
    assert "attention runs on the plain path" in caplog.text
    assert "the compiled kernel cannot be loaded" in caplog.text
    assert "noexec" in caplog.text


@pytest.mark.usefixtures("no_kernels_yet")
def test_a_compiler_that_fails_makes_way_for_the_next(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "_COMPILERS", ("false", *kernels._COMPILERS))
    assert kernels.load_kernels("attention", *kernels.SIZES) is not None
    assert not caplog.text


@pytest.mark.usefixtures("no_kernels_yet")
def test_every_compilers_fault_is_told_once(tmp_path, monkeypatch, caplog):
    for name, fault in (("cc", "No space left on device"), ("clang", "'omp.h' file not found")):
        compiler = tmp_path / name
        compiler.write_text(f'#!/bin/sh\necho "{fault}" >&2\nexit 1\n')
        compiler.chmod(0o755)
    (tmp_path / "gcc").symlink_to("cc")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert kernels.load_kernels("attention", *kernels.SIZES) is None
    told = f"{tmp_path}/cc: No space left on device; {tmp_path}/clang: 'omp.h' file not found"
    assert caplog.messages == [f"attention runs on the plain path: {told}"]


def test_scores_too_large_for_fp16_are_scaled_before_they_are_rounded():
    config = make_config(128, 0)
    qkv = torch.full((20, 3 * config.hidden_size), 24.0, dtype=torch.float16)
    attention = PlainAttention(config, dtype=torch.float16, device=CPU)
    by_tiles, by_tokens = (attend_in_chunks(attention, qkv, [], [0, 1], prompt_end) for prompt_end in (20, 0))
    assert torch.equal(by_tiles, torch.full_like(by_tiles, 24.0))
    assert torch.equal(by_tokens, by_tiles)
