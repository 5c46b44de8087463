"""One gateway, from its parts: what starts first stops last."""

import asyncio
import functools
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from oasst_jobs import (
    Durability,
    Inbox,
    QueueClient,
    QueueLimits,
    QueueUnavailableError,
    Submitter,
    Sweeper,
    UnsupportedServerError,
    connect,
)
from oasst_telemetry import Tracer, TracingError, start_tracer
from prometheus_client import CollectorRegistry

from oasst_gateway.admission import Admission, Outlook
from oasst_gateway.authentication import FileAuthenticator
from oasst_gateway.chats import Chats
from oasst_gateway.derived_secrets import DerivedSecrets
from oasst_gateway.errors import StartError
from oasst_gateway.health import Health
from oasst_gateway.interceptors import RpcInterceptor
from oasst_gateway.metrics import GatewayMetrics
from oasst_gateway.model import ServedModel
from oasst_gateway.monitor import QueueMonitor, watch_event_loop
from oasst_gateway.offloading import TenantThreads
from oasst_gateway.open_requests import OpenRequests
from oasst_gateway.probes import serving_probes
from oasst_gateway.scores import Scores
from oasst_gateway.server import create_server
from oasst_gateway.service import ChatServicer, ModelServicer, ScoringServicer
from oasst_gateway.settings import GatewaySettings
from oasst_gateway.tls import ServerCertificate, TlsFiles
from oasst_gateway.watches import Watches

__all__ = ["RunningGateway", "running_gateway"]

logger = logging.getLogger(__name__)

# What an RPC needs to end, and to get its status out.
_FLUSH_S = 0.2
# How soon a loop begins again that failed.
_RESTART_S = 1.0
# So many RPCs of any kind may be open for each chat that may be: chats leave room for those who only ask.
_RPCS_PER_CHAT = 2
# For each so many chats that may be open, a tenant may have one RPC that tokenizes or detokenizes much text.
_CHATS_PER_TENANTS_TEXT = 16


@dataclass(frozen=True, slots=True)
class RunningGateway:
    """A gateway that serves."""

    listen: str  # HOST:PORT.
    metrics: str | None  # HOST:PORT or unix:/PATH; None if it serves none.
    authenticator: FileAuthenticator
    certificate: ServerCertificate | None

    def reload(self) -> None:
        """Tenants, issuer and certificate are what their files hold now, for new RPCs and connections.

        Raises:
            StartError: if one is missing or wrong. Then all of them are as before.
        """
        renewed = None if self.certificate is None else self.certificate.read()
        self.authenticator.reload()
        if self.certificate is not None and renewed is not None:
            self.certificate.renew(renewed)


@asynccontextmanager
async def running_gateway(
    settings: GatewaySettings, model: ServedModel, registry: CollectorRegistry, *, recheck_s: float = 5.0
) -> AsyncIterator[RunningGateway]:
    """A gateway serves as long as the context is open; open chats may then go on for the drain's grace.

    It looks after `recheck_s` at the log of a job that it hears nothing of.

    Raises:
        StartError: if Redis does not answer in time, an address is taken, or a file of the settings is wrong.
        UnsupportedServerError: if Redis is too old, or may drop jobs.
    """
    metrics = GatewayMetrics(registry)
    authenticator = FileAuthenticator(settings)
    certificate = _certificate(settings)
    async with AsyncExitStack() as stack:
        tracer = _start_tracer(settings)
        stack.push_async_callback(asyncio.to_thread, tracer.close)
        health = Health()
        metrics_address = None
        if settings.metrics:
            metrics_address = stack.enter_context(serving_probes(settings.metrics_listen, health, registry))
        redis = connect(settings.redis_url, num_shards=settings.queue_shards)
        stack.push_async_callback(redis.aclose)
        client = QueueClient(redis, num_shards=settings.queue_shards)
        limits = QueueLimits(
            max_waiting_jobs=settings.max_waiting_jobs,
            max_waiting_tokens=settings.max_waiting_tokens,
            retention_s=settings.retention_s,
        )
        durability = Durability(settings.durability)
        submitter = Submitter(client, gateway_id=settings.gateway_id, limits=limits, durability=durability)
        failures = metrics.loop_failures
        inbox = Inbox(
            client,
            gateway_id=settings.gateway_id,
            recheck_s=recheck_s,
            on_defect=failures.labels("inbox").inc,
        )
        sweeper = Sweeper(client, on_sweep=metrics.record_sweep, on_defect=failures.labels("sweeper").inc)
        await health.start()
        monitor = QueueMonitor(submitter, model_name=model.name, metrics=metrics, on_change=health.set_queue_available)
        await stack.enter_async_context(
            _running(
                metrics,
                inbox=inbox.run,
                sweeper=sweeper.run,
                monitor=monitor.run,
                event_loop=functools.partial(watch_event_loop, metrics, health),
            )
        )
        await _wait_for_queue(client, monitor, durability, timeout_s=settings.redis_wait_s)
        watches = Watches(submitter, inbox)
        stack.push_async_callback(watches.aclose)
        open_requests = OpenRequests(settings.max_open_chats)
        threads = TenantThreads(most_per_tenant=max(1, settings.max_open_chats // _CHATS_PER_TENANTS_TEXT))
        stack.callback(threads.close)
        log_threads = TenantThreads()
        stack.callback(log_threads.close)
        derived_secrets = DerivedSecrets(_secret(settings))
        chats = Chats(
            model=model,
            submitter=submitter,
            watches=watches,
            open_requests=open_requests,
            monitor=monitor,
            admission=Admission(
                submitter,
                look_out=monitor.look_out,
                worker_wait_s=settings.worker_wait_s,
                max_waiting_jobs=settings.max_waiting_jobs,
            ),
            metrics=metrics,
            secrets=derived_secrets,
            threads=threads,
            log_threads=log_threads,
            default_grace_s=settings.detach_grace_s,
        )
        scores = Scores(
            model=model,
            watches=watches,
            open_requests=open_requests,
            admission=Admission(
                submitter,
                # How fast workers score beside their chats is not known: nothing is refused for its deadline.
                look_out=lambda: Outlook(has_workers=monitor.look_out().has_workers, tokens_per_s=None),
                worker_wait_s=settings.worker_wait_s,
                max_waiting_jobs=settings.max_waiting_jobs,
            ),
            metrics=metrics,
            secrets=derived_secrets,
            threads=threads,
            grace_s=settings.detach_grace_s,
        )
        await stack.enter_async_context(_running(metrics, chats=chats.run))
        server, port = create_server(
            listen=settings.listen,
            certificate=certificate,
            chat_servicer=ChatServicer(chats),
            model_servicer=ModelServicer(model, submitter, monitor, threads),
            scoring_servicer=ScoringServicer(scores),
            health=health,
            interceptor=RpcInterceptor(
                authenticator, metrics, tracer, max_open_rpcs=_RPCS_PER_CHAT * settings.max_open_chats
            ),
            max_message_bytes=settings.max_message_bytes,
            reuse_port=settings.reuse_port,
            with_reflection=settings.tenants is None if settings.reflection is None else settings.reflection,
        )
        await server.start()
        departure = _Departure(health, server, open_requests, watches, (chats, scores))
        stack.push_async_callback(departure.run, delay_s=settings.drain_delay_s, grace_s=settings.drain_grace_s)
        yield RunningGateway(_with_port(settings.listen, port), metrics_address, authenticator, certificate)


async def _wait_for_queue(
    client: QueueClient, monitor: QueueMonitor, durability: Durability, *, timeout_s: float
) -> None:
    """The queue answers, and keeps what it is given.

    Raises:
        StartError: if it does not answer within `timeout_s`.
        UnsupportedServerError
    """
    try:
        async with asyncio.timeout(timeout_s):
            await monitor.wait_available()
            await _check_servers(client, durability)
    except TimeoutError as error:
        raise StartError(f"Redis did not answer within {timeout_s:g} s, which is --redis-wait-s") from error


async def _check_servers(client: QueueClient, durability: Durability) -> None:
    """Those that hold the queue are fit for it, as soon as they can be asked."""
    while True:
        try:
            await client.check_server(may_spread_anew=True)
            if durability is Durability.REPLICATED and not await client.least_replicas():
                logger.warning(
                    "--durability replicated refuses every request while a server of the queue has no replica"
                )
            return
        except QueueUnavailableError as error:
            logger.warning("queue away again, waiting for it error=%s", error)
        await asyncio.sleep(_RESTART_S)


@dataclass(frozen=True, slots=True)
class _Departure:
    """How a gateway that was asked to stop goes."""

    health: Health
    server: grpc.aio.Server
    open_requests: OpenRequests
    watches: Watches
    followers: Sequence[Chats | Scores]

    async def run(self, *, delay_s: float, grace_s: float) -> None:
        """New callers go elsewhere, open requests have ended or been handed on, the server has stopped."""
        await self.health.leave()
        await asyncio.sleep(delay_s)
        # Health watchers never end by themselves: the server's own grace cannot tell when the last request has ended.
        stopping = asyncio.create_task(self.server.stop(grace_s + 3 * _FLUSH_S))
        if not await self.open_requests.wait_idle(grace_s):
            logger.warning("requests are open after the grace, their callers are sent elsewhere grace_s=%g", grace_s)
        self.open_requests.leave()
        self.watches.leave()
        for follower in self.followers:
            follower.leave()
        if not await self.open_requests.wait_idle(_FLUSH_S):
            self.open_requests.end()  # Those that follow nothing yet.
            await self.open_requests.wait_idle(_FLUSH_S)
        await self.server.stop(_FLUSH_S)
        await stopping


@asynccontextmanager
async def _running(metrics: GatewayMetrics, **loops: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """The loops run as long as the context is open; if one fails for good, so does the context, for the same reason."""
    failure = None
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_keep_running(name, loop, metrics)) for name, loop in loops.items()]
            yield
            for task in tasks:
                task.cancel()
    except BaseExceptionGroup as failures:
        failure = failures.exceptions[0]
    if failure is not None:
        raise failure  # Outside of the handler: there it would have the group it is in for its context, in a circle.


async def _keep_running(name: str, loop: Callable[[], Coroutine[Any, Any, None]], metrics: GatewayMetrics) -> None:
    """The loop runs, and begins again should it fail: what one job or answer did to it must not end all chats.

    Raises:
        UnsupportedServerError: that does not pass by itself.
    """
    failures = metrics.loop_failures.labels(name)
    while True:
        try:
            await loop()
        except UnsupportedServerError:
            raise
        except Exception:
            logger.exception("loop failed, begins again loop=%s", name)
            failures.inc()
        await asyncio.sleep(_RESTART_S)


def _certificate(settings: GatewaySettings) -> ServerCertificate | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return ServerCertificate(TlsFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca))


def _secret(settings: GatewaySettings) -> bytes:
    if settings.resume_secret is None:
        logger.warning("without --resume-secret, resume tokens of this process are good at no other")
        return secrets.token_bytes(32)
    return settings.resume_secret.get_secret_value().encode()


def _start_tracer(settings: GatewaySettings) -> Tracer:
    try:
        return start_tracer(settings.otlp_endpoint, service="oasst-gateway", instance=settings.gateway_id)
    except TracingError as error:
        raise StartError(f"--otlp-endpoint: {error}") from error


def _with_port(address: str, port: int) -> str:
    return f"{address.rpartition(':')[0]}:{port}"
