"""Callers that stream from the service, each checked to its end."""

import asyncio
import functools
import itertools
import random
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import waiting
from oasst_client import APIError, AsyncClient, AsyncCompletionStream, new_request_id

from faults.checker import FINISHED, Transcript
from faults.verifiable import Prompt, Script

__all__ = ["FaultMissedError", "Load", "until"]

# Other processes make it true, on a machine where several worlds run at once.
until = functools.partial(waiting.until, timeout_s=30.0)


class FaultMissedError(AssertionError):
    """The streams that the fault was to meet had finished well: the machine was too slow, the run tells nothing."""


class Load:
    """Requests under way, and the transcripts of all that there were."""

    def __init__(self, client: AsyncClient, dice: random.Random) -> None:
        self.transcripts: list[Transcript] = []
        self._client = client
        self._dice = dice
        self._numbers = itertools.count(dice.randrange(2**20))
        # By the identity of their transcripts, which are kept.
        self._streams: dict[int, asyncio.Task[None]] = {}

    @property
    def flowing(self) -> list[Transcript]:
        """Streams in the middle: a fault now meets them."""
        return [transcript for transcript in self.transcripts if transcript.is_flowing]

    @property
    def num_tokens_seen(self) -> int:
        return sum(transcript.num_seen for transcript in self.transcripts)

    def ask(
        self,
        *,
        num_tokens: int = 120,
        num_choices: int = 1,
        prompt: Prompt | None = None,
        script: Script = Script.STEADY,
        at: int = 0,
        prompt_tokens: int = 8,
        seed: int | None = None,
        request_id: str = "",
        think_s: float = 0.0,
        client: AsyncClient | None = None,
        **options: Any,  # Whatever the SDK's `stream` takes.
    ) -> Transcript:
        """A caller has begun to stream an answer, and thinks for a while after each event.

        The same id, prompt and seed again attach to the first request.
        """
        transcript = Transcript(
            request_id or new_request_id(),
            prompt or Prompt(next(self._numbers), script, at, prompt_tokens),
            seed=self._dice.getrandbits(63) if seed is None else seed,
            num_tokens=num_tokens,
            num_choices=num_choices,
        )
        stream = (client or self._client).stream(
            token_ids=transcript.prompt.token_ids(),
            seed=transcript.seed,
            n=num_choices,
            max_new_tokens=num_tokens,
            ignore_eos=True,
            request_id=transcript.request_id,
            **options,
        )
        return self._follow(stream, transcript, think_s)

    def watch(self, asked: Transcript, *, client: AsyncClient) -> Transcript:
        """Another caller, who was given the request's id and resume token, streams the same answer from its start."""
        transcript = Transcript(asked.request_id, asked.prompt, asked.seed, asked.num_tokens, asked.num_choices)
        return self._follow(client.watch(asked.request_id, asked.accepted.resume_token), transcript)

    def _follow(self, stream: AsyncCompletionStream, transcript: Transcript, think_s: float = 0.0) -> Transcript:
        self.transcripts.append(transcript)
        self._streams[id(transcript)] = asyncio.create_task(_listen(stream, transcript, think_s))
        return transcript

    def ask_many(self, num_streams: int, **options: Any) -> list[Transcript]:
        """Several callers; every fourth wants two choices."""
        return [self.ask(num_choices=1 + (index % 4 == 3), **options) for index in range(num_streams)]

    @asynccontextmanager
    async def kept_up(self, num_streams: int, **options: Any) -> AsyncIterator[None]:
        """So many streams are under way as long as the context is open: where one ends another begins."""
        is_over = False

        async def one_after_another() -> None:
            while not is_over:
                await self.ended([self.ask(**options)])

        async with asyncio.TaskGroup() as callers:
            for _ in range(num_streams):
                callers.create_task(one_after_another())
            yield
            is_over = True

    async def flows(self, transcripts: Iterable[Transcript] | None = None, *, num_tokens: int = 1) -> None:
        """Every one of these streams is in the middle, with so many tokens at least."""
        waited_for = list(self.transcripts if transcripts is None else transcripts)
        await until(
            lambda: all(each.num_seen >= num_tokens or each.end for each in waited_for),
            "streams to flow",
            timeout_s=90,
        )
        ended = [each for each in waited_for if not each.is_flowing]
        if ended:
            raise self.missed(f"{len(ended)} streams ended before the fault: {ended[0].end}")

    def missed(self, message: str) -> AssertionError:
        """The error for a fault that met too little; a broken promise if a stream has ended otherwise than well."""
        ends = [transcript.end for transcript in self.transcripts if transcript.end]
        return (FaultMissedError if set(ends) <= {FINISHED} else AssertionError)(message)

    async def ended(self, transcripts: Iterable[Transcript] | None = None, timeout_s: float = 60.0) -> None:
        """These streams have ended, well or not; one that stays silent for longer has no end, which is a defect."""
        waited_for = self.transcripts if transcripts is None else transcripts
        streams = [self._streams[id(transcript)] for transcript in waited_for]
        if streams:
            done, _ = await asyncio.wait(streams, timeout=timeout_s)
            for stream in done:
                stream.result()

    def leave(self, transcript: Transcript) -> None:
        """The caller is gone, without a word."""
        self._streams[id(transcript)].cancel()

    def forget(self, transcript: Transcript) -> None:
        """Nothing is kept of a stream that has ended."""
        del self._streams[id(transcript)]
        self.transcripts.remove(transcript)

    async def close(self) -> None:
        for stream in self._streams.values():
            stream.cancel()
        await asyncio.gather(*self._streams.values(), return_exceptions=True)


async def _listen(stream: AsyncCompletionStream, transcript: Transcript, think_s: float) -> None:
    try:
        async with stream:
            async for event in stream.events():
                transcript.events.append((time.monotonic(), event))
                if think_s:
                    await asyncio.sleep(think_s)
        transcript.end = FINISHED
    except APIError as error:
        transcript.end = error.reason or error.code
        transcript.retry_after_s = error.retry_after_s
    except asyncio.CancelledError:
        transcript.end = "LEFT"
    finally:
        transcript.num_resumes = stream.num_resumes
