"""The measurement of a GPU runs from end to end where there is none, on a tiny model."""

import dataclasses
import json

import pytest
import torch
from oasst_worker.engine import OutOfDeviceMemoryError
from oasst_worker.model.neox import NeoX
from oasst_worker.runtime import ModelRunner

from bench import gpu
from bench.engine import OURS
from bench.peers.programs import transformers_continuous


def test_every_part_of_it_measures_something(tmp_path, monkeypatch):
    file = tmp_path / "figures.json"
    tiny = ["--device", "cpu", "--shape", "tiny", "--dtype", "float32", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", ["bench.gpu", *tiny, "--json", str(file)])
    assert gpu.main() == 0
    figures = json.loads(file.read_text())
    shape = gpu.SHAPES["tiny"]
    decoded = {(row["way"], row["context"], row["sequences"]) for row in figures["steps"] if row["kind"] == "decode"}
    assert decoded == {
        (way, context, batch)
        for way in ("plain", "row-exact", "fp8 cache")
        for context in shape.contexts
        for batch in shape.batches
    }
    assert [row["concurrent"] for row in figures["peers"]] == list(shape.batches)
    assert all(set(row["same_tokens"].values()) == {1.0} for row in figures["peers"])
    assert [row["sequences"] for row in figures["lookahead"]] == list(shape.batches)
    assert 0 < figures["mixed"][0]["kv_waste"] < 0.5


def test_the_engine_and_the_peer_may_compute_as_many_tokens_in_a_step(monkeypatch):
    step_tokens = []

    def make_config(*, max_batch_tokens, **_):
        step_tokens.append(max_batch_tokens)

    monkeypatch.setattr(transformers_continuous, "ContinuousBatchingConfig", make_config)
    tiny = gpu.SHAPES["tiny"]
    reference = gpu.random_model(tiny, torch.device("cpu"), torch.float32)
    model = NeoX(*gpu.share_weights(reference))
    gpu.systems_on(model, reference, tiny, 1)
    assert step_tokens == [gpu._engine_config(model, 1).step_tokens]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, OutOfDeviceMemoryError, MemoryError])
def test_a_peer_that_the_memory_does_not_hold_is_left_out(error, monkeypatch, capsys):
    def never_fits(prompts, new_tokens):
        raise error("no room")

    monkeypatch.setattr(gpu, "continuous_batching", lambda *_, **__: never_fits)
    tiny = dataclasses.replace(gpu.SHAPES["tiny"], batches=(1,), peer_tokens=(8, 2))
    reference = gpu.random_model(tiny, torch.device("cpu"), torch.float32)
    [row] = gpu.measure_peers(NeoX(*gpu.share_weights(reference)), reference, tiny, rounds=1)
    assert row.tokens_per_s.keys() == {OURS, "transformers generate"}
    assert "transformers continuous batching with 1 sequences does not fit" in capsys.readouterr().err


def test_steps_for_which_the_memory_was_too_small_are_not_measured(monkeypatch):
    tiny = gpu.SHAPES["tiny"]
    model = NeoX(*gpu.share_weights(gpu.random_model(tiny, torch.device("cpu"), torch.float32)))
    launch = ModelRunner.launch

    def launch_few(runner, batch, *more, **options):
        if len(batch.chunks) > 2:
            raise OutOfDeviceMemoryError("no room for three")
        return launch(runner, batch, *more, **options)

    monkeypatch.setattr(ModelRunner, "launch", launch_few)
    with pytest.raises(OutOfDeviceMemoryError, match="all sequences at once"):
        gpu._decode_steps(model, 4, 32, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.gpu"])
    assert gpu.main() == 2
    assert "PyTorch finds no CUDA device here" in capsys.readouterr().err
