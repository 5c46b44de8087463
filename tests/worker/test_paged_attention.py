"""Triton's attention gives what the plain one gives, and a sequence's bits depend on that sequence alone.

Without a GPU the kernels run in Triton's interpreter: the same program, its products by NumPy.
"""

import os
import random
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from attention_samples import NUM_BLOCKS, attend_in_chunks, make_config, make_inputs, require_triton
from oasst_worker.model import attention as attention_package
from oasst_worker.model.attention import FP8, PagedAttention, PlainAttention, build_attention, try_attention
from oasst_worker.model.attention.interface import to_fp8
from oasst_worker.model.inputs import BLOCK_SIZE

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCES = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}
# Of rows and cache.
DTYPES = [(dtype, kv_dtype) for dtype in TOLERANCES for kv_dtype in (dtype, FP8)]
# Around the borders of blocks, of tiles and of the parts that a generated token's positions are cut into.
LENGTHS = [1, 15, 16, 63, 64, 65, 127]
GENERATED = 3
# Shared memory that a program may have on any card from 8.0 on.
LEAST_SHARED_BYTES = 99 * 1024


@pytest.fixture(scope="module", autouse=True)
def _triton():
    """Triton, and products of bf16 in its interpreter, which takes their bits for integers."""
    require_triton()
    if DEVICE.type == "cuda":
        yield
        return
    from triton import language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    create_dot = builder.create_dot

    def create_dot_of_fp32(self, a, b, d, *options):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.create_fp_to_fp(each, tl.float32, None) for each in (a, b))
        return create_dot(self, a, b, d, *options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_dot", create_dot_of_fp32)
        yield


def make_attention(dtype=torch.float32, kv_dtype=None) -> PagedAttention:
    return PagedAttention(make_config(64, 16, num_heads=2), dtype=dtype, device=DEVICE, kv_dtype=kv_dtype)


def make_sequences(dtype: torch.dtype) -> list[tuple[torch.Tensor, list[int]]]:
    """Rows and blocks of a prompt of each length and a few generated tokens, blocks scattered."""
    generator, free = torch.Generator().manual_seed(0), random.Random(0).sample(range(NUM_BLOCKS), NUM_BLOCKS)
    sequences = []
    for length in LENGTHS:
        rows = torch.randn(length + GENERATED, 3 * 2 * 64, generator=generator).to(DEVICE, dtype)
        num_blocks = -(-len(rows) // BLOCK_SIZE)
        blocks, free = free[:num_blocks], free[num_blocks:]
        sequences.append((rows, blocks))
    return sequences


def attend_alone(attention, rows: torch.Tensor) -> torch.Tensor:
    """The prompt in one step, each generated token in one of its own."""
    prompt_end = len(rows) - GENERATED
    blocks = list(range(-(-len(rows) // BLOCK_SIZE)))
    return attend_in_chunks(attention, rows, list(range(prompt_end, len(rows))), blocks, prompt_end)


@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "dtype", "kv_dtype"),
    [
        *((64, 16, *dtypes) for dtypes in DTYPES),
        *((*dims, torch.float32, torch.float32) for dims in ((128, 32), (80, 20), (40, 40), (8, 2), (20, 0))),
        *((*dims, torch.float16, FP8) for dims in ((128, 32), (20, 0))),
    ],
)
def test_it_equals_the_plain_path(head_dim, rotary_dim, dtype, kv_dtype):
    config = make_config(head_dim, rotary_dim)
    qkv = torch.randn(135, 3 * config.hidden_size, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    blocks = random.Random(0).sample(range(NUM_BLOCKS), 9)
    outcomes = [
        attend_in_chunks(
            kind(config, dtype=dtype, device=DEVICE, kv_dtype=kv_dtype), qkv, [64, 127], blocks, prompt_end=127
        )
        for kind in (PagedAttention, PlainAttention)
    ]
    torch.testing.assert_close(*outcomes, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES)
def test_a_sequences_bits_do_not_depend_on_its_batch(dtype, kv_dtype):
    attention, sequences = make_attention(dtype, kv_dtype), make_sequences(dtype)
    alone = [attend_alone(attention, rows) for rows, _ in sequences]
    rng = random.Random(1)
    for number_together in (len(sequences), 3):
        cache = attention.make_cache(NUM_BLOCKS).fill_(torch.nan)[0]
        together = rng.sample(range(len(sequences)), number_together)
        # First all prompts, then each generated token beside the others'.
        for step in range(GENERATED + 1):
            chunks, rows, expected = [], [], []
            for number in together:
                of_one, blocks = sequences[number]
                prompt_end = len(of_one) - GENERATED
                start, end = (0, prompt_end) if step == 0 else (prompt_end + step - 1, prompt_end + step)
                chunks.append((start, end, blocks))
                rows.append(of_one[start:end])
                expected.append(alone[number][start:end])
            inputs = make_inputs(chunks, prompt_end=1024 if step == 0 else 0, device=DEVICE)
            outcome = attention.prepare(inputs)(torch.cat(rows), cache)
            assert torch.equal(outcome, torch.cat(expected)), (step, together)


@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES)
def test_a_sequence_computed_again_has_the_same_bits_however_it_is_cut(dtype, kv_dtype):
    attention = make_attention(dtype, kv_dtype)
    rows, blocks = make_sequences(dtype)[-1]
    prompt_end = len(rows) - GENERATED
    again = attend_in_chunks(attention, rows, [64], blocks, prompt_end)
    assert torch.equal(again, attend_alone(attention, rows))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter.
@pytest.mark.parametrize("kv_dtype", [torch.float32, FP8])
@pytest.mark.parametrize("broken_part", ["all", "keys", "values"])
@pytest.mark.parametrize("broken_number", [torch.nan, torch.inf])
def test_a_sequence_that_is_not_finite_leaves_the_others_as_they_are(broken_number, broken_part, kv_dtype):
    attention = make_attention(kv_dtype=kv_dtype)
    (sound, blocks), (other, other_blocks) = make_sequences(torch.float32)[3:5]
    broken = other.clone()
    parts = {"all": slice(None), "keys": slice(128, 256), "values": slice(256, None)}
    broken[:, parts[broken_part]] = broken_number
    cache = attention.make_cache(NUM_BLOCKS)[0]
    inputs = make_inputs([(0, len(other), other_blocks), (0, len(sound), blocks)], device=DEVICE)
    outcome = attention.prepare(inputs)(torch.cat([broken, sound]), cache)
    assert not outcome[: len(broken)].isfinite().any()
    assert torch.equal(outcome[len(broken) :], attend_in_chunks(attention, sound, [], blocks))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter.
def test_fp8_is_written_as_the_plain_path_writes_it():
    # All numbers of fp16 and bf16; of fp32's lower half all that a rounding can tell apart: nothing, or something.
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    numbers = torch.cat([*((upper | lower).view(torch.float32) for lower in (0, 1, 2**15, 2**16 - 1)), halves.float()])
    values = numbers.view(-1, 8 * 128)
    qkv = torch.cat([torch.zeros(len(values), 2 * 8 * 128), values], dim=1).to(DEVICE)
    attention = PagedAttention(make_config(128, 0, num_heads=8), dtype=torch.float32, device=DEVICE, kv_dtype=FP8)
    blocks = [*range(len(values) // BLOCK_SIZE)]
    cache = attention.make_cache(len(blocks))
    attention.prepare(make_inputs([(0, len(values), blocks)], device=DEVICE))(qkv, cache[0])
    written = cache[0, :, 1].transpose(1, 2).reshape(-1).cpu()
    expected = to_fp8(numbers)
    assert torch.equal(written.isnan(), expected.isnan())
    is_number = ~expected.isnan()
    assert torch.equal(written.view(torch.uint8)[is_number], expected.view(torch.uint8)[is_number])


@pytest.mark.parametrize("is_prompt", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_every_number_of_fp8_is_read_as_it_is(dtype, is_prompt):
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8).to(DEVICE, dtype)
    qkv = torch.cat([torch.zeros(2 * 256, device=DEVICE, dtype=dtype), numbers])[None]
    attention = PagedAttention(make_config(128, 0, num_heads=2), dtype=dtype, device=DEVICE, kv_dtype=FP8)
    # A position that attends to itself alone gives its own value.
    attended = attend_in_chunks(attention, qkv, [], [0], prompt_end=int(is_prompt))
    torch.testing.assert_close(attended[0], numbers, rtol=0, atol=0, equal_nan=True)


def test_kernels_are_launched_on_the_device_that_has_the_cache(monkeypatch):
    current: list[torch.device] = []
    launched_on: dict[str, list[torch.device]] = {}

    @contextmanager
    def make_current(device):
        current.append(device)
        yield
        current.pop()

    class Kernels:
        def __getattr__(self, name):
            return Kernel(name)

    class Kernel:
        def __init__(self, name) -> None:
            self.name = name

        def __getitem__(self, grid):
            return lambda *_, **__: launched_on.setdefault(self.name, [*current])

    monkeypatch.setattr(torch.cuda, "device", make_current)
    device = torch.device("meta")  # Like a second GPU: no CPU, and not the current device.
    attention = PagedAttention(make_config(64, 16), dtype=torch.float32, device=device)
    monkeypatch.setattr(attention, "_kernels", Kernels())
    rows = torch.empty(9, 3 * 3 * 64, device=device)
    attention.prepare(make_inputs([(0, 9, [0])], prompt_end=8))(rows, attention.make_cache(1)[0])
    assert launched_on.keys() == {"write_rows", "attend_tile", "attend_part", "join_parts"}
    assert all(devices == [device] for devices in launched_on.values())
    assert not current


@pytest.mark.parametrize("cache_dtype", ["fp16", "u8"])
@pytest.mark.parametrize("capability", ["80", "90"])
def test_the_kernels_compile_for_cards_that_are_not_here(capability, cache_dtype, tmp_path):
    script = Path(__file__).with_name("kernels_for_cards.py")
    compiled = subprocess.run(
        [sys.executable, script, capability, "fp16", cache_dtype],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert compiled.returncode == 0, compiled.stderr
    names, shared_bytes = zip(*(line.split() for line in compiled.stdout.splitlines()), strict=True)
    assert sorted(names) == ["attend_part", "attend_part", "attend_tile", "join_parts", "write_rows"]
    assert max(map(int, shared_bytes)) <= LEAST_SHARED_BYTES


@pytest.mark.parametrize("kv_dtype", [torch.float32, FP8])
@pytest.mark.parametrize("max_positions", [1024, 32])
def test_it_passes_its_trial(max_positions, kv_dtype):
    config = make_config(64, 16)
    object.__setattr__(config, "max_positions", max_positions)
    try_attention(PagedAttention, config, dtype=torch.float32, device=DEVICE, kv_dtype=kv_dtype)


@pytest.mark.parametrize("kv_dtype", [torch.float32, FP8])
def test_an_attention_that_computes_something_else_fails_its_trial(kv_dtype):
    def make_wrong(config, **options):
        attention = PagedAttention(config, **options)
        attention._scale *= 1.1
        return attention

    with pytest.raises(RuntimeError, match="differs from the plain path"):
        try_attention(make_wrong, make_config(64, 16), dtype=torch.float32, device=DEVICE, kv_dtype=kv_dtype)


def test_where_it_fails_the_plain_path_serves(monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("no compiler for the launcher")

    monkeypatch.setattr(attention_package, "try_attention", fail)
    # A device that is no CPU and is everywhere.
    attention = build_attention(make_config(64, 16), dtype=torch.float16, device=torch.device("meta"))
    assert isinstance(attention, PlainAttention)
    assert "attention runs on the plain path: no compiler for the launcher" in caplog.text
