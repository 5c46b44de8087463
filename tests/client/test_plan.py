"""What a load needs, from the shapes of model and card."""

import dataclasses
import json
import math

import pytest
from oasst_cli.__main__ import app
from oasst_cli.plan.capacity import Load, ServicePlan, make_plan, make_service_plan
from oasst_cli.plan.roofline import CARDS, PYTHIA_12B, Machine, StepWork
from typer.testing import CliRunner

LOAD = Load(requests_per_s=10, prompt_tokens=300, output_tokens=200)


def decoding(batch: int, context: int) -> StepWork:
    return StepWork(batch, batch, batch * context, batch * context)


def test_the_model_has_its_known_size() -> None:
    assert PYTHIA_12B.weight_bytes / 2 == pytest.approx(11.84e9, rel=0.001)
    assert PYTHIA_12B.bytes_read_per_step == pytest.approx(23.2e9, rel=0.002)
    assert PYTHIA_12B.kv_bytes_per_token == 737_280


@pytest.mark.parametrize(
    ("card", "cards", "batch", "floor_ms"),
    [
        ("H200", 1, 1, 5.5),
        ("H200", 1, 32, 8.2),
        ("H200", 1, 128, 16.6),
        ("A100-80", 1, 8, 15.0),
        ("A10G", 2, 1, 25.0),
    ],
)
def test_a_step_at_the_floor_takes_what_was_worked_out_by_hand(
    card: str, cards: int, batch: int, floor_ms: float
) -> None:
    machine = Machine(CARDS[card], cards, efficiency=1.0)
    assert machine.step_s(decoding(batch, 512)) * 1e3 == pytest.approx(floor_ms, rel=0.03)


def test_a_prompt_of_2048_tokens_is_bound_by_arithmetic() -> None:
    machine = Machine(CARDS["H200"], efficiency=1.0)
    prompt = StepWork(2048, 1, 2048, 2048**2 / 2)
    assert machine.compute_s(prompt) > machine.read_s(prompt)
    assert machine.step_s(prompt) == pytest.approx(0.061, rel=0.03)


def test_workers_follow_the_rate() -> None:
    plans = [make_plan(dataclasses.replace(LOAD, requests_per_s=rate), Machine(CARDS["H200"])) for rate in (1, 20, 40)]
    assert [plan.num_workers for plan in plans] == [1, 2, 3]
    assert len({plan.time_per_token_s for plan in plans}) == 1


def test_every_worker_keeps_something_for_bursts() -> None:
    full, planned = (make_plan(LOAD, Machine(CARDS["H200"]), utilisation=share) for share in (1.0, 0.5))
    assert planned.worker_requests_per_s == pytest.approx(full.worker_requests_per_s / 2)


def test_batches_are_as_large_as_readers_and_memory_allow() -> None:
    machine = Machine(CARDS["H200"])
    patient = make_plan(LOAD, machine, max_sequences=1024, max_time_per_token_s=1.0)
    hasty = make_plan(LOAD, machine, max_sequences=1024, max_time_per_token_s=0.02)
    assert patient.batch_size == patient.num_fitting == machine.kv_tokens // 500
    assert hasty.batch_size < patient.batch_size
    assert hasty.time_per_token_s <= 0.02


@pytest.mark.parametrize(
    ("load", "machine", "token_s"),
    [
        (LOAD, Machine(CARDS["T4"]), 1.0),  # Not even the weights fit.
        (LOAD, Machine(CARDS["H200"]), 0.001),  # No step is that short.
        (Load(1, 2000, 200), Machine(CARDS["H200"]), 1.0),  # More than the model's positions.
    ],
)
def test_there_is_no_plan_where_none_can_hold(load: Load, machine: Machine, token_s: float) -> None:
    assert make_plan(load, machine, max_time_per_token_s=token_s) is None


def service_plan(rate: float) -> ServicePlan:
    load = dataclasses.replace(LOAD, requests_per_s=rate)
    return make_service_plan(load, make_plan(load, Machine(CARDS["H200"])))


def test_a_small_load_needs_one_queue_and_a_second_gateway_for_the_day_that_one_dies() -> None:
    small = service_plan(1)
    assert (small.num_services, small.num_gateways, small.num_shards) == (1, 2, 1)


def test_gateways_and_shards_grow_with_the_tokens() -> None:
    some, twice = service_plan(350), service_plan(700)
    assert some.num_services == twice.num_services == 1
    assert some.num_gateways == math.ceil(350 * (200 * 110e-6 + 1e-3) / 0.6)
    assert twice.num_gateways == pytest.approx(2 * some.num_gateways, rel=0.1)
    assert 2 * some.num_shards <= twice.num_shards <= 3 * some.num_shards  # A push reaches most of them.


def test_a_queue_that_would_spend_itself_on_being_asked_becomes_several() -> None:
    large = service_plan(360_000)
    assert large.num_streams > 1_000_000
    assert large.num_services > 10
    assert large.num_shards <= 8 * large.num_services
    # What 0.6 of a core writes at most, were nobody to ask.
    assert large.num_shards > large.tokens_per_s * 12e-6 / 0.6


def test_the_command_prints_a_choice_for_each_line() -> None:
    result = CliRunner().invoke(app, ["plan", "--rate", "10", "--gpu", "H200", "--price", "3", "--json"])
    assert result.exit_code == 0, result.output
    choices = [json.loads(line) for line in result.output.splitlines()]
    assert [choice["cards_per_worker"] for choice in choices] == [1, 2, 4, 8]
    assert all(choice["cost_per_million_tokens"] > 0 for choice in choices)


def test_of_a_cache_in_fp8_twice_as_many_chats_fit() -> None:
    plan = ["plan", "--rate", "10", "--gpu", "A100-40", "--cards", "1", "--json"]
    [plain], [in_fp8] = (
        [json.loads(line) for line in CliRunner().invoke(app, [*plan, *more]).output.splitlines()]
        for more in ([], ["--kv-dtype", "fp8"])
    )
    assert in_fp8["num_fitting"] in (2 * plain["num_fitting"], 2 * plain["num_fitting"] + 1)
    assert in_fp8["worker_tokens_per_s"] > plain["worker_tokens_per_s"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpu", "H2O0"], "'H2O0' is not one of H200"),
        (["--prompt", "2000", "--output", "100"], "do not fit the model's 2048"),
        (["--gpu", "T4", "--cards", "1"], "more cards"),
        (["--cards", "3"], "3 cards cannot share the model's 40 heads evenly: one of 1, 2, 4, 5, 8"),
        (["--rate", "inf"], "Input should be less than or equal to 10000000"),
        (["--price", "nan"], "Input should be less than or equal to 1000000000"),
    ],
)
def test_what_cannot_be_planned_is_told(arguments: list[str], told: str) -> None:
    result = CliRunner().invoke(app, ["plan", "--rate", "1", *arguments])
    assert result.exit_code == 2
    assert told in " ".join(result.output.replace("│", " ").split())
