"""Prompts under sampling configs, through the service."""

import asyncio
import hashlib
from collections.abc import Callable, Sequence

from oasst_client import AsyncClient, Priority

from oasst_cli.report.configs import SamplingConfig, chat_options
from oasst_cli.report.document import PromptResults, SamplingResult
from oasst_cli.report.journal import Journal

__all__ = ["sample_prompts", "seed_of"]


async def sample_prompts(
    client: AsyncClient,
    prompts: Sequence[str],
    configs: Sequence[SamplingConfig],
    journal: Journal,
    *,
    num_samples: int,
    seed: int,
    concurrency: int,
    skip_control_tokens: bool,
    on_finished: Callable[[], None],
) -> None:
    """Every prompt is in the journal, under every config.

    `concurrency` prompts run at a time, behind whatever is more urgent on the service. After a failure what was
    finished is in the journal.

    Raises:
        ExceptionGroup: of what failed.
    """
    slots = asyncio.Semaphore(concurrency)

    async def sample(prompt: str, config: SamplingConfig) -> SamplingResult:
        options = chat_options(config)
        # A greedy answer comes out the same each time.
        options["n"] = 1 if config.is_greedy else num_samples
        options["seed"] = seed_of(seed, config.name, prompt)
        options["priority"] = Priority.BULK
        completion = await client.chat(prompt, **options)
        outputs = await client.detokenize(
            *(choice.token_ids for choice in completion.choices), skip_control_tokens=skip_control_tokens
        )
        return SamplingResult(config.name, config.params, outputs)

    async def finish(index: int, prompt: str) -> None:
        async with slots:
            results = [await sample(prompt, config) for config in configs]
        journal.add(index, PromptResults(prompt, tuple(results)))
        on_finished()

    async with asyncio.TaskGroup() as group:
        for index, prompt in enumerate(prompts):
            if index not in journal.finished:
                group.create_task(finish(index, prompt))


def seed_of(seed: int, config: str, prompt: str) -> int:
    """The seed of one request: its own, and the same in every run, so that a report can be made again in parts.

    >>> seed_of(42, "k50", "Hi") == seed_of(42, "k50", "Hi") != seed_of(42, "greedy", "Hi")
    True
    """
    digest = hashlib.sha256(f"{seed}\0{config}\0{prompt}".encode()).digest()
    return int.from_bytes(digest[:8])
