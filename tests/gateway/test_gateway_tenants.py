"""Who callers are, what they may do, and that nobody learns of another's requests."""

import asyncio
import base64
import hashlib
import hmac
import json
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import jwt
import pytest
from certificates import Authority
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from gateway_harness import Gateway, RuleWorker, ask, details_of, rule_text, start_gateway
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from oasst.v1 import chat_pb2, chat_pb2_grpc, model_pb2
from oasst_client import AsyncClient, PermissionDeniedError, Tls, UnauthenticatedError, UnavailableError
from oasst_gateway import chats
from oasst_gateway.errors import StartError
from oasst_gateway.errors import UnauthenticatedError as NoTenantError
from oasst_gateway.model import ServedModel
from oasst_gateway.preparation import PreparedJob, prepare_chat
from oasst_gateway.settings import read_settings
from oasst_gateway.tenants import ApiKey, Tenant, Tenants, draw_api_key
from oasst_gateway.web_tokens import JwtAuthenticator, JwtIssuer
from oasst_jobs import Claimer, QueueClient
from waiting import until

ISSUER, AUDIENCE = "https://id.example", "chat"

Metadata = tuple[tuple[str, str], ...]


def bearer(key: str) -> Metadata:
    return (("authorization", f"Bearer {key}"),)


def row(name: str, *keys: ApiKey, **settings: object) -> str:
    lines = [f"{field} = {str(value).lower()}" for field, value in settings.items()]
    pairs = ", ".join(f'{{ id = "{key.key_id}", sha256 = "{key.sha256}" }}' for key in keys)
    return "\n".join(["[[tenants]]", f'name = "{name}"', f"keys = [{pairs}]", *lines, ""])


def rewrite(path: Path, text: str) -> None:
    path.write_text(text)


@pytest.fixture
def acme() -> ApiKey:
    return draw_api_key()


@pytest.fixture
def umbrella() -> ApiKey:
    return draw_api_key()


@pytest.fixture
def tenants_file(tmp_path: Path, acme: ApiKey, umbrella: ApiKey) -> Path:
    path = tmp_path / "tenants.toml"
    path.write_text(row("acme", acme, is_trusted=True) + row("umbrella", umbrella, max_waiting_requests=1, weight=2.0))
    return path


@pytest.fixture
async def guarded(model: ServedModel, valkey_url: str, tenants_file: Path) -> AsyncIterator[Gateway]:
    async with start_gateway(model, valkey_url, tenants=tenants_file) as gateway:
        yield gateway


# ---------------------------------------------------------------------------------------------------------------- keys


def test_a_key_opens_its_tenants_door_and_no_other(tenants_file: Path, acme: ApiKey, umbrella: ApiKey) -> None:
    tenants = Tenants.from_file(tenants_file)
    assert tenants.tenant_of(f"Bearer {acme.key}").name == "acme"
    assert tenants.tenant_of(f"bearer {umbrella.key}").name == "umbrella"
    wrong = [
        "",
        acme.key,
        "Basic " + acme.key,
        "Bearer " + draw_api_key().key,
        f"Bearer oasst_{acme.key_id}_{umbrella.key.rpartition('_')[2]}",
        f"Bearer {acme.key}x",
        f"Bearer {acme.sha256}",
        "Bearer oasst_ü_ü",
    ]
    for authorization in wrong:
        with pytest.raises(NoTenantError):
            tenants.tenant_of(authorization)


def test_the_key_command_tells_a_key_and_the_line_that_admits_it(tmp_path: Path) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "oasst_gateway.keys"], capture_output=True, text=True, check=True
    ).stdout
    key, line = (each.strip() for each in told.splitlines() if each.startswith("    "))
    path = tmp_path / "tenants.toml"
    path.write_text(f'[[tenants]]\nname = "new"\nkeys = [{line}]\n')
    assert key not in path.read_text()
    assert Tenants.from_file(path).tenant_of(f"Bearer {key}").name == "new"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "tenants: Field required"),
        ("[[tenants]]\nname = 'a b'", "tenants.0.name: String should match"),
        ("[[tenants]]\nname = 'a'\nwieght = 2", "tenants.0.wieght: Extra inputs are not permitted"),
        ("[[tenants]]\nname = 'a'\nweight = 0", "tenants.0.weight: Input should be greater than"),
        ("[[tenants]]\nname = 'a'\nweight = 0.009", "tenants.0.weight: Input should be greater than or equal to 0.01"),
        ("[[tenants]]\nname = 'a'\nweight = 500", "tenants.0.weight: Input should be less than or equal to 100"),
        ("[[tenants]]\nname = 'a'\nweight = nan", "tenants.0.weight: Input should be"),
        ("[[tenants]]\nname = 'a'\n[[tenants]]\nname = 'a'", "two tenants named a"),
        ("[[tenants]\n", "cannot read the tenants"),
    ],
)
def test_a_wrong_tenants_file_is_told_with_what_to_change(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "tenants.toml"
    path.write_text(text)
    with pytest.raises(StartError, match=sentence):
        Tenants.from_file(path)


# ----------------------------------------------------------------------------------------------------------- web tokens


@pytest.fixture(scope="module")
def signer() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def public_pem(signer: rsa.RSAPrivateKey) -> str:
    pem = signer.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return pem.decode()


def claims(**changes: object) -> dict[str, object]:
    told = {"iss": ISSUER, "aud": AUDIENCE, "exp": time.time() + 60, "tenant": "acme"} | changes
    return {name: value for name, value in told.items() if value is not None}


def test_a_private_key_is_not_taken_for_the_issuers(signer: rsa.RSAPrivateKey) -> None:
    pem = signer.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    issuer = JwtIssuer(issuer=ISSUER, audience=AUDIENCE, key=pem, algorithm="RS256", tenant_claim="tenant")
    with pytest.raises(StartError, match="holds a private key; give the public one"):
        JwtAuthenticator(issuer, {})


@pytest.mark.parametrize(
    ("known", "unknown"),
    [
        pytest.param("2a8648ce3d030107", "2a8648ce3d030177", id="curve"),
        pytest.param("2a8648ce3d0201", "2a8648ce3d0277", id="kind"),
    ],
)
def test_a_key_of_an_unknown_curve_or_kind_is_told_as_such(known: str, unknown: str) -> None:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    body = base64.b64encode(der.replace(bytes.fromhex(known), bytes.fromhex(unknown))).decode()
    pem = f"-----BEGIN PUBLIC KEY-----\n{body}\n-----END PUBLIC KEY-----\n"
    issuer = JwtIssuer(issuer=ISSUER, audience=AUDIENCE, key=pem, algorithm="ES256", tenant_claim="tenant")
    with pytest.raises(StartError, match="the JWT key is no public key for ES256"):
        JwtAuthenticator(issuer, {})


def test_a_token_must_be_signed_current_ours_and_name_a_tenant(tenants_file: Path, signer: rsa.RSAPrivateKey) -> None:
    issuer = JwtIssuer(
        issuer=ISSUER, audience=AUDIENCE, key=public_pem(signer), algorithm="RS256", tenant_claim="tenant"
    )
    authenticator = JwtAuthenticator(issuer, Tenants.from_file(tenants_file).by_name)
    good = jwt.encode(claims(), signer, algorithm="RS256")
    assert authenticator.tenant_of(f"Bearer {good}").name == "acme"

    stranger = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    wrong = [
        jwt.encode(claims(), stranger, algorithm="RS256"),
        jwt.encode(claims(), signer, algorithm="RS512"),
        jwt.encode(claims(), None, algorithm="none"),
        # The trick of passing the public key off as a shared secret.
        _signed_by_hmac(public_pem(signer)),
        *(
            jwt.encode(claims(**{name: value}), signer, algorithm="RS256")
            for name, value in [
                ("exp", time.time() - 60),
                ("exp", None),
                ("iss", "https://evil.example"),
                ("iss", None),
                ("aud", "other"),
                ("aud", None),
                ("tenant", "nobody"),
                ("tenant", None),
            ]
        ),
        good[:-4] + "AAAA",
        "",
    ]
    for token in wrong:
        with pytest.raises(NoTenantError):
            authenticator.tenant_of(f"Bearer {token}")


def _signed_by_hmac(secret: str) -> str:
    """What an attacker makes, whose library does not refuse to."""

    def encoded(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    head = f"{encoded(json.dumps({'alg': 'HS256', 'typ': 'JWT'}).encode())}.{encoded(json.dumps(claims()).encode())}"
    return f"{head}.{encoded(hmac.digest(secret.encode(), head.encode(), hashlib.sha256))}"


async def test_keys_and_tokens_are_both_believed(
    model: ServedModel, valkey_url: str, tmp_path: Path, tenants_file: Path, acme: ApiKey, signer: rsa.RSAPrivateKey
) -> None:
    key_file = tmp_path / "issuer.pem"
    key_file.write_text(public_pem(signer))
    token = jwt.encode(claims(), signer, algorithm="RS256")
    async with start_gateway(
        model, valkey_url, tenants=tenants_file, jwt_key=key_file, jwt_issuer=ISSUER, jwt_audience=AUDIENCE
    ) as gateway:
        for proof in (acme.key, token):
            await gateway.model.ListModels(model_pb2.ListModelsRequest(), metadata=bearer(proof))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--jwt-key", "k.pem"], "--jwt-key, --jwt-issuer and --jwt-audience go together"),
        (
            ["--jwt-key", "k.pem", "--jwt-issuer", "i", "--jwt-audience", "a"],
            "--jwt-key needs --tenants: a token names one of them",
        ),
        (["--tls-cert", "c.pem"], "--tls-cert and --tls-key go together"),
        (["--tls-client-ca", "c.pem"], "--tls-client-ca needs --tls-cert and --tls-key"),
    ],
)
def test_options_that_need_each_other_say_so(arguments: list[str], sentence: str) -> None:
    with pytest.raises(StartError) as refused:
        read_settings(["--model", "m", *arguments])
    assert str(refused.value) == sentence


# ------------------------------------------------------------------------------------------------------------ requests


async def test_without_a_key_nothing_of_the_api_answers(guarded: Gateway) -> None:
    calls = [
        guarded.chat.Chat(ask("Hello!")),
        guarded.chat.ChatStream(ask("Hello!")).read(),
        guarded.chat.GetChat(chat_pb2.GetChatRequest()),
        guarded.model.ListModels(model_pb2.ListModelsRequest(), metadata=bearer("wrong")),
    ]
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        details = details_of(refused.value)
        assert (details.code, details.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")


async def test_the_same_request_id_is_another_request_for_another_tenant(
    guarded: Gateway, worker: RuleWorker, acme: ApiKey, umbrella: ApiKey
) -> None:
    first = await guarded.chat.Chat(ask("Hello!", request_id="r-1", max_new_tokens=2), metadata=bearer(acme.key))
    second = await guarded.chat.Chat(ask("Bye!", request_id="r-1", max_new_tokens=3), metadata=bearer(umbrella.key))
    assert [first.choices[0].text, second.choices[0].text] == [rule_text(2), rule_text(3)]
    assert {claimed.job.tenant for claimed in worker.claimed} == {"acme", "umbrella"}
    assert len({claimed.job.cache_salt for claimed in worker.claimed}) == 2


async def test_another_tenants_request_cannot_be_seen_watched_or_cancelled(
    guarded: Gateway, acme: ApiKey, umbrella: ApiKey
) -> None:
    """Not even with its resume token, which may have been seen in a log somewhere."""
    submitted = await guarded.chat.SubmitChat(ask("Hello!", request_id="r-1"), metadata=bearer(acme.key))
    name = {"request_id": "r-1", "resume_token": submitted.accepted.resume_token}
    thief = bearer(umbrella.key)
    calls = [
        guarded.chat.GetChat(chat_pb2.GetChatRequest(**name), metadata=thief),
        guarded.chat.WatchChat(chat_pb2.WatchChatRequest(**name), metadata=thief).read(),
        guarded.chat.CancelChat(chat_pb2.CancelChatRequest(**name), metadata=thief),
        guarded.chat.CancelChat(chat_pb2.CancelChatRequest(request_id="r-1"), metadata=thief),
    ]
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        assert details_of(refused.value).reason == "CHAT_NOT_FOUND"
    owner = await guarded.chat.GetChat(chat_pb2.GetChatRequest(**name), metadata=bearer(acme.key))
    assert owner.state == chat_pb2.CHAT_STATE_WAITING


async def test_a_request_is_cancelled_by_its_id_alone_but_not_with_a_token_that_is_not_its_own(
    guarded: Gateway, acme: ApiKey
) -> None:
    metadata = bearer(acme.key)
    await guarded.chat.SubmitChat(ask("Hello!", request_id="r-1"), metadata=metadata)
    cancel = chat_pb2.CancelChatRequest(request_id="r-1", resume_token="0" * 32)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await guarded.chat.CancelChat(cancel, metadata=metadata)
    assert details_of(refused.value).reason == "CHAT_NOT_FOUND"
    async with grpc.aio.insecure_channel(guarded.listen) as elsewhere:
        stub = chat_pb2_grpc.ChatServiceStub(elsewhere)
        answer = await stub.CancelChat(chat_pb2.CancelChatRequest(request_id="r-1"), metadata=metadata)
    assert answer.state == chat_pb2.CHAT_STATE_CANCELLED


async def test_only_trusted_tenants_form_turns_themselves(guarded: Gateway, acme: ApiKey, umbrella: ApiKey) -> None:
    raw = [
        chat_pb2.ChatRequest(prompt="<|prompter|>Hi<|endoftext|><|assistant|>"),
        chat_pb2.ChatRequest(token_ids=chat_pb2.TokenIds(ids=[1, 2])),
    ]
    for request in raw:
        await guarded.chat.SubmitChat(request, metadata=bearer(acme.key))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await guarded.chat.SubmitChat(request, metadata=bearer(umbrella.key))
        details = details_of(refused.value)
        assert (details.code, details.reason) == (grpc.StatusCode.PERMISSION_DENIED, "NOT_TRUSTED")


async def test_a_tenants_own_limit_refuses_that_tenant_alone(guarded: Gateway, acme: ApiKey, umbrella: ApiKey) -> None:
    await guarded.chat.SubmitChat(ask("Hello!"), metadata=bearer(umbrella.key))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await guarded.chat.SubmitChat(ask("Hello!"), metadata=bearer(umbrella.key))
    details = details_of(refused.value)
    assert (details.code, details.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TENANT_LIMIT")
    assert details.pushback_ms is not None
    for _ in range(3):
        await guarded.chat.SubmitChat(ask("Hello!"), metadata=bearer(acme.key))


async def test_a_tenant_that_fills_the_queue_keeps_no_other_out(
    model: ServedModel, valkey_url: str, tenants_file: Path, acme: ApiKey, umbrella: ApiKey
) -> None:
    async with start_gateway(model, valkey_url, tenants=tenants_file, max_waiting_jobs=4) as gateway:
        for _ in range(4):
            await gateway.chat.SubmitChat(ask("Hello!"), metadata=bearer(acme.key))
        for key, is_let_in in ((acme, False), (umbrella, True), (acme, False)):
            call = gateway.chat.SubmitChat(ask("Hello!"), metadata=bearer(key.key))
            if is_let_in:
                await call
                continue
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            assert details_of(refused.value).reason == "QUEUE_FULL"


async def test_a_tenant_that_has_all_chats_open_keeps_no_other_out(
    model: ServedModel, valkey_url: str, tenants_file: Path, acme: ApiKey, umbrella: ApiKey
) -> None:
    async with start_gateway(model, valkey_url, tenants=tenants_file, max_open_chats=8) as gateway:
        streams = [gateway.chat.ChatStream(ask("Hello!"), metadata=bearer(acme.key)) for _ in range(8)]
        for stream in streams:
            await stream.read()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await gateway.chat.SubmitChat(ask("Hello!"), metadata=bearer(acme.key))
        assert details_of(refused.value).reason == "TOO_MANY_CHATS"
        other = gateway.chat.ChatStream(ask("Hello!"), metadata=bearer(umbrella.key))
        assert (await other.read()).HasField("accepted")
        with pytest.raises(grpc.aio.AioRpcError) as refused:  # Not even of a tenant below its share.
            await gateway.chat.SubmitChat(ask("Hello!"), metadata=bearer(umbrella.key))
        assert details_of(refused.value).reason == "TOO_MANY_CHATS"
        for stream in (*streams, other):
            stream.cancel()


async def test_a_tenant_that_watches_one_request_until_it_is_refused_keeps_no_other_out(
    model: ServedModel, valkey_url: str, tenants_file: Path, acme: ApiKey, umbrella: ApiKey
) -> None:
    async with start_gateway(model, valkey_url, tenants=tenants_file, max_open_chats=8) as gateway:
        submitted = await gateway.chat.SubmitChat(ask("Hello!", request_id="r-1"), metadata=bearer(acme.key))
        watch = chat_pb2.WatchChatRequest(request_id="r-1", resume_token=submitted.accepted.resume_token)
        streams = [gateway.chat.WatchChat(watch, metadata=bearer(acme.key)) for _ in range(10)]
        for stream in streams:
            await stream.read()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await gateway.chat.WatchChat(watch, metadata=bearer(acme.key)).read()
        assert details_of(refused.value).reason == "TOO_MANY_CHATS"
        other = gateway.chat.ChatStream(ask("Hello!", request_id="r-2"), metadata=bearer(umbrella.key))
        assert (await other.read()).HasField("accepted")
        for stream in (*streams, other):
            stream.cancel()


async def test_long_prompts_of_a_tenant_hold_up_no_other(
    guarded: Gateway, acme: ApiKey, umbrella: ApiKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()

    def prepare(request: chat_pb2.ChatRequest, model: ServedModel, *, tenant: Tenant, **about: object) -> PreparedJob:
        if tenant.name == "acme":
            released.wait()
        return prepare_chat(request, model, tenant=tenant, **about)

    monkeypatch.setattr(chats, "prepare_chat", prepare)
    long = ask("a" * 10_000, "b", "c", truncation=chat_pb2.TRUNCATION_DROP_OLDEST_TURNS)
    flood = [guarded.chat.SubmitChat(long, metadata=bearer(acme.key)) for _ in range(40)]
    try:
        await until(lambda: guarded.sample("requests_in_flight", rpc="ChatService/SubmitChat") == len(flood))
        await guarded.chat.SubmitChat(long, metadata=bearer(umbrella.key), timeout=20)
    finally:
        released.set()
        await asyncio.gather(*flood)


async def test_a_tenants_weight_goes_with_its_jobs(
    guarded: Gateway, queue: QueueClient, acme: ApiKey, umbrella: ApiKey
) -> None:
    """Twice the weight, twice as many of the first jobs served."""
    for index in range(2):
        await guarded.chat.SubmitChat(ask("Hello!", request_id=f"a-{index}"), metadata=bearer(acme.key))
    await guarded.chat.SubmitChat(ask("Hello!", request_id="u-0"), metadata=bearer(umbrella.key))
    claimed = await Claimer(queue, worker_id="w", model="tiny").claim(max_jobs=3, max_tokens=10_000)
    assert [each.job.request_id for each in claimed] == ["a-0", "u-0", "a-1"]


async def test_with_tenants_the_server_does_not_describe_itself_to_strangers(guarded: Gateway) -> None:
    call = reflection_pb2_grpc.ServerReflectionStub(guarded.channel).ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call.read()
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_metrics_can_be_switched_off(model: ServedModel, valkey_url: str) -> None:
    async with start_gateway(model, valkey_url, metrics=False) as gateway:
        assert gateway.metrics_listen is None


async def test_a_tenants_file_is_read_anew_when_asked_and_a_wrong_one_changes_nothing(
    guarded: Gateway, tenants_file: Path, acme: ApiKey
) -> None:
    async def opens(key: ApiKey) -> bool:
        try:
            await guarded.model.ListModels(model_pb2.ListModelsRequest(), metadata=bearer(key.key))
        except grpc.aio.AioRpcError:
            return False
        return True

    newcomer = draw_api_key()
    assert (await opens(acme), await opens(newcomer)) == (True, False)
    rewrite(tenants_file, "[[tenants]")
    with pytest.raises(StartError, match="cannot read the tenants"):
        guarded.reload()
    assert (await opens(acme), await opens(newcomer)) == (True, False)
    rewrite(tenants_file, row("newcomer", newcomer))
    guarded.reload()
    assert (await opens(acme), await opens(newcomer)) == (False, True)


# ------------------------------------------------------------------------------------------------------------------ SDK


async def test_the_sdk_sends_its_key_and_tells_what_it_may_not_do(
    guarded: Gateway, worker: RuleWorker, umbrella: ApiKey
) -> None:
    async with AsyncClient(guarded.listen, api_key=umbrella.key) as client:
        assert (await client.chat("Hello!", max_new_tokens=2)).text == rule_text(2)
        with pytest.raises(PermissionDeniedError):
            await client.chat(prompt="<|prompter|>Hi<|endoftext|><|assistant|>")
    async with AsyncClient(guarded.listen) as stranger:
        with pytest.raises(UnauthenticatedError):
            await stranger.models()


async def test_the_sdk_speaks_tls_and_shows_its_certificate(
    model: ServedModel, valkey_url: str, worker: RuleWorker, tmp_path: Path
) -> None:
    ours, theirs = Authority(tmp_path), Authority(tmp_path, "somebody else")
    server, caller, stranger = ours.issue("server"), ours.issue("caller"), theirs.issue("stranger")
    async with start_gateway(
        model, valkey_url, tls_cert=server.cert, tls_key=server.key, tls_client_ca=ours.ca
    ) as gateway:
        me = Tls(ca=ours.ca, cert=caller.cert, key=caller.key)
        async with AsyncClient(gateway.listen, tls=me) as client:
            assert (await client.chat("Hello!", max_new_tokens=2)).text == rule_text(2)
        wrong = [
            Tls(ca=ours.ca),
            Tls(ca=ours.ca, cert=stranger.cert, key=stranger.key),
            Tls(ca=theirs.ca, cert=caller.cert, key=caller.key),
            None,
        ]
        for tls in wrong:
            async with AsyncClient(gateway.listen, tls=tls, query_timeout_s=0.5) as client:
                with pytest.raises(UnavailableError):
                    await client.models()


async def test_a_certificate_is_read_anew_when_asked_and_a_wrong_one_changes_nothing(
    model: ServedModel, valkey_url: str, tmp_path: Path, tenants_file: Path, acme: ApiKey
) -> None:
    before, after = Authority(tmp_path, "before"), Authority(tmp_path, "after")
    server = before.issue("server")

    async def answers(ca: Path) -> bool:
        async with AsyncClient(gateway.listen, tls=Tls(ca=ca), api_key=acme.key, query_timeout_s=0.5) as client:
            try:
                await client.models()
            except UnavailableError:
                return False
            return True

    async with start_gateway(
        model, valkey_url, tls_cert=server.cert, tls_key=server.key, tenants=tenants_file
    ) as gateway:
        assert (await answers(before.ca), await answers(after.ca)) == (True, False)
        after.issue("other").key.replace(server.key)
        rewrite(tenants_file, row("nobody"))
        with pytest.raises(StartError, match="no certificate and its key"):
            gateway.reload()
        assert (await answers(before.ca), await answers(after.ca)) == (True, False)
        rewrite(tenants_file, row("acme", acme))
        after.issue("server")
        gateway.reload()
        assert (await answers(before.ca), await answers(after.ca)) == (False, True)


async def test_a_missing_certificate_stops_the_start(model: ServedModel, valkey_url: str, tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"cannot read .*none\.pem"):
        async with start_gateway(model, valkey_url, tls_cert=tmp_path / "none.pem", tls_key=tmp_path / "none.pem"):
            pass


@pytest.mark.parametrize("address", ["10.0.0.1:50051", "chat.example:50051", "127.0.0.1:1,10.0.0.1:1", "dns:///x:1"])
async def test_a_key_does_not_leave_the_machine_unencrypted_unasked(address: str) -> None:
    with pytest.raises(ValueError, match="unencrypted"):
        AsyncClient(address, api_key="key")
    await AsyncClient(address, api_key="key", tls=False).close()
    await AsyncClient(address, api_key="key", tls=True).close()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "localhost:1", "unix:/tmp/s", "ipv4:127.0.0.1:1"])
async def test_a_key_may_travel_within_the_machine(address: str) -> None:
    await AsyncClient(address, api_key="key").close()
