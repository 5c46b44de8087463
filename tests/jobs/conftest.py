"""A queue on a fresh Valkey, and both of its sides."""

from collections.abc import AsyncIterator

import pytest
import redis.asyncio
from job_samples import MODEL
from oasst_jobs import Claimer, QueueClient, QueueLimits, Submitter, Sweeper, connect

# Long enough for nobody to lose a lease by accident; tests that lose one on purpose say so.
LEASE_MS = 10_000

# Longer than a slow machine takes from sweep to sweep, and shorter than the stalls that tests make.
STALL_S = 9.0


@pytest.fixture
async def redis_client(valkey_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    client = connect(valkey_url)
    yield client
    await client.aclose()


@pytest.fixture
def client(redis_client: redis.asyncio.Redis) -> QueueClient:
    return QueueClient(redis_client)


@pytest.fixture
def submitter(client: QueueClient) -> Submitter:
    return Submitter(client, gateway_id="gateway-1", limits=QueueLimits())


@pytest.fixture
def claimer(client: QueueClient) -> Claimer:
    return Claimer(client, worker_id="worker-1", model=MODEL, lease_ms=LEASE_MS)


@pytest.fixture
def hasty_claimer(client: QueueClient) -> Claimer:
    """A worker whose leases are lost at once."""
    return Claimer(client, worker_id="hasty-worker", model=MODEL, lease_ms=1)


@pytest.fixture
def sweeper(client: QueueClient) -> Sweeper:
    return Sweeper(client, stall_s=STALL_S)
