"""The history of a run: `loss_curve.json`, and a picture of it, `loss_curve.png`."""

import json
import math
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from oasst_training.evaluation import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["EvaluationPoint", "LossCurve", "StepPoint", "can_draw"]

_JSON_NAME = "loss_curve.json"
_PNG_NAME = "loss_curve.png"
# The drawn mean forgets a step's loss after about so large a share of the run.
_SMOOTHING_SHARE = 0.02
_EVALUATION_COLORS = ("tab:orange", "tab:green", "tab:red", "tab:purple")


@dataclass(frozen=True, slots=True)
class StepPoint:
    """One step of the optimizer; the first is 1. The loss is the one before the step."""

    step: int
    epoch: float
    learning_rate: float
    loss: float


@dataclass(frozen=True, slots=True)
class EvaluationPoint:
    """A data set's evaluation after this step."""

    step: int
    dataset: str
    evaluation: Evaluation


@dataclass(slots=True)
class LossCurve:
    """What was measured so far, in the order of steps."""

    steps: list[StepPoint] = field(default_factory=list)
    evaluations: list[EvaluationPoint] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path, *, until_step: int) -> Self:
        """The curve that was written to this folder, without what came after this step."""
        history = json.loads((folder / _JSON_NAME).read_text(encoding="utf-8"))
        steps = (StepPoint(**point) for point in history["steps"])
        evaluations = (
            EvaluationPoint(point.pop("step"), point.pop("dataset"), Evaluation(**point))
            for point in history["evaluations"]
        )
        return cls(
            [point for point in steps if point.step <= until_step],
            [point for point in evaluations if point.step <= until_step],
        )

    def write(self, folder: Path) -> None:
        """`loss_curve.json` in this folder tells the curve; a reader never sees half of it."""
        evaluations = [
            {"step": point.step, "dataset": point.dataset, **asdict(point.evaluation)} for point in self.evaluations
        ]
        history: dict[str, Any] = {"steps": [asdict(point) for point in self.steps], "evaluations": evaluations}
        partial = folder / f"{_JSON_NAME}.partial"
        partial.write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")
        partial.replace(folder / _JSON_NAME)

    def draw(self, folder: Path) -> None:
        """`loss_curve.png` in this folder shows the curve. Needs matplotlib."""
        self.figure().savefig(folder / _PNG_NAME, dpi=120)

    def figure(self) -> "Figure":
        """Losses above, the learning rate below. Needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 6), layout="constrained")
        loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        self._draw_losses(loss)
        rate.plot([point.step for point in self.steps], [point.learning_rate for point in self.steps], color="tab:gray")
        rate.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        for axes in (loss, rate):
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        return figure

    def _draw_losses(self, axes: "Axes") -> None:
        steps, losses = [point.step for point in self.steps], [point.loss for point in self.steps]
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="training, each step")
        axes.plot(steps, _smooth(losses), color="tab:blue", linewidth=1.8, label="training, running mean")
        for color, name in zip(_EVALUATION_COLORS * len(self.evaluations), self._evaluated(), strict=False):
            points = [point for point in self.evaluations if point.dataset == name]
            axes.plot(
                [point.step for point in points],
                [point.evaluation.loss for point in points],
                color=color,
                marker="o",
                markersize=4,
                label=f"evaluation, {name}",
            )
        axes.set(ylabel="loss (nats per token)", ylim=(0, None))
        axes.legend(frameon=False)

    def _evaluated(self) -> list[str]:
        return list(dict.fromkeys(point.dataset for point in self.evaluations))


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def _smooth(values: list[float]) -> list[float]:
    """The running mean, in which older values weigh exponentially less. Values that are no numbers are passed over."""
    weight = 1 / max(1.0, _SMOOTHING_SHARE * len(values))
    total, weights, means = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total += weight * (value - total)
            weights += weight * (1 - weights)
        means.append(total / weights if weights else math.nan)
    return means
