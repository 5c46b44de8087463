"""A running gateway with real neighbours: Valkey, a tokenizer of its own, and a worker that answers by rule."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gateway_harness import Gateway, RuleWorker, start_gateway
from oasst_gateway.model import ServedModel, load_model
from oasst_jobs import QueueClient, connect
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

MAX_POSITIONS = 256

_TEXTS = [
    "What is a meme? A meme is an idea that people copy from one another.",
    "Hello, how are you today? I am well, thank you, and I like the weather.",
    "Grüße aus Köln! 日本語もあります。 Emoji 👍 and  spaces   too.",
] * 20


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a gateway reads it. The control tokens stand in an odd order, and one is not flagged special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("   ", normalized=True), AddedToken("  ", normalized=True)])
    tokenizer.add_special_tokens(["<|assistant|>", "<|prefix_end|>", "<|prefix_begin|>"])
    tokenizer.add_tokens([AddedToken("<|prompter|>", special=False, normalized=False)])
    tokenizer.add_special_tokens(["<|system|>"])
    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer.save(str(folder / "tokenizer.json"))
    vocab_size = tokenizer.get_vocab_size() + 7
    (folder / "config.json").write_text(
        f'{{"vocab_size": {vocab_size}, "max_position_embeddings": {MAX_POSITIONS}}}', encoding="utf-8"
    )
    return folder


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> ServedModel:
    return load_model(str(checkpoint), name="tiny", max_prompt_tokens=None, max_new_tokens=None, max_choices=4)


@pytest.fixture
async def gateway(model: ServedModel, valkey_url: str) -> AsyncIterator[Gateway]:
    async with start_gateway(model, valkey_url) as running:
        yield running


@pytest.fixture
async def queue(valkey_url: str) -> AsyncIterator[QueueClient]:
    redis = connect(valkey_url)
    yield QueueClient(redis)
    await redis.aclose()


@pytest.fixture
async def worker(queue: QueueClient) -> AsyncIterator[RuleWorker]:
    rule_worker = RuleWorker(queue, model_name="tiny")
    task = asyncio.create_task(rule_worker.run())
    yield rule_worker
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
