"""The lm-evaluation-harness on a whole service: its scores are those of its own model on the same checkpoint."""

import functools
import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from leaderboard_data import write_leaderboard_data
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from oasst_cli.__main__ import app
from oasst_cli.eval.model import OasstLM
from oasst_cli.up.checkpoint import demo_checkpoint
from typer.testing import CliRunner

# Without MMLU, whose 57 subjects take long to load.
TASKS = ("ARC", "HellaSwag", "TruthfulQA", "Winogrande", "GSM8K")
PROMPT = "<|prompter|>What is a meme?<|endoftext|><|assistant|>A meme is an idea"
TEXTS = [
    "A meme is an idea, a joke or a habit that spreads from person to person by being copied and changed.",
    "Owls hoot at night – to call their mates, and to tell other owls: this wood is taken!",
    PROMPT,
    "def double(x):\n    return 2 * x\n\n\nprint(double(21))  # 42",
]


@pytest.fixture
def ours(up) -> OasstLM:
    return OasstLM(up.address)


@pytest.fixture(scope="module")
def theirs() -> HFLM:
    # Without its cache of logits, which mixes up two requests that split the same text at different places.
    return HFLM(str(demo_checkpoint()), device="cpu", dtype="float32", batch_size=8, logits_cache=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_leaderboard_data(folder)
    return folder


def requests_of(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


@pytest.fixture
def here(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The harness works in the folder of the small data sets, off the net, and reads only the tasks it needs."""
    monkeypatch.chdir(data)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    # It describes the whole machine, in seconds.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: results.update(lm_eval_version="any"))
    return data


def run_eval(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)], env={"COLUMNS": "160"})


# ------------------------------------------------------------------------------------------------- equal to its own


def test_log_likelihoods_and_greedy_flags_are_those_of_the_harness_own_model(ours, theirs):
    cuts = [(text, cut) for text in TEXTS if text != PROMPT for cut in range(1, len(text) - 1, 7)]
    pairs = [(text[:cut], text[cut : cut + 15]) for text, cut in cuts]
    # No context, one that ends in spaces, choices of one token, a prompt whose beginning does not fit.
    pairs += [("", "What is a meme?"), ("", "<|endoftext|>A meme"), ("A meme is  ", "an idea"), (PROMPT, ", a joke")]
    pairs += [("Answer:", f" {letter}") for letter in "ABCD"]
    pairs += [(" ".join(TEXTS) * 12, " and so on")]
    requests = requests_of("loglikelihood", pairs)
    scores, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests)
    assert [is_greedy for _, is_greedy in scores] == [is_greedy for _, is_greedy in expected]
    assert any(is_greedy for _, is_greedy in scores)
    assert [logprob for logprob, _ in scores] == pytest.approx([each for each, _ in expected], abs=1e-4)


def test_whole_texts_are_rolled_over_as_the_harness_own_model_does(ours, theirs):
    texts = ["", "A", TEXTS[0], " ".join(TEXTS) * 20]
    requests = requests_of("loglikelihood_rolling", [(text,) for text in texts])
    scores, expected = ours.loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests)
    # The last one is a sum of thousands, which the harness adds up in single precision.
    assert scores == pytest.approx(expected, abs=1e-4, rel=1e-7)
    assert scores[3] < -5000


def test_answers_are_those_of_the_harness_own_model(ours, theirs):
    wanted = {"until": ["\n", " of"], "max_gen_toks": 24, "do_sample": False}
    contexts = [text[:40] for text in TEXTS if text != PROMPT] + [PROMPT.removesuffix("A meme is an idea")]
    requests = requests_of("generate_until", [(context, dict(wanted)) for context in contexts])
    answers = ours.generate_until(requests)
    assert answers == theirs.generate_until(requests)
    assert answers[-1].startswith("A meme is an idea")


# ------------------------------------------------------------------------------------------------------ from outside


def test_the_harness_own_command_line_finds_the_model_by_its_name(up, here, tmp_path, monkeypatch):
    task = {
        "task": "meme",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "meme.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": 0,
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}],
    }
    document = {"question": PROMPT, "choices": [", a joke or a habit", ", a whale or a goat"]}
    (tmp_path / "meme.jsonl").write_text(json.dumps(document) + "\n")
    (tmp_path / "meme.yaml").write_text(json.dumps(task))
    arguments = [
        "--model",
        "oasst-grpc",
        "--model_args",
        f"address={up.address}",
        "--tasks",
        str(tmp_path / "meme.yaml"),
    ]
    monkeypatch.setattr(sys, "argv", ["lm-eval", "run", *arguments, "--output_path", str(tmp_path / "out")])
    runpy.run_module("oasst_cli.eval", run_name="__main__")
    (told,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(told.read_text())["results"]["meme"]["acc,none"] == 1.0


def test_a_suite_is_run_and_told_beside_the_card(up, here, tmp_path):
    only = [part for name in TASKS for part in ("--only", name)]
    told = tmp_path / "told.json"
    result = run_eval(*only, "--limit", 2, "--out", told, "--address", up.address)
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.strip()}
    assert [rows[name][1] for name in TASKS] == ["25", "10", "0", "5", "5"]
    assert rows["ARC"][2] == "2"
    assert rows["GSM8K"][6] == "3.03"
    assert "only the first 2 documents" in result.stdout
    assert "the stop texts are those of 2023" in result.stdout
    configs = json.loads(told.read_text())["configs"]
    assert configs["gsm8k"]["generation_kwargs"]["until"] == [":", "Question:", "Question"]


def test_data_that_cannot_be_had_is_told_by_its_task(up, here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run_eval("--only", "arc", "--address", up.address)
    assert result.exit_code == 1
    assert "the data of ARC cannot be loaded" in result.stderr
