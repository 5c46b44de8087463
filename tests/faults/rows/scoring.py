"""What becomes of scores when somebody dies in the middle of them."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace

from oasst_client import AsyncClient, ItemScore, ScoreItem

from faults.load import until
from faults.processes import ServiceProcess
from faults.proofs import recovery, require_ends
from faults.table import Evidence, row
from faults.verifiable import Prompt, foretell_score, words
from faults.world import Step, World

__all__ = ["gateway_is_killed", "worker_is_killed"]

_NUM_ITEMS = 960
# How many steps' scores a worker may hold that are not logged when it dies.
_STEPS_AHEAD = 32


def _draw_items(world: World) -> list[ScoreItem]:
    """Items of a few tokens, no two alike, so that each is a sequence of its own."""
    first = world.dice.randrange(2**20)
    contexts = [Prompt(number).token_ids() for number in range(first, first + _NUM_ITEMS)]
    answers = [world.dice.choices(words(), k=world.dice.randint(1, 6)) for _ in contexts]
    return [ScoreItem((*context, *answer), len(context)) for context, answer in zip(contexts, answers, strict=True)]


async def _score_through(world: World, strike: Callable[[list[Step]], Awaitable[None]]) -> Evidence:
    """Beside chats items are scored; in the middle, the fault strikes, told of the steps that scored so far."""
    load, items = world.load, _draw_items(world)
    num_steps_before = len(world.steps())
    load.ask_many(8, num_tokens=300)

    def steps() -> list[Step]:
        return _scoring_steps(world, num_steps_before)

    async with AsyncClient(world.address) as client:
        scoring = asyncio.create_task(client.score(items, token_logprobs=True))
        try:
            await load.flows()
            least = world.dice.randint(10, 60)
            await until(lambda: scoring.done() or len(steps()) >= least, f"{least} steps that score")
            if scoring.done():
                raise load.missed("all was scored before the fault")
            await strike(steps())
            scores = await scoring
        finally:
            scoring.cancel()
    await load.ended()
    require_ends(load.transcripts)
    wrong = [index for index, (item, score) in enumerate(zip(items, scores, strict=True)) if not _is_right(item, score)]
    if wrong:
        raise AssertionError(f"{len(wrong)} of {len(items)} scores are wrong, the first that of items[{wrong[0]}]")
    return {
        "items": len(items),
        "requests resumed": _num_moved(steps()),
        "items scored again": _num_again(steps()),
        **recovery(world),
    }


def _scoring_steps(world: World, start: int) -> list[Step]:
    """The steps behind the first `start` that scored, with nothing in them but what they scored."""
    chats = {world.job_id(transcript) for transcript in world.load.transcripts}
    steps = []
    for step in world.steps()[start:]:
        chunks = tuple(chunk for chunk in step.chunks if _job_id(chunk) not in chats)
        steps += [replace(step, chunks=chunks)] if chunks else []
    return steps


def _job_id(chunk: tuple[str, int, int, int | None]) -> str:
    return chunk[0].partition("/")[0]


def _num_moved(steps: list[Step]) -> int:
    """Requests that more than one worker scored."""
    scored = {(step.worker, _job_id(chunk)) for step in steps for chunk in step.chunks}
    return sum(num_workers > 1 for num_workers in Counter(job_id for _, job_id in scored).values())


def _num_again(steps: list[Step]) -> int:
    times = Counter((sequence_id, start) for step in steps for sequence_id, start, _, _ in step.chunks)
    return times.total() - len(times)


def _is_right(item: ScoreItem, score: ItemScore) -> bool:
    positions = range(item.context_length, len(item.token_ids))
    foretold = [foretell_score(item.token_ids, position) for position in positions]
    logprobs = tuple(logprob for logprob, _ in foretold)
    return score == ItemScore(sum(logprobs), all(is_best for _, is_best in foretold), logprobs)


@row(
    "41",
    "kill -9 of a worker while it scores, chats beside it",
    "every score is the right one; another worker goes on behind the last logged item; chats as in row 2",
)
async def worker_is_killed(world: World) -> Evidence:
    victim = ""

    async def kill(steps: list[Step]) -> None:
        nonlocal victim
        victim = steps[-1].worker
        world.strike(f"kill -9 of {victim}", min_flowing=4)
        world.workers[victim].kill()

    evidence = await _score_through(world, kill)
    if not evidence["requests resumed"]:
        raise world.load.missed("the worker had scored all that it had begun")
    num_unlogged = sum(len(step.chunks) for step in world.steps(victim)[-_STEPS_AHEAD:])
    if evidence["items scored again"] > num_unlogged:
        raise AssertionError(f"{evidence['items scored again']:g} items were scored again, {num_unlogged} may be")
    return evidence


async def _num_waiting(gateway: ServiceProcess) -> float:
    """Requests whose scores this gateway has not told yet."""
    return await gateway.metric("oasst_gateway_requests_in_flight", rpc="ScoringService/Score")


@row(
    "41b",
    "kill -9 of a gateway that waits for scores, chats beside them",
    "callers ask again with the same id through the other one; every score is the right one, nothing is scored twice",
)
async def gateway_is_killed(world: World) -> Evidence:
    async def kill(_: list[Step]) -> None:
        waiting = {name: await _num_waiting(gateway) for name, gateway in world.gateways.items()}
        name = max(waiting, key=lambda name: waiting[name])
        world.strike(f"kill -9 {name}, which waits for {waiting[name]:g} requests' scores", min_flowing=4)
        if not waiting[name]:
            raise world.load.missed("no gateway waits for scores")
        world.gateways[name].kill()

    evidence = await _score_through(world, kill)
    if evidence["items scored again"]:
        raise AssertionError(f"{evidence['items scored again']:g} items were scored again for the death of a gateway")
    return evidence
