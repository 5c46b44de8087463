"""The measurement of a GPU runs from end to end where there is none, on a tiny model."""

import json

import pytest
import torch

from bench import gpu


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.gpu"])
    assert gpu.main() == 2
    assert "PyTorch finds no CUDA device here" in capsys.readouterr().err
