"""Callers: most stream to the end, some leave early, some ask for what cannot be had."""

import asyncio
import random
from collections import Counter

from oasst_client import APIError, AsyncClient

__all__ = ["DONE", "call_for"]

DONE = "OK"

_QUESTIONS = ("What is a meme?", "Tell me about owls.", "Why is the sky blue?", "How do I boil an egg?")


async def call_for(addresses: list[str], seconds: float, *, callers: int) -> Counter[str]:
    """So many callers ask one question after the other, each with pauses, spread over the gateways.

    Returns how many calls ended how: `DONE`, or with the name of a gRPC status. Refusals are part of the picture.
    """
    ends: Counter[str] = Counter()
    async with asyncio.TaskGroup() as tasks:
        for number in range(callers):
            address, chance = addresses[number % len(addresses)], random.Random(number)  # noqa: S311
            tasks.create_task(_call_repeatedly(address, seconds, chance, ends))
    return ends


async def _call_repeatedly(address: str, seconds: float, chance: random.Random, ends: Counter[str]) -> None:
    deadline_s = asyncio.get_running_loop().time() + seconds
    async with AsyncClient(address) as client:
        while asyncio.get_running_loop().time() < deadline_s:
            await asyncio.sleep(chance.expovariate(2.0))
            try:
                await _call_once(client, chance)
            except APIError as error:
                ends[error.code] += 1
            else:
                ends[DONE] += 1


async def _call_once(client: AsyncClient, chance: random.Random) -> None:
    kind = chance.random()
    if kind < 0.05:
        await client.chat(chance.choice(_QUESTIONS), max_new_tokens=10**6)
        return
    async with client.stream(
        chance.choice(_QUESTIONS), max_new_tokens=chance.randint(20, 150), ignore_eos=True
    ) as stream:
        async for _ in stream:
            if kind > 0.97:
                return
