"""The simulation of workers behind the queue, with the real scheduler."""

import statistics
from types import SimpleNamespace

import pytest
from oasst.jobs.v1.job_pb2 import Job
from oasst.v1.generation_pb2 import GenerationLimits
from oasst_cli.plan.capacity import Load, make_plan
from oasst_cli.plan.roofline import CARDS, Machine, StepWork
from oasst_worker.generating import GeneratingJob
from oasst_worker.room import LOOKAHEAD_TOKENS

from bench.executors import EmptyExecutor
from bench.simulation import Arrival, WorkerShape, kv_tokens_expected, poisson_arrivals, simulate


def ten_ms(work: StepWork) -> float:
    return 0.01


def test_a_lone_request_takes_a_step_for_each_token() -> None:
    result = simulate([Arrival(1.0, 32, 5)], WorkerShape(ten_ms, kv_tokens=1024), num_workers=1)
    [chat] = result.chats
    assert chat.time_to_first_token_s == pytest.approx(0.01)
    assert chat.time_per_token_s == pytest.approx(0.01)
    assert result.num_steps == 5


def test_requests_share_steps_and_wait_when_there_is_no_slot() -> None:
    arrivals = [Arrival(0.0, 32, 10) for _ in range(3)]
    result = simulate(arrivals, WorkerShape(ten_ms, kv_tokens=1024, max_sequences=2), num_workers=1)
    assert result.num_steps == 20
    assert sorted(round(chat.claimed_s, 3) for chat in result.chats) == [0.0, 0.0, 0.1]


def test_what_does_not_fit_the_cache_waits_in_the_queue() -> None:
    arrivals = [Arrival(0.0, 64, 64) for _ in range(2)]
    result = simulate(arrivals, WorkerShape(ten_ms, kv_tokens=192), num_workers=1)
    assert sorted(round(chat.claimed_s, 2) for chat in result.chats) == [0.0, 0.64]


@pytest.mark.parametrize("output_tokens", [0, 1, 40, 99])
@pytest.mark.parametrize("prompt_tokens", [1, 16, 300])
def test_a_simulated_worker_keeps_as_much_cache_as_a_real_one(prompt_tokens: int, output_tokens: int) -> None:
    job = Job(prompt_token_ids=range(prompt_tokens), limits=GenerationLimits(max_new_tokens=100))
    real = SimpleNamespace(claimed=SimpleNamespace(job=job), _num_tokens={"choice": output_tokens})
    block_size = EmptyExecutor.block_size
    expected = GeneratingJob.kv_tokens_expected(real, LOOKAHEAD_TOKENS, block_size=block_size)
    assert kv_tokens_expected(prompt_tokens, output_tokens, max_new_tokens=100) == expected


def test_two_workers_serve_twice_as_much() -> None:
    arrivals = poisson_arrivals(40, 20, prompt_tokens=(16, 64), output_tokens=(50, 150), seed=3)
    waits_s = []
    for workers in (1, 2):
        chats = simulate(arrivals, WorkerShape(ten_ms, 65536, max_sequences=32), num_workers=workers).chats
        assert len(chats) == len(arrivals)
        waits_s.append(statistics.median(chat.claimed_s - chat.arrival.at_s for chat in chats))
    assert waits_s[0] > 1.0
    assert waits_s[1] < 0.1


def test_the_plans_time_per_token_is_the_simulations() -> None:
    machine = Machine(CARDS["H200"])
    plan = make_plan(Load(1, 300, 200), machine)
    arrivals = poisson_arrivals(
        plan.worker_requests_per_s, 30, prompt_tokens=(200, 400), output_tokens=(100, 300), seed=1
    )
    chats = simulate(arrivals, WorkerShape(machine.step_s, machine.kv_tokens), num_workers=1).chats
    busy = [chat.time_per_token_s for chat in chats if chat.arrival.at_s > 10]
    assert statistics.mean(busy) == pytest.approx(plan.time_per_token_s, rel=0.25)
