"""The history of a run, as data and as a picture."""

import json

import pytest
from oasst_training.evaluation import Evaluation
from oasst_training.loss_curve import EvaluationPoint, LossCurve, StepPoint


@pytest.fixture
def curve() -> LossCurve:
    steps = [StepPoint(step, step / 10, 1e-3, 5 / step) for step in range(1, 101)]
    evaluations = [
        EvaluationPoint(step, name, Evaluation(4 / step, 0.5, 0.4, 100))
        for step in (50, 100)
        for name in ("oasst_export", "alpaca")
    ]
    return LossCurve(steps, evaluations)


def test_a_curve_is_read_as_it_was_written_up_to_a_step(curve, tmp_path):
    curve.write(tmp_path)
    assert LossCurve.read(tmp_path, until_step=100) == curve
    read = LossCurve.read(tmp_path, until_step=60)
    assert read.steps == curve.steps[:60]
    assert read.evaluations == curve.evaluations[:2]


def test_the_json_has_one_object_for_each_point(curve, tmp_path):
    curve.write(tmp_path)
    history = json.loads((tmp_path / "loss_curve.json").read_text())
    assert history["steps"][1] == {"step": 2, "epoch": 0.2, "learning_rate": 1e-3, "loss": 2.5}
    assert history["evaluations"][0] == {
        **{"step": 50, "dataset": "oasst_export", "num_tokens": 100},
        **{"loss": 0.08, "accuracy": 0.5, "accuracy_without_ends": 0.4},
    }
    assert [path.name for path in tmp_path.iterdir()] == ["loss_curve.json"]


def test_the_picture_shows_training_and_every_evaluated_set(curve):
    loss, rate = curve.figure().axes
    shown = {line.get_label(): list(line.get_ydata()) for line in loss.lines}
    assert shown["training, each step"] == [point.loss for point in curve.steps]
    assert shown["evaluation, alpaca"] == shown["evaluation, oasst_export"] == [0.08, 0.04]
    mean = shown["training, running mean"]
    assert mean[0] == 5
    assert mean == sorted(mean, reverse=True)
    assert mean[-1] > curve.steps[-1].loss  # It lags behind.
    assert list(rate.lines[0].get_ydata()) == [1e-3] * 100


@pytest.mark.parametrize("num_steps", [0, 1])
def test_even_a_run_of_a_step_has_a_picture(curve, tmp_path, num_steps):
    LossCurve(curve.steps[:num_steps]).draw(tmp_path)
    assert (tmp_path / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
