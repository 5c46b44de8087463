"""Steps in buckets give every sequence the bits it has without them, and a bucket is recorded once.

Most of it without a GPU, where nothing is recorded: the same launches on the same memory, one by one in Triton's
interpreter.
"""

import gc
import inspect
import subprocess
import weakref

import pytest
import torch
from attention_samples import require_triton
from oasst_worker.engine import Engine, EngineConfig, GenerationParams, Sequence
from oasst_worker.model.attention import PagedAttention, PlainAttention
from oasst_worker.model.config import load_config
from oasst_worker.model.neox import NeoX
from oasst_worker.model.weights import load_weights
from oasst_worker.runtime import ModelRunner, buckets

# Prompt tokens and tokens to generate: within a block and across its border, ending one after the other.
JOBS = {"a": (3, 5), "b": (15, 7), "c": (16, 3), "d": (1, 4), "e": (33, 2)}
LATE_JOB = ("late", (20, 2))


class RecordingRunner(ModelRunner):
    """Keeps the logits that each sequence drew from."""

    def __init__(self, model, **options) -> None:
        super().__init__(model, num_blocks=40, **options)
        self.logits: dict[str, list[torch.Tensor]] = {}

    def _draw(self, batch, logits, last_ids=None):
        drawing = [chunk.sequence.sequence_id for chunk in batch.chunks if chunk.draws]
        for name, row in zip(drawing, logits, strict=True):
            self.logits.setdefault(name, []).append(row.clone())
        return super()._draw(batch, logits, last_ids)


@pytest.fixture
def model(make_checkpoint) -> NeoX:
    if torch.cuda.is_available():
        pytest.skip("where there is a GPU, Triton does not interpret")
    require_triton()
    folder = make_checkpoint()
    config = load_config(folder)
    return NeoX(config, load_weights(folder, config, dtype=torch.float32), make_attention=PagedAttention)


@pytest.fixture
def recordings(monkeypatch) -> list[int]:
    """How often each recording was replayed."""
    replays: list[int] = []

    def record(compute):
        number = len(replays)
        replays.append(0)

        def replay():
            replays[number] += 1
            return compute()

        return replay

    monkeypatch.setattr(buckets, "record_nothing", record)
    return replays


def generate(runner: RecordingRunner) -> dict[str, list[torch.Tensor]]:
    """All jobs at once, and one whose prompt comes in while they decode."""
    engine = Engine(runner, EngineConfig(eos_token_id=0, max_positions=64, max_sequences=8, step_tokens=512))

    def add(name, lengths):
        prompt = [1 + (5 * position + len(name)) % 90 for position in range(lengths[0])]
        engine.add(Sequence(name, prompt, GenerationParams(lengths[1], temperature=0.0, ignore_eos=True)))

    for name, lengths in JOBS.items():
        add(name, lengths)
    for _ in range(2):
        engine.step()
    add(*LATE_JOB)
    while engine.has_work():
        engine.step()
    return runner.logits


@pytest.mark.parametrize("looks_ahead", [False, True])
def test_a_sequence_has_the_same_bits_in_buckets_and_a_bucket_is_recorded_once(model, recordings, looks_ahead):
    expected = generate(RecordingRunner(model))
    assert recordings == []
    outcome = generate(RecordingRunner(model, max_decoding=5, looks_ahead=looks_ahead))
    # Of 8, 4, 2 and 1 rows; a step later, as launching ahead lets it in, the late prompt meets the two that are left.
    assert len(recordings) == (3 if looks_ahead else 4)
    assert all(recordings)
    for name, rows in expected.items():
        assert len(outcome[name]) == len(rows)
        assert all(map(torch.equal, outcome[name], rows)), name


def test_all_buckets_can_be_made_at_once(model, recordings):
    runner = RecordingRunner(model, max_decoding=3)
    runner.make_buckets()
    assert len(recordings) == 3
    generate(runner)
    assert len(recordings) == 3


def test_what_is_replayed_has_its_memory_as_long_as_its_bucket(model, monkeypatch):
    buffers: list[weakref.ref[torch.Tensor]] = []
    prepare = PagedAttention._prepare

    def watched(self, positions, cells, numbers, longest):
        attend = prepare(self, positions, cells, numbers, longest)
        tensors = [each for each in inspect.getclosurevars(attend).nonlocals.values() if isinstance(each, torch.Tensor)]
        buffers.extend(map(weakref.ref, tensors))
        return attend

    def record(compute):
        outcome = compute()
        return lambda: outcome

    monkeypatch.setattr(PagedAttention, "_prepare", watched)
    made = buckets.DecodeBuckets(model, model.make_cache(9), padding_block=8, max_sequences=1, record=record)
    made._bucket(1)
    gc.collect()
    assert len(buffers) > 5
    assert all(buffer() is not None for buffer in buffers)


def test_a_recording_that_computes_something_else_is_not_replayed(model, monkeypatch, caplog):
    monkeypatch.setattr(buckets, "record_nothing", lambda compute: lambda: compute().flip(1))
    runner = RecordingRunner(model, max_decoding=2)
    runner.make_buckets()
    assert "kernel by kernel: steps of 1 sequences give other logits in a bucket" in caplog.text
    expected = generate(RecordingRunner(model))
    outcome = generate(runner)
    for name in JOBS:
        assert all(map(torch.equal, outcome[name], expected[name])), name


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("the driver is too old"),
        subprocess.CalledProcessError(1, "gcc"),  # Of the launcher, which Triton compiles.
        Exception("out of resource: shared memory"),  # As Triton's own, which is no RuntimeError.
    ],
)
def test_where_nothing_can_be_recorded_steps_run_without_buckets(model, monkeypatch, caplog, error):
    def fail(compute):
        raise error

    monkeypatch.setattr(buckets, "record_nothing", fail)
    runner = RecordingRunner(model, max_decoding=8)
    runner.make_buckets()
    assert f"kernel by kernel: {error}" in caplog.text
    assert {name: len(rows) for name, rows in generate(runner).items()} == {
        name: new_tokens for name, (_, new_tokens) in [*JOBS.items(), LATE_JOB]
    }


def test_attention_that_needs_more_than_tensors_runs_without_buckets(make_checkpoint):
    folder = make_checkpoint()
    config = load_config(folder)
    model = NeoX(config, load_weights(folder, config, dtype=torch.float32), make_attention=PlainAttention)
    assert not model.can_decode
    generate(RecordingRunner(model, max_decoding=8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_graphs_compute_what_plain_launches_do(make_checkpoint, caplog):
    folder = make_checkpoint()
    config = load_config(folder)
    model = NeoX(config, load_weights(folder, config, dtype=torch.float16, device=torch.device("cuda")))
    runner = ModelRunner(model, num_blocks=40, max_decoding=8)
    runner.make_buckets()
    assert runner._buckets is not None, caplog.text
