"""The RPCs of `oasst.v1`: each translates its messages and delegates. Errors are translated around them."""

import importlib.metadata

from google.protobuf.duration_pb2 import Duration
from oasst.v1 import chat_pb2, chat_pb2_grpc, model_pb2, model_pb2_grpc, scoring_pb2, scoring_pb2_grpc
from oasst_jobs import Submitter

from oasst_gateway.call import Call
from oasst_gateway.chats import Chats
from oasst_gateway.model import ServedModel
from oasst_gateway.monitor import QueueMonitor
from oasst_gateway.offloading import TenantThreads, is_big
from oasst_gateway.scores import Scores
from oasst_gateway.validation import check_detokenize, check_model_name, check_tokenize

__all__ = ["ChatServicer", "ModelServicer", "ScoringServicer"]

_SERVER_VERSION = importlib.metadata.version("oasst-serve")


class ChatServicer(chat_pb2_grpc.ChatServiceServicer):
    """Chats."""

    def __init__(self, chats: Chats) -> None:
        self._chats = chats

    async def Chat(  # noqa: N802  # Named by the proto, as all below.
        self, request: chat_pb2.ChatRequest, call: Call
    ) -> chat_pb2.ChatResponse:
        async with self._chats.open(request, tenant=call.tenant, remaining_s=call.remaining_s, span=call.span) as chat:
            return await chat.response()

    async def ChatStream(self, request: chat_pb2.ChatRequest, call: Call) -> None:  # noqa: N802
        async with self._chats.open(request, tenant=call.tenant, remaining_s=call.remaining_s, span=call.span) as chat:
            async for event in chat.events():
                await call.send(event)

    async def SubmitChat(self, request: chat_pb2.ChatRequest, call: Call) -> chat_pb2.SubmitChatResponse:  # noqa: N802
        accepted = await self._chats.submit(request, tenant=call.tenant, span=call.span)
        return chat_pb2.SubmitChatResponse(accepted=accepted)

    async def WatchChat(self, request: chat_pb2.WatchChatRequest, call: Call) -> None:  # noqa: N802
        async with self._chats.watch(request, tenant=call.tenant, span=call.span) as chat:
            async for event in chat.events():
                await call.send(event)

    async def GetChat(self, request: chat_pb2.GetChatRequest, call: Call) -> chat_pb2.GetChatResponse:  # noqa: N802
        return await self._chats.get(request, tenant=call.tenant)

    async def CancelChat(  # noqa: N802
        self, request: chat_pb2.CancelChatRequest, call: Call
    ) -> chat_pb2.CancelChatResponse:
        state = await self._chats.cancel(request, tenant=call.tenant)
        return chat_pb2.CancelChatResponse(state=f"CHAT_STATE_{state.name}")


class ScoringServicer(scoring_pb2_grpc.ScoringServiceServicer):
    """Log-likelihoods."""

    def __init__(self, scores: Scores) -> None:
        self._scores = scores

    async def Score(  # noqa: N802
        self, request: scoring_pb2.ScoreRequest, call: Call
    ) -> scoring_pb2.ScoreResponse:
        return await self._scores.score(request, tenant=call.tenant, remaining_s=call.remaining_s, span=call.span)


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """The model, and how busy it is."""

    def __init__(self, model: ServedModel, submitter: Submitter, monitor: QueueMonitor, threads: TenantThreads) -> None:
        self._model = model
        self._threads = threads
        self._submitter = submitter
        self._monitor = monitor

    async def ListModels(  # noqa: N802
        self, request: model_pb2.ListModelsRequest, call: Call
    ) -> model_pb2.ListModelsResponse:
        return model_pb2.ListModelsResponse(models=[self._model.to_proto()])

    async def GetModel(  # noqa: N802
        self, request: model_pb2.GetModelRequest, call: Call
    ) -> model_pb2.GetModelResponse:
        check_model_name(request.name, "name", self._model.name)
        return model_pb2.GetModelResponse(model=self._model.to_proto())

    async def Tokenize(  # noqa: N802
        self, request: model_pb2.TokenizeRequest, call: Call
    ) -> model_pb2.TokenizeResponse:
        def encode() -> model_pb2.TokenizeResponse:
            check_tokenize(request, model_name=self._model.name)
            tokenizer = self._model.tokenizer
            to_ids = tokenizer.encode_prompt if request.parse_control_tokens else tokenizer.encode_text
            return model_pb2.TokenizeResponse(
                sequences=[model_pb2.TokenSequence(ids=to_ids(text)) for text in request.texts]
            )

        return await self._threads.run_or_refuse(call.tenant, encode, off_loop=is_big(request))

    async def Detokenize(  # noqa: N802
        self, request: model_pb2.DetokenizeRequest, call: Call
    ) -> model_pb2.DetokenizeResponse:
        def decode() -> model_pb2.DetokenizeResponse:
            check_detokenize(request, model_name=self._model.name, limits=self._model.limits)
            skip = request.skip_control_tokens
            texts = [self._model.tokenizer.decode(ids.ids, skip_control_tokens=skip) for ids in request.sequences]
            return model_pb2.DetokenizeResponse(texts=texts)

        return await self._threads.run_or_refuse(call.tenant, decode, off_loop=is_big(request))

    async def GetLoad(  # noqa: N802
        self, request: model_pb2.GetLoadRequest, call: Call
    ) -> model_pb2.GetLoadResponse:
        check_model_name(request.model, "model", self._model.name)
        load = await self._submitter.load(self._model.name)
        wait_s = self._monitor.look_out().told_wait_s(load.waiting_tokens)
        response = model_pb2.GetLoadResponse(
            server_version=_SERVER_VERSION,
            waiting_requests=load.waiting_jobs,
            waiting_tokens=load.waiting_tokens,
            running_requests=load.running_jobs,
            estimated_wait=None if wait_s is None else _duration(wait_s * 1000),
        )
        response.server_time.GetCurrentTime()
        for status, age_ms in load.workers:
            response.workers.add(
                worker_id=status.worker_id,
                running_sequences=status.running_sequences,
                max_sequences=status.max_sequences,
                kv_tokens_used=status.kv_tokens_used,
                kv_tokens_total=status.kv_tokens_total,
                tokens_per_second=status.tokens_per_second,
                age=_duration(age_ms),
            )
        return response


def _duration(milliseconds: float) -> Duration:
    duration = Duration()
    duration.FromMilliseconds(round(milliseconds))
    return duration
