# ruff: noqa: N802 -- gRPC names the methods
"""A real gRPC server whose chat answers follow a script, so that each test says what its server does."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from oasst.v1 import (
    chat_pb2,
    chat_pb2_grpc,
    generation_pb2,
    model_pb2,
    model_pb2_grpc,
    scoring_pb2,
    scoring_pb2_grpc,
)
from oasst_client import Client

ANSWER = ["An ", "idea ", "that ", "spreads."]

StreamRequest = chat_pb2.ChatRequest | chat_pb2.WatchChatRequest
Script = Callable[[StreamRequest, grpc.ServicerContext], Iterator[chat_pb2.ChatEvent]]


@dataclass
class ScriptedServer(
    chat_pb2_grpc.ChatServiceServicer, model_pb2_grpc.ModelServiceServicer, scoring_pb2_grpc.ScoringServiceServicer
):
    """Answers chats by its script, without one in four words, and keeps what it was asked."""

    script: Script | None = None
    address: str = ""
    requests: list[StreamRequest] = field(default_factory=list)
    score_requests: list[scoring_pb2.ScoreRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    # What scoring does before it answers.
    on_score: Callable[[scoring_pb2.ScoreRequest, grpc.ServicerContext], object] = lambda request, context: None
    # What tokenizing does before it answers.
    on_tokenize: Callable[[grpc.ServicerContext], object] = lambda context: None
    # What asking for the load does before it answers.
    on_load: Callable[[grpc.ServicerContext], object] = lambda context: None
    # What cancelling does before it answers.
    on_cancel: Callable[[grpc.ServicerContext], object] = lambda context: None
    metadata: list[dict[str, str]] = field(default_factory=list)
    # Set when a chat was asked for.
    started: threading.Event = field(default_factory=threading.Event)
    # Set when a caller has left a chat, or its chat has ended.
    ended: threading.Event = field(default_factory=threading.Event)

    # ------------------------------------------------------------------------------------ what scripts are made of

    @staticmethod
    def accepted(request: chat_pb2.ChatRequest) -> chat_pb2.ChatEvent:
        queue = chat_pb2.QueueStatus(position=2, estimated_wait=duration_pb2.Duration(seconds=1, nanos=500_000_000))
        return chat_pb2.ChatEvent(
            accepted=chat_pb2.Accepted(
                request_id=request.request_id, resume_token="secret", queue=queue, prompt_tokens=5, seed=7
            )
        )

    @staticmethod
    def delta(position: int, text: str, *, choice: int = 0) -> chat_pb2.ChatEvent:
        """One token of one choice."""
        logprob = generation_pb2.TokenLogprob(
            logprob=-0.5, alternatives=[generation_pb2.TokenAlternative(token_id=9, logprob=-0.5)]
        )
        return chat_pb2.ChatEvent(
            next_position=position + 1,
            delta=generation_pb2.Delta(
                choice=choice, position=position, text=text, token_ids=[100 + position], logprobs=[logprob]
            ),
        )

    @staticmethod
    def finished(num_tokens: int, *, choices: int = 1) -> chat_pb2.ChatEvent:
        finishes = [
            generation_pb2.ChoiceFinish(choice=choice, reason=generation_pb2.FINISH_REASON_END_OF_TEXT)
            for choice in range(choices)
        ]
        return chat_pb2.ChatEvent(
            finished=chat_pb2.Finished(
                finishes=finishes,
                usage=chat_pb2.Usage(prompt_tokens=5, completion_tokens=num_tokens),
                timings=chat_pb2.Timings(queue=duration_pb2.Duration(nanos=250_000_000)),
            )
        )

    @staticmethod
    def answer(request: chat_pb2.ChatRequest, context: grpc.ServicerContext) -> Iterator[chat_pb2.ChatEvent]:
        yield ScriptedServer.accepted(request)
        yield chat_pb2.ChatEvent(waiting=chat_pb2.QueueStatus(position=1))
        for position, text in enumerate(ANSWER):
            yield ScriptedServer.delta(position, text)
        yield ScriptedServer.finished(len(ANSWER))

    @staticmethod
    def refuse(context: grpc.ServicerContext, code: int, message: str, *details: object) -> None:
        """Ends the call with a rich error."""
        status = status_pb2.Status(code=code, message=message)
        for detail in details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        context.abort_with_status(rpc_status.to_status(status))

    @staticmethod
    def error_info(reason: str) -> error_details_pb2.ErrorInfo:
        return error_details_pb2.ErrorInfo(reason=reason, domain="oasst.v1")

    # ----------------------------------------------------------------------------------------------------- the RPCs

    def ChatStream(self, request, context):
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        context.add_callback(self.ended.set)
        self.started.set()
        yield from (self.script or self.answer)(request, context)

    def Chat(self, request, context):
        choices: dict[int, generation_pb2.Delta] = {}
        for event in self.ChatStream(request, context):
            if event.HasField("delta"):
                whole = choices.setdefault(event.delta.choice, generation_pb2.Delta())
                whole.text += event.delta.text
                whole.token_ids.extend(event.delta.token_ids)
                whole.logprobs.extend(event.delta.logprobs)
        return chat_pb2.ChatResponse(
            request_id=request.request_id,
            choices=[
                chat_pb2.Choice(
                    text=choices[finish.choice].text,
                    token_ids=choices[finish.choice].token_ids,
                    logprobs=choices[finish.choice].logprobs,
                    finish=finish,
                )
                for finish in event.finished.finishes
            ],
            usage=event.finished.usage,
            timings=event.finished.timings,
            seed=7,
        )

    def SubmitChat(self, request, context):
        self.requests.append(request)
        return chat_pb2.SubmitChatResponse(accepted=self.accepted(request).accepted)

    def WatchChat(self, request, context):
        if request.resume_token != "secret":
            self.refuse(context, code_pb2.NOT_FOUND, "there is no such request", self.error_info("CHAT_NOT_FOUND"))
        yield from self.ChatStream(request, context)

    def GetChat(self, request, context):
        return chat_pb2.GetChatResponse(state=chat_pb2.CHAT_STATE_FINISHED, response=self.Chat(request, context))

    def CancelChat(self, request, context):
        self.on_cancel(context)
        if request.request_id == "unknown":
            self.refuse(context, code_pb2.NOT_FOUND, "there is no such request", self.error_info("REQUEST_NOT_FOUND"))
        self.cancelled.append(request.request_id)
        return chat_pb2.CancelChatResponse(state=chat_pb2.CHAT_STATE_CANCELLED)

    def Score(self, request, context):
        """Each byte of a continuation costs 0.2."""
        self.score_requests.append(request)
        self.on_score(request, context)
        lengths = [len(item.token_ids) - item.context_length for item in request.items]
        return scoring_pb2.ScoreResponse(
            scores=[
                scoring_pb2.ItemScore(
                    logprob=-0.2 * length, token_logprobs=[-0.2] * length if request.token_logprobs else []
                )
                for length in lengths
            ]
        )

    def ListModels(self, request, context):
        model = model_pb2.Model(
            name="tiny",
            vocab_size=256,
            tokenizer_size=250,
            max_positions=128,
            control_tokens=model_pb2.ControlTokens(prompter=2, assistant=1, end_of_text=0, padding=0),
            presets=[generation_pb2.SamplingParams(preset="k50", top_k=50, temperature=0.75)],
        )
        return model_pb2.ListModelsResponse(models=[model])

    def GetModel(self, request, context):
        return model_pb2.GetModelResponse(model=self.ListModels(request, context).models[0])

    def Tokenize(self, request, context):
        self.on_tokenize(context)
        if len(request.texts) > 256:
            self.refuse(context, code_pb2.INVALID_ARGUMENT, "texts must be 1 to 256")
        return model_pb2.TokenizeResponse(
            sequences=[model_pb2.TokenSequence(ids=text.encode()) for text in request.texts]
        )

    def Detokenize(self, request, context):
        if len(request.sequences) > 256:
            self.refuse(context, code_pb2.INVALID_ARGUMENT, "sequences must be 1 to 256")
        return model_pb2.DetokenizeResponse(texts=[bytes(each.ids).decode() for each in request.sequences])

    def GetLoad(self, request, context):
        self.on_load(context)
        worker = model_pb2.WorkerLoad(worker_id="w", max_sequences=4, age=duration_pb2.Duration(seconds=1))
        return model_pb2.GetLoadResponse(waiting_requests=3, workers=[worker])


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    scripted = ScriptedServer()
    grpc_server = grpc.server(ThreadPoolExecutor(max_workers=8))
    chat_pb2_grpc.add_ChatServiceServicer_to_server(scripted, grpc_server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(scripted, grpc_server)
    scoring_pb2_grpc.add_ScoringServiceServicer_to_server(scripted, grpc_server)
    scripted.address = f"127.0.0.1:{grpc_server.add_insecure_port('127.0.0.1:0')}"
    grpc_server.start()
    yield scripted
    grpc_server.stop(grace=None).wait()


@pytest.fixture
def client(server: ScriptedServer) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client
