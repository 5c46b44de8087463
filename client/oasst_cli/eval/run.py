"""A suite, run by the lm-evaluation-harness."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from oasst_cli.eval.errors import HarnessError
from oasst_cli.eval.suite import SuiteScore, SuiteTask, score_task

__all__ = ["check_harness", "run_tasks"]


def check_harness() -> None:
    """The harness is installed.

    Raises:
        HarnessError: it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise HarnessError("this needs the lm-evaluation-harness: pip install '.[eval]' in a clone of oasst-serve")


def run_tasks(
    tasks: Iterable[SuiteTask], model: Any, *, limit: int | None, cache: Path | None
) -> tuple[list[SuiteScore], dict[str, Any]]:
    """The score of each task, and all that the harness tells of the run.

    Args:
        model: the harness's kind of model (`lm_eval.api.model.LM`).
        limit: only the first documents of each task.
        cache: remembers answers, so that a run that was stopped goes on.

    Raises:
        HarnessError: a data set cannot be loaded.
        TaskError: a task asks for what the model cannot do.
    """
    # Heavy, and not in the extra `cli`.
    import lm_eval.tasks
    from datasets.exceptions import DatasetsError
    from lm_eval import simple_evaluate

    tasks = list(tasks)
    root = Path(lm_eval.tasks.__file__).parent
    # Only the folders that are needed: reading all of them takes half a minute.
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[root / task.folder for task in tasks])
    loaded: dict[str, dict[str, Any]] = {}
    for task in tasks:
        try:
            loaded[task.name] = manager.load([task.harness_name])["tasks"]
        except (DatasetsError, OSError, ValueError) as error:
            raise HarnessError(
                f"the data of {task.name} cannot be loaded: {error}; off the net, HF_HOME must name a folder with it"
            ) from error
        for each in loaded[task.name].values():
            each.set_config("num_fewshot", task.num_fewshot)
            if task.generation_kwargs:
                each.set_config("generation_kwargs", dict(task.generation_kwargs))
    told = simple_evaluate(
        model,
        tasks=[each for parts in loaded.values() for each in parts.values()],
        task_manager=manager,
        limit=limit,
        use_cache=str(cache) if cache else None,
        log_samples=False,
    )
    results = told["results"]
    return [score_task(task, [results[name] for name in loaded[task.name]]) for task in tasks], told
