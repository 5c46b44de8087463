"""From a load and a machine to how many are needed. Pure arithmetic on top of the roofline."""

import math
from dataclasses import dataclass

from oasst_cli.plan.roofline import Machine, StepWork

__all__ = ["Load", "Plan", "ServiceCosts", "ServicePlan", "make_plan", "make_service_plan"]

# Of one queue.
_MAX_SHARDS = 8


@dataclass(frozen=True)
class Load:
    """What callers ask for."""

    requests_per_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Plan:
    """What one worker does under its share of the load, and how many share it."""

    machine: Machine
    # Side by side in each worker when it is as busy as it should be.
    batch_size: int
    # That the KV cache holds at their longest.
    num_fitting: int
    # What a reader waits between two tokens, prompts of others included.
    time_per_token_s: float
    # Of a request that finds a slot.
    first_token_s: float
    worker_tokens_per_s: float
    worker_requests_per_s: float
    num_workers: int

    @property
    def num_cards(self) -> int:
        return self.num_workers * self.machine.num_cards

    def card_hours_per_million_tokens(self, load: Load) -> float:
        """Paid for whether used or not."""
        tokens_per_s = load.requests_per_s * load.output_tokens
        return self.num_cards / tokens_per_s * 1e6 / 3600


def make_plan(
    load: Load,
    machine: Machine,
    *,
    max_sequences: int = 64,
    max_time_per_token_s: float = 0.1,
    utilisation: float = 0.7,
    step_tokens: int = 512,
) -> Plan | None:
    """The plan with the fewest workers; None if the model does not fit, or no batch is fast enough.

    Each worker is given `utilisation` of what it can do at most: the rest is for bursts.
    """
    positions = load.prompt_tokens + load.output_tokens
    fitting = machine.kv_tokens // positions
    if positions > machine.model.max_positions or fitting < 1:
        return None
    times_s = {batch: _time_per_token_s(load, machine, batch) for batch in range(1, min(max_sequences, fitting) + 1)}
    fast = [batch for batch, time_s in times_s.items() if time_s <= max_time_per_token_s]
    if not fast:
        return None
    batch = max(fast, key=lambda size: size / times_s[size])
    requests_per_s = batch / times_s[batch] / load.output_tokens * utilisation
    return Plan(
        machine=machine,
        batch_size=batch,
        num_fitting=fitting,
        time_per_token_s=times_s[batch],
        first_token_s=_first_token_s(load, machine, batch, step_tokens),
        worker_tokens_per_s=requests_per_s * load.output_tokens,
        worker_requests_per_s=requests_per_s,
        num_workers=max(1, math.ceil(load.requests_per_s / requests_per_s)),
    )


def _time_per_token_s(load: Load, machine: Machine, batch: int) -> float:
    """The mean step of a worker with so many sequences at all times.

    In a steady state every step ends `batch / output_tokens` sequences, and computes as many prompts.
    """
    prompts = batch / load.output_tokens
    context = load.prompt_tokens + load.output_tokens / 2
    work = StepWork(
        num_tokens=round(batch + prompts * load.prompt_tokens),
        num_sequences=batch,
        cached_tokens=batch * context,
        attended_tokens=batch * context + prompts * load.prompt_tokens**2 / 2,
    )
    return machine.step_s(work)


def _first_token_s(load: Load, machine: Machine, batch: int, step_tokens: int) -> float:
    """The steps of one prompt beside a full batch, and half a step until the first of them begins."""
    context = load.prompt_tokens + load.output_tokens / 2
    budget = max(1, step_tokens - batch)
    num_steps = math.ceil(load.prompt_tokens / budget)
    chunk = min(load.prompt_tokens, budget)
    step_s = machine.step_s(
        StepWork(
            num_tokens=batch + chunk,
            num_sequences=batch,
            cached_tokens=batch * context,
            attended_tokens=batch * context + chunk * load.prompt_tokens / 2,
        )
    )
    return (num_steps + 0.5) * step_s


@dataclass(frozen=True)
class ServiceCosts:
    """What gateways and the queue spend. Measured by `python -m bench gateway queue` on a busy core of 2.4 GHz."""

    gateway_cpu_s_per_message: float = 110e-6
    # A push of n tokens takes the server a constant and n times something.
    redis_cpu_s_per_push: float = 81e-6
    redis_cpu_s_per_token: float = 12e-6
    redis_cpu_s_per_request: float = 300e-6  # To submit it and to claim it.
    # Being asked by who has nothing to do, each second: a gateway is told of every worker.
    redis_share_per_gateway: float = 140e-6
    redis_share_per_gateway_and_worker: float = 1.35e-6
    redis_share_per_worker: float = 250e-6
    redis_bytes_per_request: float = 1.4e3
    redis_bytes_per_prompt_token: float = 2.0
    redis_bytes_per_output_token: float = 36.0
    # Assumed, not measured.
    gateway_cpu_s_per_request: float = 1e-3
    gateway_bytes: float = 100e6
    gateway_bytes_per_stream: float = 60e3
    # A core that is busier answers late.
    max_core_share: float = 0.6


@dataclass(frozen=True)
class ServicePlan:
    """What stands beside the workers."""

    num_streams: int
    tokens_per_s: float
    # That know nothing of each other: each has its share of everything here, and a queue of its own.
    num_services: int
    num_gateways: int  # Processes of one core each.
    gateway_bytes: float  # Of each.
    num_shards: int  # Redis primaries of one busy core each.
    redis_bytes: float  # Of all shards.


def make_service_plan(
    load: Load, plan: Plan, *, retention_s: float = 300.0, costs: ServiceCosts = ServiceCosts()
) -> ServicePlan:
    """Gateways and shards beside these workers, each stream getting a message a token.

    Every process asks every shard of its queue, so a queue grows to a few shards only; then there are more services.
    """
    num_services = 1
    while (num_shards := _shards_of_one(load, plan, num_services, costs)) is None:
        num_services += 1
    num_streams = math.ceil(load.requests_per_s * load.output_tokens * plan.time_per_token_s)
    num_gateways = num_services * _gateways_of_one(load, num_services, costs)
    # A job can be read while it runs and for the retention after its end.
    stored_requests = load.requests_per_s * (load.output_tokens * plan.time_per_token_s + retention_s)
    return ServicePlan(
        num_streams=num_streams,
        tokens_per_s=load.requests_per_s * load.output_tokens,
        num_services=num_services,
        num_gateways=num_gateways,
        gateway_bytes=costs.gateway_bytes + num_streams / num_gateways * costs.gateway_bytes_per_stream,
        num_shards=num_services * num_shards,
        redis_bytes=stored_requests
        * (
            costs.redis_bytes_per_request
            + load.prompt_tokens * costs.redis_bytes_per_prompt_token
            + load.output_tokens * costs.redis_bytes_per_output_token
        ),
    )


def _gateways_of_one(load: Load, num_services: int, costs: ServiceCosts) -> int:
    """Processes of one of so many services; two at least, so that one may die."""
    cpu_s_per_request = load.output_tokens * costs.gateway_cpu_s_per_message + costs.gateway_cpu_s_per_request
    return max(2, math.ceil(load.requests_per_s / num_services * cpu_s_per_request / costs.max_core_share))


def _shards_of_one(load: Load, plan: Plan, num_services: int, costs: ServiceCosts) -> int | None:
    """The shards of the queue of one of so many services; None if there would be too many."""
    num_workers = math.ceil(plan.num_workers / num_services)
    num_gateways = _gateways_of_one(load, num_services, costs)
    requests_per_s = load.requests_per_s / num_services
    streams_of_worker = requests_per_s * load.output_tokens * plan.time_per_token_s / num_workers
    cpu_s_per_request = load.output_tokens * costs.redis_cpu_s_per_token + costs.redis_cpu_s_per_request
    pushes_per_s = num_workers / plan.time_per_token_s
    asked_share = num_workers * costs.redis_share_per_worker + num_gateways * (
        costs.redis_share_per_gateway + num_workers * costs.redis_share_per_gateway_and_worker
    )
    for num_shards in range(1, _MAX_SHARDS + 1):
        # Streams are spread by chance: a push reaches the shards that hold one of its worker's.
        reached_share = 1 - (1 - 1 / num_shards) ** max(1.0, streams_of_worker)
        share = (
            requests_per_s * cpu_s_per_request / num_shards
            + pushes_per_s * reached_share * costs.redis_cpu_s_per_push
            + asked_share
        )
        if share <= costs.max_core_share:
            return num_shards
    return None
