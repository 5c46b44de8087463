"""Sampling configs: what a config file says, and what it means.

The files of oasst-model-eval name arguments of transformers' `generate`, and some do not mean what they seem to. What
`generate` really did with them is told here once, in `chat_options`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oasst_client import ChatOptions

from oasst_cli.report.document import ReportError

__all__ = ["NOPREFIX", "SamplingConfig", "chat_options", "read_configs"]

# GenerationConfig's default, in force whenever sampling is on and top_k is not given.
_DEFAULT_TOP_K = 50
_KNOWN = frozenset(
    {
        *("max_new_tokens", "min_new_tokens", "do_sample", "temperature", "repetition_penalty"),
        *("top_k", "top_p", "typical_p", "penalty_alpha", "num_beams"),
    }
)


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """A named set of `generate`'s arguments."""

    name: str
    params: Mapping[str, Any]

    @property
    def is_greedy(self) -> bool:
        return not self.params.get("do_sample", False)


def _noprefix(name: str, **params: Any) -> SamplingConfig:
    common = {
        "max_new_tokens": 400,
        "min_new_tokens": 4,
        "do_sample": True,
        "temperature": 1.0,
        "repetition_penalty": 1.2,
    }
    return SamplingConfig(name, {**common, **params})


# The configs of oasst-model-eval's `config/noprefix.json`.
NOPREFIX = (
    _noprefix("nucleus9", temperature=0.8, top_p=0.9),
    _noprefix("k50", top_k=50, top_p=0.95),
    _noprefix("typical2", typical_p=0.2),
    _noprefix("typical3", temperature=0.8, typical_p=0.3),
    _noprefix("contrastive", top_k=5, penalty_alpha=0.6),
    _noprefix("greedy", do_sample=False, num_beams=1),
)


def chat_options(config: SamplingConfig) -> ChatOptions:
    """The options that make the service do what `generate` did with the config.

    - Sampling without `top_k` kept the 50 most likely tokens: `generate`'s default, though no file says so.
    - `penalty_alpha` with sampling on was ignored: contrastive search needs it off.
    - Without sampling, temperature and the filters were ignored.

    >>> chat_options(NOPREFIX[0])["top_k"]
    50

    Raises:
        ReportError: the config asks for what the service does not do: beams, or contrastive search.
    """
    params = config.params
    if unknown := params.keys() - _KNOWN:
        raise ReportError(f"config {config.name}: {', '.join(sorted(unknown))} is not known here")
    if params.get("num_beams", 1) != 1:
        raise ReportError(f"config {config.name}: num_beams must be 1, the service searches no beams")
    options: ChatOptions = {
        "max_new_tokens": params["max_new_tokens"],
        "min_new_tokens": params.get("min_new_tokens", 0),
        "repetition_penalty": params.get("repetition_penalty", 1.0),
    }
    if config.is_greedy:
        if params.get("penalty_alpha"):
            raise ReportError(f"config {config.name}: penalty_alpha without sampling is contrastive search, not served")
        options["temperature"] = 0.0
        return options
    options["temperature"] = params.get("temperature", 1.0)
    options["top_k"] = params.get("top_k", _DEFAULT_TOP_K)
    if "top_p" in params:
        options["top_p"] = params["top_p"]
    if "typical_p" in params:
        options["typical_p"] = params["typical_p"]
    return options


def read_configs(path: Path) -> tuple[SamplingConfig, ...]:
    """The configs of a file in the form of oasst-model-eval's `config/*.json`.

    Raises:
        ReportError: the file cannot be read or has another form, or asks for what cannot be done.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        default = content.get("default", {})
        configs = tuple(
            SamplingConfig(each["name"], {**default.get("generate_args", {}), **each["generate_args"]})
            for each in content["configurations"]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{path} is no file of sampling configs: {error!r}") from error
    for entry in (default, *content["configurations"]):
        if entry.get("add_prefix_tokens") or entry.get("pre_text"):
            raise ReportError(f"{path}: prefixes are not supported; the model was not trained on them")
    for config in configs:
        if not isinstance(config.params.get("max_new_tokens"), int):
            raise ReportError(f"{path}: config {config.name} needs max_new_tokens")
        chat_options(config)
    return configs
