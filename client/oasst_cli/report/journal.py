"""What a report has so far, kept so that a run that was stopped goes on where it was."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from oasst_cli.report.document import PromptResults, ReportError

__all__ = ["Journal"]


class Journal:
    """A file of JSON lines beside the report to be: what is made, then each finished prompt.

    Opened with what is to be made; refuses a journal of something else. Removed once the report is written.
    """

    def __init__(self, path: Path, purpose: Mapping[str, Any]) -> None:
        self._path = path
        self._purpose = purpose
        self.finished: dict[int, PromptResults] = {}

    def __enter__(self) -> Self:
        """What an earlier run finished is in `finished`.

        Raises:
            ReportError: the file is the journal of another report, or is broken in the middle.
            OSError: it cannot be read or written.
        """
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
        # A run that was killed may have left half a line; its prompt is done again.
        whole = [line for line in lines if line.endswith(b"\n")]
        if whole and self._value_of(whole[0]) != json.loads(json.dumps(self._purpose)):
            raise ReportError(f"{self._path} was begun with other prompts or options: repeat those, or remove it")
        for line in whole[1:]:
            entry = self._value_of(line)
            self.finished[entry["index"]] = PromptResults.from_json(entry, f"{self._path}: prompt {entry['index']}")
        self._file = self._path.open("r+b" if lines else "wb")
        self._file.truncate(sum(map(len, whole)))
        self._file.seek(0, os.SEEK_END)
        if not whole:
            self._write(self._purpose)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, index: int, results: PromptResults) -> None:
        """The prompt is finished, and stays so whatever happens to this process."""
        self.finished[index] = results
        self._write({"index": index, **asdict(results)})

    def remove(self) -> None:
        self._path.unlink()

    def _write(self, value: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(value).encode() + b"\n")
        self._file.flush()

    def _value_of(self, line: bytes) -> Any:
        try:
            return json.loads(line)
        except ValueError as error:
            raise ReportError(f"{self._path} is broken: {error}") from error
