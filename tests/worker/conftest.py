"""Tiny random GPT-NeoX checkpoints, as transformers makes and saves them; a queue, and workers on it."""

import functools
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import torch
from oasst_jobs import QueueClient, connect
from oasst_worker.model import kernels
from running_worker import RunningWorker
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from watched_queue import Queue

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.fixture
def make_model() -> Callable[..., GPTNeoXForCausalLM]:
    """Makes a random model: `make_model(tie_word_embeddings=True)` overrides fields of `GPTNeoXConfig`."""

    def make(**fields) -> GPTNeoXForCausalLM:
        torch.manual_seed(0)
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**TINY | fields))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)  # Biases and norms too: their defaults would hide mistakes.
        return model.eval()

    return make


@pytest.fixture
def make_checkpoint(make_model, tmp_path) -> Callable[..., Path]:
    """Saves a random model as safetensors and returns its folder; `max_shard_size` splits it."""

    def make(*, max_shard_size="1GB", **fields) -> Path:
        folder = tmp_path / "checkpoint"
        make_model(**fields).save_pretrained(folder, max_shard_size=max_shard_size)
        return folder

    return make


@pytest.fixture
def no_kernels_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled anew in this test, and those of other tests are kept for them."""
    monkeypatch.setattr(kernels, "start_compiling", functools.cache(kernels.start_compiling.__wrapped__))


@pytest.fixture
async def queue(valkey_url: str) -> AsyncIterator[Queue]:
    redis = connect(valkey_url)
    yield Queue(QueueClient(redis))
    await redis.aclose()


@pytest.fixture
async def start_worker(valkey_url: str) -> AsyncIterator[Callable[..., RunningWorker]]:
    """Starts workers, each with its own connections, and ends them."""
    workers: list[RunningWorker] = []
    connections = []

    def start(worker_id: str = "worker", **settings) -> RunningWorker:
        connections.append(connect(valkey_url))
        workers.append(RunningWorker(QueueClient(connections[-1]), worker_id, **settings))
        return workers[-1]

    yield start
    for worker in workers:
        await worker.die()
    for connection in connections:
        await connection.aclose()
