"""A checkpoint comes into memory once, tells how far it is, and is converted once where that was asked for."""

import gc
import json
import logging
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import oasst_training
import pytest
import torch
from oasst_worker import loading
from oasst_worker.loading import load_model
from oasst_worker.model import weights as weights_module
from oasst_worker.model.config import CheckpointError, load_config
from oasst_worker.model.conversion import convert_bin
from oasst_worker.model.ranks import Share
from oasst_worker.model.shards import StoredTensors
from oasst_worker.model.weights import load_weights, open_weights
from oasst_worker.progress import LoadingProgress
from oasst_worker.runtime import RuntimeOptions, UnsupportedOptionError, build, build_executor
from oasst_worker.settings import StartError, WorkerSettings
from safetensors.torch import load_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

DEMO = Path(oasst_training.__file__).parent / "demo"

# Loads a model in a process of its own and prints by how many bytes its memory grew, at most and in the end.
MEASURE = """
import sys
from pathlib import Path
from oasst_worker.model.ranks import ALONE, Share
from oasst_worker.runtime.build import RuntimeOptions, open_share

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

small, large = map(Path, sys.argv[1:3])
options = RuntimeOptions(device="cpu", dtype="float32", threads=1)
warm = open_share(small, options, Share()).load(ALONE)  # Libraries and kernels are in memory.
Path("/proc/self/clear_refs").write_text("5")  # The peak counts from here.
before = memory("VmRSS")
model = open_share(large, options, Share()).load(ALONE)
print(memory("VmHWM") - before, memory("VmRSS") - before)
"""


def save(folder: Path, *, layers: int, hidden: int, shard_size: str) -> Path:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=320,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        intermediate_size=4 * hidden,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def as_bin(folder: Path, *, tied: bool = False) -> Path:
    """Replaces the safetensors by two `.bin` shards; returns the first."""
    path = folder / "model.safetensors"
    state = load_file(path)
    path.unlink()
    state["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    if tied:
        state["embed_out.weight"] = state["gpt_neox.embed_in.weight"]
    names = sorted(state)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: state[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder / "pytorch_model-00001-of-00002.bin"


def head_of(folder: Path) -> torch.Tensor:
    return load_weights(folder, load_config(folder), dtype=torch.float32).head


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for a process's peak of memory")
def test_loading_takes_the_model_and_at_most_a_shard(tmp_path):
    small = save(tmp_path / "small", layers=1, hidden=64, shard_size="1GB")
    large = save(tmp_path / "large", layers=10, hidden=512, shard_size="20MB")
    sizes = [shard.stat().st_size for shard in large.glob("*.safetensors")]
    assert len(sizes) > 5
    # Tensors as small as these have pages of their own, as those of real models do: the rest is the allocator's matter.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
    command = [sys.executable, "-c", MEASURE, small, large]
    measured = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    peak, resident = map(int, measured.split())
    slack = 20e6
    assert resident > 0.9 * sum(sizes)
    assert peak < sum(sizes) + max(sizes) + slack


def test_a_layer_is_read_when_it_is_its_turn(make_checkpoint):
    folder = make_checkpoint()
    read: list[int] = []
    weights = open_weights(
        folder, load_config(folder), dtype=torch.float32, progress=lambda done, total: read.append(done)
    )
    before = read[-1]
    layers = iter(weights.layers)
    next(layers)
    of_first = read[-1] - before
    next(layers)
    assert of_first > 0
    assert read[-1] == before + 2 * of_first


def test_a_model_in_memory_lets_go_of_the_checkpoints_files(make_checkpoint, monkeypatch):
    readers: list[weakref.ref[StoredTensors]] = []

    def open_watched(folder):
        stored = StoredTensors(folder)
        readers.append(weakref.ref(stored))
        return stored

    monkeypatch.setattr(weights_module, "StoredTensors", open_watched)
    runner = build_executor(make_checkpoint(), RuntimeOptions(device="cpu", threads=1, kv_tokens=64))
    gc.collect()
    assert [reader() for reader in readers] == [None]
    assert runner.model.is_on_one_device


@pytest.mark.parametrize("share", [Share(), Share(1, 4)])
def test_progress_ends_with_all_of_the_share(make_checkpoint, share):
    folder = make_checkpoint()
    told: list[tuple[int, int]] = []
    weights = open_weights(
        folder,
        load_config(folder),
        dtype=torch.bfloat16,
        share=share,
        progress=lambda done, total: told.append((done, total)),
    )
    layers = list(weights.layers)
    assert told[-1][0] == told[-1][1]
    assert told == sorted(told)
    assert told[-1][1] > sum(layer.qkv_weight.nbytes for layer in layers)


def test_without_a_terminal_progress_is_a_line_every_ten_seconds(caplog):
    now_s = 0.0
    progress = LoadingProgress(clock=lambda: now_s)
    with caplog.at_level(logging.INFO):
        for now_s in range(25):  # What the clock shows.
            progress(now_s * 10**9, 24 * 10**9)
    progress.close()
    assert [record.getMessage() for record in caplog.records] == [
        "loading gb=10.0 of_gb=24.0",
        "loading gb=20.0 of_gb=24.0",
    ]


@pytest.mark.parametrize("tied", [False, True])
def test_converted_weights_are_the_bin_files(make_checkpoint, tmp_path, tied):
    folder = make_checkpoint(tie_word_embeddings=tied)
    as_bin(folder, tied=tied)
    converted = convert_bin(folder, tmp_path / "cache")
    assert sorted(path.suffix for path in converted.iterdir() if path.name.startswith("model-")) == [".safetensors"] * 2
    assert load_config(converted) == load_config(folder)
    assert torch.equal(head_of(converted), head_of(folder))


def test_a_checkpoint_is_converted_once_and_again_when_it_changed(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    shard = as_bin(folder)
    first = convert_bin(folder, tmp_path / "cache")
    files = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert convert_bin(folder, tmp_path / "cache") == first
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == files
    os.utime(shard, ns=(1, 1))
    assert convert_bin(folder, tmp_path / "cache") != first


def test_safetensors_are_not_converted(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    assert convert_bin(folder, tmp_path / "cache") == folder
    assert not (tmp_path / "cache").exists()


def test_a_conversion_that_fails_leaves_nothing_behind(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    shard = as_bin(folder)
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=shard.name):
        convert_bin(folder, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    as_bin(folder)
    (tmp_path / "cache").touch()
    with pytest.raises(CheckpointError, match="cache: cannot keep a converted checkpoint"):
        convert_bin(folder, tmp_path / "cache")


def settings_of(model: Path, **fields) -> WorkerSettings:
    return WorkerSettings(model=str(model), device="cpu", threads=1, _cli_parse_args=False, **fields)


def test_a_budget_too_small_for_its_sequences_is_told_before_anything_is_loaded(tmp_path):
    with pytest.raises(StartError, match=r"step_tokens must be at least max_sequences [+] 4 = 36, not 20"):
        load_model(settings_of(tmp_path / "nothing", max_sequences=32, step_tokens=20))


def test_an_error_that_is_no_options_fault_keeps_its_traceback(monkeypatch):
    def fail(*_, **__):
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(loading, "build_executor", fail)
    with pytest.raises(ValueError, match="a mistake of ours"):
        load_model(settings_of(DEMO))


def test_a_gpu_without_memory_for_the_model_is_told_with_what_to_change(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 23 GiB.")

    monkeypatch.setattr(build, "open_share", fail)
    with pytest.raises(StartError, match=r"fewer --kv-tokens, .* --offload cpu: CUDA out of memory"):
        load_model(settings_of(DEMO))


def test_the_ranks_of_an_engine_that_cannot_be_made_are_ended(monkeypatch):
    closed: list[bool] = []
    ranks = SimpleNamespace(close=lambda: closed.append(True))
    executor = SimpleNamespace(ranks=ranks, device=torch.device("cpu"), is_row_exact=True)
    monkeypatch.setattr(loading, "build_executor", lambda *_, **__: executor)
    with pytest.raises(AttributeError):  # It is no executor that an engine could be made of.
        load_model(settings_of(DEMO))
    assert closed == [True]


@pytest.mark.parametrize(
    ("kv_tokens", "said"),
    [(None, "leave the machine no memory for 16 positions of KV cache"), (5, "--kv-tokens must be at least 16, not 5")],
)
def test_no_room_for_a_cache_is_blamed_on_an_option_only_if_it_was_given(make_checkpoint, monkeypatch, kv_tokens, said):
    monkeypatch.setattr(build, "usable_bytes", lambda _: 0)
    with pytest.raises(UnsupportedOptionError, match=said):
        build_executor(make_checkpoint(), RuntimeOptions(device="cpu", threads=1, kv_tokens=kv_tokens))


@pytest.mark.parametrize(
    ("device", "is_row_exact", "expected"), [("cpu", True, 8), ("cpu", False, 0), ("cuda", True, 0)]
)
def test_guesses_are_made_by_default_where_they_change_no_token(device, is_row_exact, expected):
    executor = SimpleNamespace(device=torch.device(device), is_row_exact=is_row_exact)
    assert loading._speculation(None, executor) == expected


@pytest.mark.parametrize(("asked", "is_row_exact", "warns"), [(4, False, True), (4, True, False), (0, False, False)])
def test_guesses_that_may_change_a_token_are_made_where_they_are_asked_for_and_told_of(
    asked, is_row_exact, warns, caplog
):
    executor = SimpleNamespace(device=torch.device("cuda"), is_row_exact=is_row_exact)
    assert loading._speculation(asked, executor) == asked
    assert ("may change an answer" in caplog.text) is warns
