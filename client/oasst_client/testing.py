# ruff: noqa: N802 -- gRPC names the methods.
"""A service for the tests of programs that use this client: real gRPC on a free port of this machine, no model.

>>> from oasst_client import Client, OverloadedError
>>> from oasst_client.testing import FakeServer
>>> with FakeServer("An idea that spreads.") as server, Client(server.address) as client:
...     print(client.chat("What is a meme?").text)
...     print(server.questions)
An idea that spreads.
['What is a meme?']

Answers are texts, or whatever a function makes of the request; an error among them is what the service refuses with
(and the client tries again, as ever, if the error says that it may pass):

>>> full = OverloadedError("the queue is full", code="RESOURCE_EXHAUSTED", reason="QUEUE_FULL")
>>> with FakeServer(full) as server, Client(server.address) as client:
...     client.chat("What is a meme?")
Traceback (most recent call last):
oasst_client._errors.OverloadedError: the queue is full (QUEUE_FULL)

Continuations are scored by a function of the item; without one every token has the log-probability -1:

>>> from oasst_client import ItemScore
>>> with FakeServer(score=lambda item: ItemScore(-0.5, True)) as server, Client(server.address) as client:
...     print(client.score([("The sky is", " blue")]))
(ItemScore(logprob=-0.5, is_greedy=True, token_logprobs=()),)
"""

import asyncio
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message as ProtoMessage
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # generated, without stubs
from grpc_status import rpc_status  # type: ignore[import-untyped]  # without stubs
from oasst.presets import PRESETS
from oasst.prompt import ControlToken
from oasst.v1 import (
    chat_pb2,
    chat_pb2_grpc,
    generation_pb2,
    model_pb2,
    model_pb2_grpc,
    scoring_pb2,
    scoring_pb2_grpc,
)

from oasst_client._errors import APIError
from oasst_client._request_id import new_request_id
from oasst_client._types import FinishReason, ItemScore, ScoreItem

__all__ = ["Answer", "FakeServer", "FakeTokenizer"]

_MAX_POSITIONS = 2048
_MAX_CHOICES = 8
_DOMAIN = "oasst.v1"
# Any: grpc's contexts are typed by messages that the generated code does not declare.
_Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """What one chat is answered with."""

    text: str
    # What the chat fails with after `text`, instead of finishing.
    error: APIError | None = None
    finish_reason: FinishReason = FinishReason.END_OF_TEXT


# An error alone refuses the request before it is accepted.
AnswerLike = str | Answer | APIError


class FakeTokenizer:
    """A token is a word with the white space before it. Ids are given out as words come, behind the control tokens'."""

    _WORD = re.compile(r"\s*\S+|\s+")
    _CONTROL = re.compile("(" + "|".join(re.escape(token.value) for token in ControlToken) + ")")

    def __init__(self) -> None:
        self._control_ids = {token.value: token_id for token_id, token in enumerate(ControlToken)}
        self._word_ids: dict[str, int] = {}
        self._texts = list(self._control_ids)

    def id_of(self, token: ControlToken) -> int:
        return self._control_ids[token.value]

    def encode(self, text: str, *, parse_control_tokens: bool = False) -> list[int]:
        """The ids of a text; control tokens spelled out in it are words like any other unless they are to be parsed."""
        if not parse_control_tokens:
            return [self._id_of_word(word) for word in self._WORD.findall(text)]
        ids: list[int] = []
        for index, part in enumerate(self._CONTROL.split(text)):
            # What stands between the control tokens is at the even places.
            ids += [self._control_ids[part]] if index % 2 else self.encode(part)
        return ids

    def decode(self, ids: Iterable[int], *, skip_control_tokens: bool = False) -> str:
        """The text of these ids; those that were never given out are U+FFFD."""
        kept = (each for each in ids if not (skip_control_tokens and each < len(self._control_ids)))
        return "".join(self._texts[each] if each < len(self._texts) else "\ufffd" for each in kept)

    def _id_of_word(self, word: str) -> int:
        if word not in self._word_ids:
            self._word_ids[word] = len(self._texts)
            self._texts.append(word)
        return self._word_ids[word]


class FakeServer:
    """Serves while its context lasts. Chats, scores, tokens, models and load; every request is kept.

    Args:
        answers: what chats are answered with, in turn, the last one again and again; or a function of the request.
        score: what each item is scored with; it may raise an APIError, which refuses the request.
        token_interval_s: the time between two tokens; 0 answers at once.
        model: the served model's name.

    Attributes:
        address: where it serves, `127.0.0.1:PORT`.
        requests: every ChatRequest so far, in order.
        metadata: the metadata of each of them.
        score_requests: every ScoreRequest so far, in order.
    """

    def __init__(
        self,
        *answers: AnswerLike | Callable[[chat_pb2.ChatRequest], AnswerLike],
        score: Callable[[ScoreItem], ItemScore] | None = None,
        token_interval_s: float = 0.0,
        model: str = "fake",
    ) -> None:
        self.address: str = ""
        self.score_requests: list[scoring_pb2.ScoreRequest] = []
        self._score = score or _score_evenly
        self.requests: list[chat_pb2.ChatRequest] = []
        self.metadata: list[dict[str, str]] = []
        self.tokenizer: FakeTokenizer = FakeTokenizer()
        self._answers = answers or ("Hello!",)
        self._token_interval_s = token_interval_s
        self._model = model
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fake oasst server", daemon=True)
        self._server: grpc.aio.Server | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def questions(self) -> list[str]:
        """The last turn of every request so far; the whole prompt of those that came as one."""
        return [_question_of(request) for request in self.requests]

    async def _start(self) -> None:
        self._server = grpc.aio.server()
        chat = _FakeChatServicer(self._answer, self.tokenizer, self._model, self._token_interval_s)
        chat_pb2_grpc.add_ChatServiceServicer_to_server(chat, self._server)  # type: ignore[no-untyped-call]
        model = _FakeModelServicer(self.tokenizer, self._model)
        model_pb2_grpc.add_ModelServiceServicer_to_server(model, self._server)  # type: ignore[no-untyped-call]
        scoring = _FakeScoringServicer(self._score, self.score_requests)
        scoring_pb2_grpc.add_ScoringServiceServicer_to_server(scoring, self._server)  # type: ignore[no-untyped-call]
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()

    async def _stop(self) -> None:
        if self._server:
            await self._server.stop(grace=None)

    def _answer(self, request: chat_pb2.ChatRequest, metadata: dict[str, str]) -> AnswerLike:
        self.requests.append(request)
        self.metadata.append(metadata)
        answer = self._answers[min(len(self.requests), len(self._answers)) - 1]
        return answer(request) if callable(answer) else answer


class _FakeChat:
    """One accepted chat. All its events are known from the start; the clock alone says which have happened."""

    def __init__(
        self, request: chat_pb2.ChatRequest, answer: Answer, tokenizer: FakeTokenizer, interval_s: float
    ) -> None:
        self.id = request.request_id or new_request_id()
        self.request = request
        self.cancelled = asyncio.Event()
        self.resume_token = f"resume-{self.id}"
        self.seed = request.sampling.seed
        self._answer = answer
        self._token_interval_s = interval_s
        self._started_s = time.monotonic()
        self.prompt_tokens = len(request.token_ids.ids) or len(tokenizer.encode(_question_of(request)))
        pieces = tokenizer.encode(answer.text)
        limit = request.limits.max_new_tokens if request.limits.HasField("max_new_tokens") else len(pieces)
        self.token_ids = pieces[:limit]
        self.texts = [tokenizer.decode([each]) for each in self.token_ids]
        self.is_cut = limit < len(pieces)
        self.num_choices = request.n if request.HasField("n") else 1

    @property
    def num_tokens(self) -> int:
        """Over all choices: each gets the same answer."""
        return len(self.token_ids) * self.num_choices

    def num_logged(self) -> int:
        """How many tokens there are by now."""
        if not self._token_interval_s:
            return self.num_tokens
        elapsed_s = time.monotonic() - self._started_s
        return min(int(elapsed_s / self._token_interval_s) * self.num_choices, self.num_tokens)

    async def events(self, after: int) -> AsyncIterator[chat_pb2.ChatEvent]:
        """The events behind the first `after` tokens, as they happen."""
        for index in range(after, self.num_tokens):
            await self._reach(index)
            if self.cancelled.is_set():
                return
            yield self.delta(index)
        if not self._answer.error:
            yield chat_pb2.ChatEvent(next_position=self.num_tokens, finished=self.finished())

    async def _reach(self, index: int) -> None:
        """The `index`th token is there, or the chat is cancelled."""
        due_s = self._started_s + (index // self.num_choices + 1) * self._token_interval_s
        if (remaining_s := due_s - time.monotonic()) > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.cancelled.wait(), remaining_s)

    def accepted(self) -> chat_pb2.Accepted:
        return chat_pb2.Accepted(
            request_id=self.id,
            resume_token=self.resume_token,
            queue=chat_pb2.QueueStatus(position=0),
            prompt_tokens=self.prompt_tokens,
            seed=self.seed,
        )

    def delta(self, index: int) -> chat_pb2.ChatEvent:
        """The `index`th token of all choices, which take turns."""
        position, choice = divmod(index, self.num_choices)
        delta = generation_pb2.Delta(
            choice=choice, position=position, text=self.texts[position], token_ids=[self.token_ids[position]]
        )
        if self.request.HasField("logprobs"):
            delta.logprobs.append(self._logprob(position))
        return chat_pb2.ChatEvent(next_position=index + 1, delta=delta)

    def finished(self) -> chat_pb2.Finished:
        reason = FinishReason.LENGTH if self.is_cut else self._answer.finish_reason
        finishes = [
            generation_pb2.ChoiceFinish(choice=choice, reason=f"FINISH_REASON_{reason.name}")
            for choice in range(self.num_choices)
        ]
        usage = chat_pb2.Usage(prompt_tokens=self.prompt_tokens, completion_tokens=self.num_tokens)
        return chat_pb2.Finished(finishes=finishes, usage=usage)

    def response(self, model: str) -> chat_pb2.ChatResponse:
        """What there is by now."""
        num_positions = self.num_logged() // self.num_choices
        finished = self.finished()
        choices = [
            chat_pb2.Choice(
                text="".join(self.texts[:num_positions]),
                token_ids=self.token_ids[:num_positions],
                logprobs=[self._logprob(each) for each in range(num_positions) if self.request.HasField("logprobs")],
                finish=finish,
            )
            for finish in finished.finishes
        ]
        return chat_pb2.ChatResponse(
            request_id=self.id, model=model, choices=choices, usage=finished.usage, seed=self.seed
        )

    def error(self) -> APIError | None:
        """Why it ends without finishing; None if it finishes."""
        if self.cancelled.is_set():
            return APIError("the request was cancelled", code="CANCELLED", reason="CANCELLED")
        return self._answer.error

    def state(self) -> chat_pb2.ChatState:
        if self.cancelled.is_set():
            return chat_pb2.CHAT_STATE_CANCELLED
        if self.num_logged() < self.num_tokens:
            return chat_pb2.CHAT_STATE_RUNNING
        return chat_pb2.CHAT_STATE_FAILED if self._answer.error else chat_pb2.CHAT_STATE_FINISHED

    def _logprob(self, position: int) -> generation_pb2.TokenLogprob:
        """Certain of its word, and with the alternatives that were asked for."""
        others = [
            generation_pb2.TokenAlternative(token_id=self.token_ids[position] if rank == 0 else rank, logprob=-rank)
            for rank in range(self.request.logprobs)
        ]
        return generation_pb2.TokenLogprob(logprob=0.0, alternatives=others)


class _FakeChatServicer(chat_pb2_grpc.ChatServiceServicer):
    """Chats, kept by their id so that they can be watched, read and cancelled from elsewhere."""

    def __init__(
        self,
        answer: Callable[[chat_pb2.ChatRequest, dict[str, str]], AnswerLike],
        tokenizer: FakeTokenizer,
        model: str,
        token_interval_s: float,
    ) -> None:
        self._answer = answer
        self._tokenizer = tokenizer
        self._model = model
        self._token_interval_s = token_interval_s
        self._chats: dict[str, _FakeChat] = {}

    async def ChatStream(self, request: chat_pb2.ChatRequest, context: _Context) -> AsyncIterator[chat_pb2.ChatEvent]:
        chat = await self._accept(request, context)
        yield chat_pb2.ChatEvent(accepted=chat.accepted())
        # A caller who leaves may come back: the chat goes on. One who will not has the client cancel it.
        async for event in chat.events(0):
            yield event
        await _fail_if(chat.error(), context)

    async def Chat(self, request: chat_pb2.ChatRequest, context: _Context) -> chat_pb2.ChatResponse:
        chat = await self._accept(request, context)
        async for _ in chat.events(0):
            pass
        await _fail_if(chat.error(), context)
        return chat.response(self._model)

    async def SubmitChat(self, request: chat_pb2.ChatRequest, context: _Context) -> chat_pb2.SubmitChatResponse:
        chat = await self._accept(request, context)
        return chat_pb2.SubmitChatResponse(accepted=chat.accepted())

    async def WatchChat(
        self, request: chat_pb2.WatchChatRequest, context: _Context
    ) -> AsyncIterator[chat_pb2.ChatEvent]:
        chat = await self._find(request.request_id, context, resume_token=request.resume_token)
        yield chat_pb2.ChatEvent(next_position=request.after, accepted=chat.accepted())
        async for event in chat.events(request.after):
            yield event
        await _fail_if(chat.error(), context)

    async def GetChat(self, request: chat_pb2.GetChatRequest, context: _Context) -> chat_pb2.GetChatResponse:
        chat = await self._find(request.request_id, context, resume_token=request.resume_token)
        response = chat_pb2.GetChatResponse(state=chat.state(), response=chat.response(self._model))
        if (error := chat.error()) and chat.state() != chat_pb2.CHAT_STATE_RUNNING:
            code = grpc.StatusCode[error.code].value[0]
            response.failed.CopyFrom(chat_pb2.Failed(code=code, reason=error.reason, message=error.message))
        return response

    async def CancelChat(self, request: chat_pb2.CancelChatRequest, context: _Context) -> chat_pb2.CancelChatResponse:
        chat = await self._find(request.request_id, context, resume_token=request.resume_token or None)
        if chat.state() == chat_pb2.CHAT_STATE_RUNNING:
            chat.cancelled.set()
        return chat_pb2.CancelChatResponse(state=chat.state())

    async def _accept(self, request: chat_pb2.ChatRequest, context: _Context) -> _FakeChat:
        """The chat of this request: one that runs already if its id is known."""
        if known := self._chats.get(request.request_id):
            return known
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        answer = self._answer(request, metadata)
        if isinstance(answer, APIError):
            await _fail_if(answer, context)
        whole = answer if isinstance(answer, Answer) else Answer(str(answer))
        chat = _FakeChat(request, whole, self._tokenizer, self._token_interval_s)
        self._chats[chat.id] = chat
        return chat

    async def _find(self, request_id: str, context: _Context, *, resume_token: str | None = None) -> _FakeChat:
        """The chat of this id; where a resume token is needed, only for whoever brings it."""
        chat = self._chats.get(request_id)
        if chat is None or resume_token not in (None, chat.resume_token):
            await _fail_if(APIError("there is no such chat", code="NOT_FOUND", reason="CHAT_NOT_FOUND"), context)
        return self._chats[request_id]


class _FakeScoringServicer(scoring_pb2_grpc.ScoringServiceServicer):
    """Scores by a function, and keeps what it was asked."""

    def __init__(self, score: Callable[[ScoreItem], ItemScore], requests: list[scoring_pb2.ScoreRequest]) -> None:
        self._score = score
        self._requests = requests

    async def Score(self, request: scoring_pb2.ScoreRequest, context: _Context) -> scoring_pb2.ScoreResponse:
        self._requests.append(request)
        response = scoring_pb2.ScoreResponse()
        try:
            for item in request.items:
                score = self._score(ScoreItem(tuple(item.token_ids), item.context_length))
                response.scores.add(
                    logprob=score.logprob,
                    is_greedy=score.is_greedy,
                    token_logprobs=score.token_logprobs if request.token_logprobs else (),
                )
        except APIError as error:
            await _fail_if(error, context)
        return response


def _score_evenly(item: ScoreItem) -> ItemScore:
    num_tokens = len(item.token_ids) - item.context_length
    return ItemScore(-float(num_tokens), False, (-1.0,) * num_tokens)


class _FakeModelServicer(model_pb2_grpc.ModelServiceServicer):
    """One model, whose tokens are words."""

    def __init__(self, tokenizer: FakeTokenizer, name: str) -> None:
        self._tokenizer = tokenizer
        self._name = name

    async def ListModels(self, request: model_pb2.ListModelsRequest, context: _Context) -> model_pb2.ListModelsResponse:
        return model_pb2.ListModelsResponse(models=[self._model()])

    async def GetModel(self, request: model_pb2.GetModelRequest, context: _Context) -> model_pb2.GetModelResponse:
        return model_pb2.GetModelResponse(model=self._model())

    async def Tokenize(self, request: model_pb2.TokenizeRequest, context: _Context) -> model_pb2.TokenizeResponse:
        parse = request.parse_control_tokens
        sequences = [self._tokenizer.encode(each, parse_control_tokens=parse) for each in request.texts]
        return model_pb2.TokenizeResponse(sequences=[model_pb2.TokenSequence(ids=each) for each in sequences])

    async def Detokenize(self, request: model_pb2.DetokenizeRequest, context: _Context) -> model_pb2.DetokenizeResponse:
        skip = request.skip_control_tokens
        texts = [self._tokenizer.decode(each.ids, skip_control_tokens=skip) for each in request.sequences]
        return model_pb2.DetokenizeResponse(texts=texts)

    async def GetLoad(self, request: model_pb2.GetLoadRequest, context: _Context) -> model_pb2.GetLoadResponse:
        worker = model_pb2.WorkerLoad(worker_id="fake-worker", max_sequences=8, kv_tokens_total=16_384)
        return model_pb2.GetLoadResponse(workers=[worker])

    def _model(self) -> model_pb2.Model:
        id_of = self._tokenizer.id_of
        return model_pb2.Model(
            name=self._name,
            vocab_size=2**16,
            tokenizer_size=2**16,
            max_positions=_MAX_POSITIONS,
            max_prompt_tokens=_MAX_POSITIONS - 1,
            max_new_tokens=_MAX_POSITIONS - 1,
            max_choices=_MAX_CHOICES,
            control_tokens=model_pb2.ControlTokens(
                prompter=id_of(ControlToken.PROMPTER),
                assistant=id_of(ControlToken.ASSISTANT),
                end_of_text=id_of(ControlToken.END_OF_TEXT),
            ),
            presets=list(_presets()),
        )


def _presets() -> Iterator[generation_pb2.SamplingParams]:
    fields = generation_pb2.SamplingParams.DESCRIPTOR.fields_by_name
    for name, values in PRESETS.items():
        preset = generation_pb2.SamplingParams(preset=name)
        for field in fields.keys() & values.keys():
            setattr(preset, field, type(getattr(preset, field))(values[field]))
        yield preset


def _question_of(request: chat_pb2.ChatRequest) -> str:
    messages: Sequence[chat_pb2.Message] = request.conversation.messages
    return messages[-1].content if messages else request.prompt


async def _fail_if(error: APIError | None, context: _Context) -> None:
    """Ends the call with the rich status of `error`, if there is one."""
    if error is None:
        return
    details: list[ProtoMessage] = []
    if error.reason:
        details.append(error_details_pb2.ErrorInfo(reason=error.reason, domain=_DOMAIN, metadata=error.metadata))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMicroseconds(round(error.retry_after_s * 1e6))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if error.field_violations:
        violations = [
            error_details_pb2.BadRequest.FieldViolation(field=each.field, description=each.description)
            for each in error.field_violations
        ]
        details.append(error_details_pb2.BadRequest(field_violations=violations))
    status = status_pb2.Status(code=grpc.StatusCode[error.code].value[0], message=error.message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    await context.abort_with_status(rpc_status.to_status(status))  # pyright: ignore[reportUnknownMemberType]  # untyped
