"""The benchmark beside other systems: the protocol with a process, the comparison, the tables."""

import contextlib
import os
import statistics
import sys
from pathlib import Path

import pytest

from bench.peers import environments
from bench.peers.__main__ import parse
from bench.peers.answering import Setup, converted
from bench.peers.asking import PeerError, PeerProcess, last_line
from bench.peers.environments import Environment, prepare
from bench.peers.measure import Cell, Figure, Missing, agreement, measure_cell
from bench.peers.report import absolute_table, best_peer, missing_list, ratio_table

ROOT = Path(__file__).parent.parent.parent
CELL = Cell("160m", "fp32", 8)
NAMES = {"ours": "oasst-serve", "first": "First", "second": "Second"}


@pytest.fixture
def start(tmp_path):
    started = []

    def start(dtype: str = "fp32", answer_timeout_s: float = 60.0) -> PeerProcess:
        setup = Setup("unused", "unused", dtype, threads=1, max_sequences=2, max_tokens=8)
        process = PeerProcess(
            [sys.executable, str(Path(__file__).parent / "fake_peer.py"), setup.to_json()],
            tmp_path / f"{dtype}.txt",
            environment={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            load_timeout_s=60.0,
            answer_timeout_s=answer_timeout_s,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.stop()


def figure(system: str, *rounds: float, cell: Cell = CELL, agreement: float = 1.0) -> Figure:
    return Figure(cell, system, statistics.median(rounds), list(rounds), 1.0, agreement)


def test_a_system_answers_each_question_whatever_its_libraries_print(start):
    process = start()
    assert process.ask([[1], [10]], 3).tokens == [[2, 3, 4], [11, 12, 13]]
    assert process.ask([[5]], 1).tokens == [[6]]


def test_a_system_that_cannot_load_says_why_in_one_line(start):
    with pytest.raises(PeerError, match=r"^has no such numbers$"):
        start("cannot load")


def test_the_last_words_of_a_system_that_dies_are_told(start):
    with pytest.raises(PeerError, match="ended with 3: it ran out of luck"):
        start("dies")


def test_a_system_that_gives_no_answer_in_time_is_stopped(start):
    process = start("hangs", answer_timeout_s=0.1)
    with pytest.raises(PeerError, match=r"^no answer within 0.1 s$"):
        process.ask([[1]], 1)


def test_fewer_tokens_than_asked_for_are_an_error_and_not_a_fast_answer(start):
    with pytest.raises(PeerError, match=r"asked for 1 x 3 tokens, it gave \[2\]"):
        start("stops early").ask([[1]], 3)


def test_a_system_that_fails_is_named_and_the_others_are_measured(start):
    systems = {"first": start(), "second": start("stops early")}
    figures, missing = measure_cell(CELL, systems, [[1], [2]], [[2, 3], [3, 4]], rounds=2)
    assert [(one.system, one.agreement, len(one.rounds)) for one in figures] == [("first", 1.0, 2)]
    assert [(one.system, one.where) for one in missing] == [("second", "160m fp32, from 8 concurrent on")]


def test_agreement_ends_at_a_sequences_first_difference():
    assert agreement([[1, 2, 9, 4], [5, 6, 7, 8]], [[1, 2, 3, 4], [5, 6, 7, 8]]) == 6 / 8


def test_a_peer_with_other_fp32_tokens_is_not_the_best():
    figures = [figure("ours", 100), figure("first", 90), figure("second", 300, agreement=0.99)]
    assert best_peer(figures, CELL, "ours") == figures[1]


def test_a_peer_with_other_tokens_in_fewer_bits_counts():
    cell = Cell("160m", "int8", 8)
    figures = [figure("first", 90, cell=cell), figure("second", 300, cell=cell, agreement=0.5)]
    assert best_peer(figures, cell, "ours") == figures[1]


def test_the_table_of_ratios_names_the_best_peer_of_each_cell():
    cells = [Cell("160m", "fp32", concurrent) for concurrent in (1, 8)]
    figures = [
        figure("ours", 110, cell=cells[0]),
        figure("first", 100, cell=cells[0]),
        figure("second", 50, cell=cells[0]),
        figure("second", 200, cell=cells[1]),
    ]
    row = ratio_table(figures, NAMES, "ours").splitlines()[-1]
    assert row == "| 160m | fp32 | 1.10 (1.10-1.10), First | missing, Second |"


def test_a_ratio_is_of_what_was_measured_in_the_same_round():
    figures = [figure("ours", 100, 220, 330), figure("first", 100, 110, 300)]
    assert "| 1.10 (1.00-2.00), First |" in ratio_table(figures, NAMES, "ours")


def test_the_table_of_figures_brackets_what_does_not_count():
    figures = [figure("ours", 110), figure("first", 90, agreement=0.875)]
    assert absolute_table(figures, NAMES).splitlines()[-2:] == [
        "| 160m | fp32 | oasst-serve | 110 | 100% |",
        "| 160m | fp32 | First | (90) | 87.5% |",
    ]


def test_who_is_missing_is_listed_with_the_reason():
    assert "- First, int8: it has none" in missing_list([Missing("first", "int8", "it has none")], NAMES)


def test_everything_is_measured_unless_a_part_is_asked_for():
    assert parse([]).dtypes == ["fp32", "bf16", "int8"]
    assert parse(["--dtypes", "int8", "--concurrent", "4"]).concurrent == [4]


def test_an_environment_that_cannot_be_installed_tells_pips_last_line(tmp_path, monkeypatch):
    (tmp_path / "broken.txt").write_text("./no-such-folder\n")
    monkeypatch.setattr(environments, "REQUIREMENTS", tmp_path)
    with pytest.raises(PeerError, match=r"not installed: .*no-such-folder"):
        prepare(Environment("broken"), tmp_path / "home")


def test_a_conversion_that_fails_leaves_nothing_under_its_name(tmp_path):
    with contextlib.suppress(ZeroDivisionError), converted(tmp_path / "model") as unfinished:
        unfinished.mkdir()
        raise ZeroDivisionError
    assert not (tmp_path / "model").exists()


def test_the_last_line_that_is_not_empty_counts():
    assert last_line("Traceback\nValueError: no\n\n  \n") == "ValueError: no"
