"""Suites: which tasks of the harness, with how many shots, and what was published for the model.

Knows no harness: what it says is plain values.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["SUITES", "Suite", "SuiteScore", "SuiteTask", "score_task"]


@dataclass(frozen=True)
class SuiteTask:
    """One line of a suite's table."""

    name: str
    # The harness's task or group, and the folder among its tasks where it is defined.
    harness_name: str
    folder: str
    num_fewshot: int
    # As the harness names it: metric, then filter.
    metric: str
    # What was published, in percent.
    published: float
    # How what runs today differs from what was published.
    difference: str
    generation_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    name: str
    published_by: str
    tasks: tuple[SuiteTask, ...]
    # Differences that concern every task.
    differences: tuple[str, ...]


@dataclass(frozen=True)
class SuiteScore:
    """What a task came out at, in percent."""

    task: SuiteTask
    value: float
    standard_error: float
    num_documents: int


_OTHER_SHOTS = "other examples: both draw them from the training split, by other rules"

_LEADERBOARD = Suite(
    name="open-llm-leaderboard-v1",
    published_by="card",
    tasks=(
        SuiteTask("ARC", "arc_challenge", "arc", 25, "acc_norm,none", 45.73, _OTHER_SHOTS),
        SuiteTask("HellaSwag", "hellaswag", "hellaswag", 10, "acc_norm,none", 68.59, _OTHER_SHOTS),
        SuiteTask(
            "MMLU",
            "mmlu",
            "mmlu/default",
            5,
            "acc,none",
            26.82,
            "none: the same five examples, and the plain mean of the 57 subjects, where today's harness weighs by size",
        ),
        SuiteTask(
            "TruthfulQA",
            "truthfulqa_mc2",
            "truthfulqa",
            0,
            "acc,none",
            37.81,
            "none: the same six questions and answers stand before each question",
        ),
        SuiteTask("Winogrande", "winogrande", "winogrande", 5, "acc,none", 65.90, _OTHER_SHOTS),
        SuiteTask(
            "GSM8K",
            "gsm8k",
            "gsm8k",
            5,
            "exact_match,strict-match",
            3.03,
            f"{_OTHER_SHOTS}; the stop texts are those of 2023, which end many an answer at its first colon,"
            " where today's harness has others",
            {"until": [":", "Question:", "Question"], "do_sample": False, "max_gen_toks": 256},
        ),
    ),
    differences=(
        "the leaderboard ran lm-evaluation-harness 0.3.0 (b281b09) and summed log-probabilities in fp16; here they are"
        " summed in fp32",
    ),
)

SUITES = {suite.name: suite for suite in (_LEADERBOARD,)}


def score_task(task: SuiteTask, results: Sequence[Mapping[str, Any]]) -> SuiteScore:
    """The plain mean over the harness's results: one, or one of each subject.

    >>> task = SUITES["open-llm-leaderboard-v1"].tasks[2]
    >>> subjects = [
    ...     {"acc,none": 0.2, "acc_stderr,none": 0.03, "sample_len": 900},
    ...     {"acc,none": 0.4, "acc_stderr,none": 0.04, "sample_len": 100},
    ... ]
    >>> score = score_task(task, subjects)
    >>> round(score.value, 6), round(score.standard_error, 6), score.num_documents
    (30.0, 2.5, 1000)
    """
    metric, _, filtered = task.metric.partition(",")
    values = [float(result[task.metric]) for result in results]
    # "N/A" where there is too little to tell.
    errors = [result.get(f"{metric}_stderr,{filtered}") for result in results]
    known = [float(error) if isinstance(error, int | float) else math.nan for error in errors]
    return SuiteScore(
        task,
        100 * sum(values) / len(values),
        100 * math.hypot(*known) / len(known),
        sum(int(result["sample_len"]) for result in results),
    )
