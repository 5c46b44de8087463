"""`python -m bench.capacity`: the plan beside the simulation, and the simulation beside measured runs here."""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from oasst_cli.plan.capacity import Load, make_plan
from oasst_cli.plan.roofline import CARDS, Machine, StepWork
from oasst_client import AsyncClient, Delta
from oasst_worker import engine
from oasst_worker.engine import Engine, EngineConfig, GenerationParams
from oasst_worker.model.config import load_config
from oasst_worker.runtime import RuntimeOptions, build_executor
from tokenizers import Tokenizer

from bench.checkpoints import DEMO, complete_with_demo_tokenizer, random_checkpoint, random_prompts
from bench.services import running_stack, steps_of
from bench.simulation import Arrival, Chat, Simulated, StepLaw, WorkerShape, poisson_arrivals, simulate, work_of

SIMULATED_S = 120.0
PLANNED = (("H200", 1, 1), ("H200", 1, 4), ("A100-80", 1, 2), ("A10G", 2, 4))
PROMPT_TOKENS, OUTPUT_TOKENS = 300, 200

MEASURED_S = 30.0
MEASURED_RATES = {"demo": (5.0, 20.0), "160m": (1.0, 2.0, 4.0)}
MEASURED_PROMPTS, MEASURED_OUTPUTS = (16, 96), (16, 96)
MAX_SEQUENCES = 32


def main() -> None:
    print(_plan_table())
    with tempfile.TemporaryDirectory() as folder:
        large = random_checkpoint("160m", Path(folder))
        complete_with_demo_tokenizer(large)
        print(_measured_table({"demo": DEMO, "160m": large}))


def _plan_table() -> str:
    """Each choice at the rate the plan holds it good for, and at the full one."""
    rows = [
        "| workers | requests/s | ms/token: plan | simulated | first token, p50: plan | simulated | p95 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, cards, workers in PLANNED:
        machine = Machine(CARDS[name], cards)
        plan = make_plan(Load(1.0, PROMPT_TOKENS, OUTPUT_TOKENS), machine)
        if plan is None:
            raise RuntimeError(f"{cards}x {name} cannot serve this load")
        rate = plan.worker_requests_per_s * workers
        chats = _simulate_evenly(rate, machine, workers)
        first_s = sorted(chat.time_to_first_token_s for chat in chats)
        rows.append(
            f"| {workers} x {cards} {name} | {rate:.1f} | {plan.time_per_token_s * 1e3:.1f}"
            f" | {statistics.mean(chat.time_per_token_s for chat in chats) * 1e3:.1f}"
            f" | {plan.first_token_s * 1e3:.0f} | {statistics.median(first_s) * 1e3:.0f}"
            f" | {first_s[int(0.95 * len(first_s))] * 1e3:.0f} |"
        )
    return "\n".join(rows)


def _simulate_evenly(rate: float, machine: Machine, num_workers: int) -> list[Chat]:
    """Lengths vary by half around those of the plan. The start, while batches fill, does not count."""
    arrivals = poisson_arrivals(
        rate,
        SIMULATED_S,
        prompt_tokens=(PROMPT_TOKENS // 2, PROMPT_TOKENS * 3 // 2),
        output_tokens=(OUTPUT_TOKENS // 2, OUTPUT_TOKENS * 3 // 2),
        seed=1,
    )
    shape = WorkerShape(machine.step_s, machine.kv_tokens)
    chats = simulate(arrivals, shape, num_workers=num_workers).chats
    return [chat for chat in chats if chat.arrival.at_s > SIMULATED_S / 4]


@dataclass(frozen=True)
class Measured:
    """A request of the real service."""

    time_to_first_token_s: float
    time_per_token_s: float


def _measured_table(checkpoints: dict[str, Path]) -> str:
    """Models on this machine, and how far the simulation is off.

    Twice: with steps as long as the engine alone takes for them, and with the same law stretched until its mean step is
    the one that the worker told of. The first shows what the path and its neighbours cost, the second how well the
    queue, the claims and the batches are simulated.
    """
    rows = [
        "| model | requests/s | | measured | simulated | off | with the worker's steps | off |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, folder in checkpoints.items():
        rows += [f"| {name} {row}" for row in _measured_rows(folder, MEASURED_RATES[name])]
    return "\n".join(rows)


def _measured_rows(folder: Path, rates: Sequence[float]) -> list[str]:
    law = fit_law(folder)
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    rows = []
    # Greedy answers to random prompts repeat themselves: guesses would be right, and the simulation has none.
    with running_stack(folder, OASST_WORKER_SPECULATE="0") as stack:
        worker = next(each for each in stack["processes"] if each["role"] == "worker")
        for rate in rates:
            arrivals = poisson_arrivals(
                rate, MEASURED_S, prompt_tokens=MEASURED_PROMPTS, output_tokens=MEASURED_OUTPUTS, seed=2
            )
            before = steps_of(worker["metrics"])
            measured = asyncio.run(_send(stack["addresses"][0], arrivals, vocabulary))
            num_steps, seconds = (now - then for now, then in zip(steps_of(worker["metrics"]), before, strict=True))
            alone = _simulate_here(arrivals, law)
            told = _simulate_here(arrivals, _stretch(law, arrivals, mean_step_s=seconds / num_steps))
            rows += _compare(rate, measured, alone, told, mean_step_s=seconds / num_steps)
    return rows


def _simulate_here(arrivals: Sequence[Arrival], law: StepLaw) -> Simulated:
    shape = WorkerShape(law, kv_tokens=65536, max_sequences=MAX_SEQUENCES, is_on_cpu=True)
    return simulate(arrivals, shape, num_workers=1)


def _stretch(law: StepLaw, arrivals: Sequence[Arrival], *, mean_step_s: float) -> StepLaw:
    """The law times the factor with which the simulation's mean step is this; slower steps make larger batches."""
    factor = 1.0
    for _ in range(8):
        factor *= mean_step_s / _simulate_here(arrivals, lambda work: factor * law(work)).mean_step_s  # noqa: B023
    return lambda work: factor * law(work)


def fit_law(folder: Path) -> StepLaw:
    """How long a step takes on this machine: a constant, and something for each token it computes or reads.

    Measured on the engine alone, over batches of 1 to 32 sequences and their prompts.
    """
    runner = build_executor(folder, RuntimeOptions(device="cpu", dtype="float32", max_sequences=MAX_SEQUENCES))
    config = EngineConfig(eos_token_id=-1, max_positions=load_config(folder).max_positions, max_sequences=MAX_SEQUENCES)
    steps: list[tuple[StepWork, float]] = []
    for size in (1, 2, 4, 8, 16, 32):
        loaded = Engine(runner, config)
        for number, prompt in enumerate(random_prompts(size, 64, 1000)):
            loaded.add(engine.Sequence(str(number), prompt, GenerationParams(96, temperature=0.0, ignore_eos=True)))
        while loaded.has_work():
            started_s = time.perf_counter()
            loaded.step()
            steps.append((work_of(loaded.last_batch), time.perf_counter() - started_s))
    causes = np.array([[1.0, work.num_tokens, work.cached_tokens] for work, _ in steps])
    seconds = np.array([step_s for _, step_s in steps])
    # Long steps count no more than short ones.
    fixed_s, token_s, cached_s = np.linalg.lstsq(causes / seconds[:, None], np.ones_like(seconds), rcond=None)[0]
    return lambda work: float(fixed_s + token_s * work.num_tokens + cached_s * work.cached_tokens)


async def _send(address: str, arrivals: Sequence[Arrival], vocabulary: int) -> list[Measured]:
    """Every request at its time, whatever became of those before."""
    prompts = random_prompts(len(arrivals), max(arrival.prompt_tokens for arrival in arrivals), vocabulary)
    async with AsyncClient(address) as client:
        await client.models()  # The connection is up.
        started_s = time.perf_counter()

        async def send(arrival: Arrival, prompt: list[int]) -> Measured:
            await asyncio.sleep(started_s + arrival.at_s - time.perf_counter())
            sent_s = time.perf_counter()
            first_s = 0.0
            async with client.stream(
                token_ids=prompt, temperature=0.0, max_new_tokens=arrival.output_tokens, ignore_eos=True
            ) as stream:
                async for event in stream.events():
                    if isinstance(event, Delta) and event.token_ids:
                        first_s = first_s or time.perf_counter()
            per_token_s = (time.perf_counter() - first_s) / max(1, arrival.output_tokens - 1)
            return Measured(first_s - sent_s, per_token_s)

        tasks = [
            send(arrival, prompt[: arrival.prompt_tokens]) for arrival, prompt in zip(arrivals, prompts, strict=True)
        ]
        return list(await asyncio.gather(*tasks))


def _compare(
    rate: float, measured: Sequence[Measured], alone: Simulated, told: Simulated, *, mean_step_s: float
) -> list[str]:
    def first_s(chats: Sequence[Measured | Chat]) -> float:
        return statistics.median(chat.time_to_first_token_s for chat in chats)

    def token_s(chats: Sequence[Measured | Chat]) -> float:
        return statistics.mean(chat.time_per_token_s for chat in chats)

    lines = (
        ("step, mean", mean_step_s, alone.mean_step_s, told.mean_step_s),
        ("first token, p50", first_s(measured), first_s(alone.chats), first_s(told.chats)),
        ("per token, mean", token_s(measured), token_s(alone.chats), token_s(told.chats)),
    )
    return [
        f"| {rate:g} | {what} | {real_s * 1e3:.1f} ms | {alone_s * 1e3:.1f} ms | {alone_s / real_s - 1:+.0%}"
        f" | {told_s * 1e3:.1f} ms | {told_s / real_s - 1:+.0%} |"
        for what, real_s, alone_s, told_s in lines
    ]


if __name__ == "__main__":
    main()
