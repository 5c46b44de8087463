"""What stands around the chats: models, health, reflection, metrics, and a queue that goes away."""

import asyncio
import importlib
import logging
import pkgutil
import threading
import urllib.request

import grpc
import oasst.v1
import pytest
import redis.asyncio
from gateway_harness import Gateway, RuleWorker, ask, details_of, read_text, rule_text, start_gateway
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from oasst.presets import PRESETS
from oasst.v1 import model_pb2
from oasst_gateway import chats, service
from oasst_gateway.errors import StartError
from oasst_gateway.model import ServedModel
from oasst_gateway.monitor import QueueMonitor
from oasst_gateway.services import SERVICES
from oasst_jobs import QueueClient, QueueUnavailableError, UnavailableReason, UnsupportedServerError
from valkey_server import ValkeyServer
from waiting import until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health_of(gateway: Gateway, name: str = "") -> int:
    response = await health_pb2_grpc.HealthStub(gateway.channel).Check(health_pb2.HealthCheckRequest(service=name))
    return int(response.status)


async def services_of(gateway: Gateway) -> set[str]:
    call = reflection_pb2_grpc.ServerReflectionStub(gateway.channel).ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    response = await call.read()
    call.cancel()
    return {each.name for each in response.list_services_response.service}


async def test_the_model_is_told_with_its_limits_and_presets(gateway: Gateway, model: ServedModel) -> None:
    (listed,) = (await gateway.model.ListModels(model_pb2.ListModelsRequest())).models
    assert listed == (await gateway.model.GetModel(model_pb2.GetModelRequest())).model
    assert listed == (await gateway.model.GetModel(model_pb2.GetModelRequest(name="tiny"))).model
    assert (listed.name, listed.max_positions, listed.max_prompt_tokens, listed.max_choices) == ("tiny", 256, 255, 4)
    assert listed.vocab_size == listed.tokenizer_size + 7
    assert model.tokenizer.decode([listed.control_tokens.prompter], skip_control_tokens=False) == "<|prompter|>"
    assert [preset.preset for preset in listed.presets] == list(PRESETS)
    assert listed.presets[0].top_k == 50


async def test_text_becomes_ids_and_ids_text(gateway: Gateway) -> None:
    texts = ["Hello, <|prompter|>!", "日本語"]
    plain = await gateway.model.Tokenize(model_pb2.TokenizeRequest(texts=texts))
    parsed = await gateway.model.Tokenize(model_pb2.TokenizeRequest(texts=texts, parse_control_tokens=True))
    assert len(parsed.sequences[0].ids) < len(plain.sequences[0].ids)
    for tokenized in (plain, parsed):
        whole = await gateway.model.Detokenize(model_pb2.DetokenizeRequest(sequences=tokenized.sequences))
        assert list(whole.texts) == texts
    bare = await gateway.model.Detokenize(
        model_pb2.DetokenizeRequest(sequences=parsed.sequences, skip_control_tokens=True)
    )
    assert bare.texts[0] == "Hello, !"


async def test_large_texts_are_looked_at_beside_the_event_loop(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    for check in ("check_tokenize", "check_detokenize"):
        monkeypatch.setattr(service, check, lambda *_, **__: threads.append(threading.current_thread()))
    await gateway.model.Tokenize(model_pb2.TokenizeRequest(texts=["a" * 10_000]))
    ids = model_pb2.TokenSequence(ids=[1] * 10_000)
    await gateway.model.Detokenize(model_pb2.DetokenizeRequest(sequences=[ids]))
    assert len(threads) == 2
    assert threading.main_thread() not in threads


async def test_rpcs_of_all_kinds_together_are_bounded_and_health_is_told_all_the_same(
    model: ServedModel, valkey_url: str
) -> None:
    async with start_gateway(model, valkey_url, max_open_chats=1) as gateway:
        streams = [gateway.chat.ChatStream(ask("Hello!", request_id="r-1")) for _ in range(2)]
        for stream in streams:
            await stream.read()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await gateway.model.Tokenize(model_pb2.TokenizeRequest(texts=["Hello!"]))
        details = details_of(refused.value)
        assert (details.code, details.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_RPCS")
        assert details.retry_after_s is not None
        assert await health_of(gateway) == SERVING
        for stream in streams:
            stream.cancel()


async def test_half_a_character_becomes_the_replacement_character(gateway: Gateway) -> None:
    ids = (await gateway.model.Tokenize(model_pb2.TokenizeRequest(texts=["\U00010348"]))).sequences[0].ids
    half = model_pb2.TokenSequence(ids=ids[:1])
    (text,) = (await gateway.model.Detokenize(model_pb2.DetokenizeRequest(sequences=[half]))).texts
    assert text == "\ufffd"


def test_no_service_of_the_api_is_forgotten() -> None:
    modules = [importlib.import_module(f"oasst.v1.{info.name}") for info in pkgutil.iter_modules(oasst.v1.__path__)]
    files = [module.DESCRIPTOR for module in modules if hasattr(module, "DESCRIPTOR")]
    named = {service.full_name for file in files for service in file.services_by_name.values()}
    assert named == set(SERVICES)


async def test_health_is_told_for_each_service(gateway: Gateway) -> None:
    ours = {name for name in await services_of(gateway) if name.startswith("oasst.")}
    assert {"oasst.v1.ChatService", "oasst.v1.ModelService", "oasst.v1.ScoringService"} <= ours
    for name in ("", *ours):
        assert await health_of(gateway, name) == SERVING
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await health_of(gateway, "nobody")
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_can_be_switched_off(model: ServedModel, valkey_url: str, gateway: Gateway) -> None:
    assert {"oasst.v1.ChatService", "grpc.health.v1.Health"} <= await services_of(gateway)
    async with start_gateway(model, valkey_url, reflection=False) as closed:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await services_of(closed)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_gateway_warns_of_what_it_cannot_keep(
    model: ServedModel, valkey_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with start_gateway(model, valkey_url, durability="replicated"):
        pass
    assert "while a server of the queue has no replica" in caplog.text
    assert "resume tokens of this process are good at no other" in caplog.text
    caplog.clear()
    async with start_gateway(model, valkey_url, resume_secret="a secret of many"):
        pass
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


async def test_while_the_queue_is_away_the_gateway_says_so_and_serves_again_by_itself(
    model: ServedModel, valkey: ValkeyServer, gateway: Gateway, worker: RuleWorker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    watch = health_pb2_grpc.HealthStub(gateway.channel).Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == SERVING
    await gateway.chat.Chat(ask("Hello!"))
    valkey.kill()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await gateway.chat.Chat(ask("Hello!"))
    details = details_of(refused.value)
    assert (details.code, details.reason) == (grpc.StatusCode.UNAVAILABLE, "QUEUE_UNAVAILABLE")
    assert details.retry_after_s == 1.0
    assert details.pushback_ms == 1000
    assert "reason=QUEUE_UNAVAILABLE cause=QUEUE_UNREACHABLE" in caplog.text
    assert (await watch.read()).status == NOT_SERVING
    assert await health_of(gateway, "oasst.v1.ModelService") == SERVING
    assert await health_of(gateway, "oasst.v1.ScoringService") == NOT_SERVING
    assert gateway.sample("redis_up") == 0
    await gateway.model.Tokenize(model_pb2.TokenizeRequest(texts=["still here"]))
    valkey.start()
    assert (await watch.read()).status == SERVING
    assert gateway.sample("redis_up") == 1
    watch.cancel()


async def test_a_stream_outlives_a_restart_of_the_queue(
    valkey: ValkeyServer, gateway: Gateway, worker: RuleWorker
) -> None:
    worker.hold()
    worker.allow(2)
    call = gateway.chat.ChatStream(ask("Hello!", request_id="r-1"))
    await call.read()
    await until(lambda: gateway.sample("generated_tokens_total") == 2)
    valkey.kill()
    await asyncio.to_thread(valkey.start)
    worker.free()
    assert await read_text(call) == rule_text(4)


async def test_whoever_leaves_while_the_queue_is_away_still_ends_the_work(
    valkey: ValkeyServer, gateway: Gateway, queue: QueueClient
) -> None:
    call = gateway.chat.ChatStream(ask("Hello!", request_id="r-1"))
    await call.read()
    valkey.kill()
    call.cancel()
    await until(lambda: gateway.sample("requests_in_flight", rpc="ChatService/ChatStream") == 0)
    await asyncio.to_thread(valkey.start)

    async def is_gone() -> bool:
        return (await queue.load("tiny")).waiting_jobs == 0

    await until(is_gone)


async def test_metrics_can_be_scraped(gateway: Gateway, worker: RuleWorker) -> None:
    await gateway.chat.Chat(ask("Hello!", max_new_tokens=3))
    with await asyncio.to_thread(urllib.request.urlopen, f"http://{gateway.metrics_listen}/metrics") as response:
        text = response.read().decode()
    for line in (
        'oasst_gateway_requests_total{code="OK",rpc="ChatService/Chat"} 1.0',
        'oasst_gateway_requests_in_flight{rpc="ChatService/Chat"} 0.0',
        "oasst_gateway_generated_tokens_total 3.0",
        'gen_ai_server_time_to_first_token_seconds_count{gen_ai_operation_name="chat"} 1.0',
        "oasst_gateway_queue_wait_seconds_count 1.0",
        "oasst_gateway_redis_up 1.0",
    ):
        assert line in text
    assert "oasst_gateway_event_loop_lag_seconds_bucket" in text


async def test_a_queue_that_goes_away_again_while_a_gateway_starts_is_waited_for(
    model: ServedModel, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, num_checks = QueueClient.check_server, 0

    async def check_second_time(client: QueueClient, **settings: bool) -> None:
        nonlocal num_checks
        num_checks += 1
        if num_checks == 1:
            raise QueueUnavailableError(UnavailableReason.UNREACHABLE, "gone")
        await check(client, **settings)

    monkeypatch.setattr(QueueClient, "check_server", check_second_time)
    async with start_gateway(model, valkey_url) as gateway:
        assert await health_of(gateway) == SERVING
    assert num_checks == 2


async def test_a_start_without_redis_fails_in_time(model: ServedModel) -> None:
    with pytest.raises(StartError, match=r"did not answer within 0\.1 s, which is --redis-wait-s"):
        async with start_gateway(model, "unix:///nowhere.sock", redis_wait_s=0.1):
            pass


async def test_a_port_in_use_is_named(model: ServedModel, valkey_url: str, gateway: Gateway) -> None:
    with pytest.raises(StartError, match=gateway.listen):
        async with start_gateway(model, valkey_url, listen=gateway.listen):
            pass
    with pytest.raises(StartError, match="metrics"):
        async with start_gateway(model, valkey_url, metrics_listen=gateway.metrics_listen):
            pass


async def test_whoever_comes_while_it_stops_is_sent_elsewhere(
    model: ServedModel, valkey_url: str, worker: RuleWorker
) -> None:
    worker.hold()
    async with start_gateway(model, valkey_url, drain_grace_s=20) as gateway:
        watch = health_pb2_grpc.HealthStub(gateway.channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        call = gateway.chat.ChatStream(ask("Hello!"))
        await call.read()

        async def look_while_it_stops() -> int:
            status = (await watch.read()).status
            worker.free()
            return int(status)

        looking = asyncio.create_task(look_while_it_stops())
        ending = asyncio.create_task(read_text(call))
    assert await looking == NOT_SERVING
    assert await ending == rule_text(4)


async def test_whoever_is_not_accepted_yet_when_it_stops_is_sent_elsewhere_as_well(
    model: ServedModel, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_prepare = threading.Event()
    is_preparing = asyncio.Event()
    loop = asyncio.get_running_loop()

    def prepare_late(*_: object, **__: object) -> None:
        loop.call_soon_threadsafe(is_preparing.set)
        may_prepare.wait(10)

    monkeypatch.setattr(chats, "prepare_chat", prepare_late)
    async with start_gateway(model, valkey_url, drain_grace_s=0.1) as gateway:
        call = asyncio.ensure_future(gateway.chat.Chat(ask("long " * 2_000)))
        await is_preparing.wait()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    may_prepare.set()
    assert details_of(refused.value).reason == "GATEWAY_LEAVING"


async def test_a_loop_that_fails_is_counted_and_begins_again(
    model: ServedModel, valkey_url: str, worker: RuleWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, num_looks = QueueMonitor._look, 0

    async def fail_at_first(monitor: QueueMonitor) -> None:
        nonlocal num_looks
        num_looks += 1
        if num_looks == 1:
            raise TypeError("a defect")
        await look(monitor)

    monkeypatch.setattr(QueueMonitor, "_look", fail_at_first)
    async with start_gateway(model, valkey_url) as gateway:
        assert gateway.sample("loop_failures_total", loop="monitor") == 1
        assert (await gateway.chat.Chat(ask("Hello!"))).choices[0].text == rule_text(4)


async def test_a_server_that_may_drop_jobs_stops_the_start_and_is_not_waited_for(
    model: ServedModel, valkey_url: str
) -> None:
    async with redis.asyncio.Redis.from_url(valkey_url) as connection:
        await connection.config_set("maxmemory", "100mb")
        await connection.config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(UnsupportedServerError, match="maxmemory-policy"):
        async with asyncio.timeout(10), start_gateway(model, valkey_url):
            pass
