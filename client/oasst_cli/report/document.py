"""A sampling report as a document: read strictly, written as the original tool writes it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

__all__ = [
    "END_OF_TEXT",
    "PromptResults",
    "Report",
    "ReportError",
    "SamplingResult",
    "read_prompts",
]

END_OF_TEXT = "<|endoftext|>"


class ReportError(Exception):
    """A file is not what it should be; says which, and where."""


@dataclass(frozen=True, slots=True)
class SamplingResult:
    """What one sampling config made of one prompt."""

    sampling_config: str
    sampling_params: Mapping[str, Any]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PromptResults:
    """One prompt, under every sampling config."""

    prompt: str
    results: tuple[SamplingResult, ...]

    @classmethod
    def from_json(cls, value: Any, where: str) -> Self:
        """The value of one entry of `prompts`; `where` it stands is told in errors."""
        results = _field(value, "results", list, where)
        return cls(
            prompt=_field(value, "prompt", str, where),
            results=tuple(_sampling_result(each, f"{where}.results[{index}]") for index, each in enumerate(results)),
        )


@dataclass(frozen=True, slots=True)
class Report:
    """A whole report."""

    model_name: str
    # UTC, ISO 8601 without a zone, as the original has it.
    date: str
    # How the report was made: options of the tool that made it.
    args: Mapping[str, Any]
    prompts: tuple[PromptResults, ...]

    @classmethod
    def read(cls, path: Path) -> Self:
        """The report in this file.

        Raises:
            ReportError: the file cannot be read, or is no sampling report.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ReportError(f"{path} cannot be read: {error}") from error
        try:
            prompts = _field(value, "prompts", list, "the report")
            return cls(
                model_name=_field(value, "model_name", str, "the report"),
                date=_field(value, "date", str, "the report"),
                args=_field(value, "args", dict, "the report"),
                prompts=tuple(PromptResults.from_json(each, f"prompts[{index}]") for index, each in enumerate(prompts)),
            )
        except ReportError as error:
            raise ReportError(f"{path} is no sampling report: {error}") from error

    def to_json(self) -> str:
        """The document, character for character as the original tool lays it out."""
        return json.dumps(asdict(self), indent=2)

    @property
    def config_names(self) -> tuple[str, ...]:
        """Every sampling config, in the order of the first prompts."""
        return tuple(dict.fromkeys(each.sampling_config for prompt in self.prompts for each in prompt.results))

    def outputs_of(self, config_name: str) -> list[str]:
        """Every output under this config, in the order of the prompts."""
        return [
            output
            for prompt in self.prompts
            for result in prompt.results
            if result.sampling_config == config_name
            for output in result.outputs
        ]


def read_prompts(path: Path) -> list[str]:
    """The prompts of a JSON Lines file: each line a JSON string.

    Raises:
        ReportError: the file cannot be read, a line is no JSON string, or there is none.
    """
    try:
        # Not `splitlines`: a JSON string may hold U+2028 and the like as they are.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path} cannot be read: {error}") from error
    prompts = [_prompt(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise ReportError(f"{path} has no prompts")
    return prompts


def _prompt(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)
    except ValueError as error:
        raise ReportError(f"{where} is not JSON: {error}") from error
    if not isinstance(prompt, str):
        raise ReportError(f"{where} must be a JSON string")
    return prompt


def _sampling_result(value: Any, where: str) -> SamplingResult:
    outputs = _field(value, "outputs", list, where)
    if not all(isinstance(each, str) for each in outputs):
        raise ReportError(f"{where}.outputs must be strings")
    return SamplingResult(
        sampling_config=_field(value, "sampling_config", str, where),
        sampling_params=_field(value, "sampling_params", dict, where),
        outputs=tuple(outputs),
    )


def _field(value: Any, name: str, kind: type, where: str) -> Any:
    """The field of a JSON object, checked."""
    if not isinstance(value, dict) or not isinstance(value.get(name), kind):
        raise ReportError(f"{where} needs {name!r}, a {kind.__name__}")
    return value[name]
