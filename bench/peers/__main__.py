"""`make bench-peers`: this engine beside other systems on this CPU; prints Markdown, writes JSON and pictures."""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

from bench.checkpoints import SHAPES, VOCAB_SIZE, random_prompts
from bench.peers.answering import Setup
from bench.peers.asking import PeerError, PeerProcess
from bench.peers.checkpoint import peers_checkpoint
from bench.peers.environments import prepare
from bench.peers.measure import Cell, Figure, Missing, Tokens, measure_cell
from bench.peers.plot import plot
from bench.peers.report import absolute_table, missing_list, ratio_table
from bench.peers.systems import DTYPES, OURS, REFERENCE, SYSTEMS

ROOT = Path(__file__).parent.parent.parent
HOME = ROOT / "build" / "peers"
LOAD_TIMEOUT_S = 600.0  # The first time the checkpoint is converted.
ANSWER_TIMEOUT_S = 300.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the command line asks for."""

    shapes: list[str]
    dtypes: list[str]
    systems: list[str]
    concurrent: list[int]
    rounds: int
    prompt_tokens: int
    new_tokens: int
    threads: int


def parse(arguments: list[str]) -> Plan:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["160m", "70m"], help="160m and 70m by default")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of weights; all by default")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="all by default")
    about = "sequences at once, each number in turn; 1 8 32 by default"
    parser.add_argument("--concurrent", nargs="+", type=int, metavar="N", default=[1, 8, 32], help=about)
    for option, default, about in (
        ("--rounds", 3, "rounds of each measurement"),
        ("--prompt-tokens", 128, "tokens in a prompt"),
        ("--new-tokens", 128, "tokens to generate for each prompt"),
        ("--threads", 2, "threads of each system"),
    ):
        parser.add_argument(option, type=int, metavar="N", default=default, help=f"{about}; {default} by default")
    return Plan(**vars(parser.parse_args(arguments)))


def main() -> None:
    plan = parse(sys.argv[1:])
    interpreters, missing = _interpreters(plan)
    if REFERENCE not in interpreters:
        sys.exit(f"{SYSTEMS[REFERENCE].name} says which tokens are right and cannot be installed: {missing}")
    names = {key: SYSTEMS[key].name for key in plan.systems}
    figures: list[Figure] = []
    for shape in plan.shapes:
        bench = _Bench(plan, shape, interpreters)
        reference = bench.reference_tokens()
        for dtype in plan.dtypes:
            more_figures, more_missing = bench.measure(dtype, reference)
            figures += more_figures
            missing += more_missing
            _write(plan, figures, missing, names)  # What is measured is kept if the rest is interrupted.
    print(_report(plan, figures, missing, names))


class _Bench:
    """The systems at one shape."""

    def __init__(self, plan: Plan, shape: str, interpreters: dict[str, Path]) -> None:
        self._plan = plan
        self._shape = shape
        self._interpreters = interpreters
        self._checkpoint = peers_checkpoint(shape, HOME / "checkpoints")
        self._prompts = random_prompts(max(plan.concurrent), plan.prompt_tokens, VOCAB_SIZE)

    def reference_tokens(self) -> Tokens:
        with self._start(REFERENCE, "fp32") as reference:
            return reference.ask(self._prompts, self._plan.new_tokens).tokens

    def measure(self, dtype: str, reference: Tokens) -> tuple[list[Figure], list[Missing]]:
        """All systems are loaded at once and wait while they are not asked."""
        figures: list[Figure] = []
        missing: list[Missing] = []
        with contextlib.ExitStack() as stack:
            running: dict[str, PeerProcess] = {}
            for system in self._plan.systems:
                if system not in self._interpreters:
                    continue
                if dtype in SYSTEMS[system].cannot:
                    missing.append(Missing(system, dtype, SYSTEMS[system].cannot[dtype]))
                    continue
                try:
                    running[system] = stack.enter_context(self._start(system, dtype))
                except PeerError as error:
                    missing.append(Missing(system, f"{self._shape} {dtype}", str(error)))
            for concurrent in self._plan.concurrent:
                print(f"Measuring {self._shape} {dtype} at {concurrent}: {', '.join(running)}", file=sys.stderr)
                cell = Cell(self._shape, dtype, concurrent)
                cell_figures, failed = measure_cell(
                    cell, running, self._prompts[:concurrent], reference[:concurrent], rounds=self._plan.rounds
                )
                figures += cell_figures
                missing += failed
                for one in failed:
                    del running[one.system]
        return figures, missing

    def _start(self, system: str, dtype: str) -> PeerProcess:
        plan = self._plan
        setup = Setup(
            checkpoint=str(self._checkpoint),
            converted=str(HOME / "converted" / system / f"{self._shape}-{dtype}"),
            dtype=dtype,
            threads=plan.threads,
            max_sequences=max(plan.concurrent),
            max_tokens=plan.prompt_tokens + plan.new_tokens,
        )
        return PeerProcess(
            [str(self._interpreters[system]), "-m", f"bench.peers.programs.{SYSTEMS[system].program}", setup.to_json()],
            HOME / "log" / f"{system}-{self._shape}-{dtype}.txt",
            environment={**os.environ, **_thread_variables(plan.threads), "HF_HUB_OFFLINE": "1"},
            cwd=ROOT,
            load_timeout_s=LOAD_TIMEOUT_S,
            answer_timeout_s=ANSWER_TIMEOUT_S,
        )


def _interpreters(plan: Plan) -> tuple[dict[str, Path], list[Missing]]:
    """Each system's Python; the reference's even if it is not measured."""
    found: dict[str, Path] = {}
    missing = []
    for system in dict.fromkeys([REFERENCE, *plan.systems]):
        try:
            found[system] = prepare(SYSTEMS[system].environment, HOME)
        except PeerError as error:
            missing.append(Missing(system, "everywhere", str(error)))
    return found, missing


def _thread_variables(threads: int) -> dict[str, str]:
    return {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


def _report(plan: Plan, figures: list[Figure], missing: list[Missing], names: dict[str, str]) -> str:
    lengths = f"{plan.prompt_tokens} tokens in, {plan.new_tokens} out, greedy, {plan.threads} threads each"
    return "\n\n".join(
        [
            f"{_machine()}. {lengths}; medians of {plan.rounds} rounds in which the systems took turns.",
            "Generated tokens per second, prefill included, by number of concurrent sequences. Agreement is the least"
            f" share of tokens before a sequence's first difference from the fp32 tokens of {SYSTEMS[REFERENCE].name};"
            " an fp32 figure with less than all of them is in brackets and is no peer.",
            absolute_table(figures, names),
            f"{SYSTEMS[OURS].name} / best peer, which is named: the median of the rounds' ratios, and in brackets the"
            " least and the largest.",
            ratio_table(figures, names, OURS),
            missing_list(missing, names),
        ]
    )


def _write(plan: Plan, figures: list[Figure], missing: list[Missing], names: dict[str, str]) -> None:
    kept = {
        "machine": _machine(),
        "plan": dataclasses.asdict(plan),
        "figures": [dataclasses.asdict(figure) for figure in figures],
        "missing": [dataclasses.asdict(one) for one in missing],
    }
    (HOME / "peers.json").write_text(json.dumps(kept, indent=2) + "\n")
    for shape in plan.shapes:
        if any(figure.cell.shape == shape and figure.counts for figure in figures):
            plot(figures, names, OURS, shape, HOME / f"peers-{shape}.png")


def _machine() -> str:
    processor = next(
        (line.split(":")[1].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")),
        platform.processor(),
    )
    return f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} x {processor}, Python {platform.python_version()}"


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


if __name__ == "__main__":
    main()
