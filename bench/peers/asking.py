"""The asking end: starts a system as a process and asks it, with a limit on how long an answer may take."""

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["Answer", "PeerError", "PeerProcess", "last_line"]


class PeerError(Exception):
    """A system could not be installed, started or asked; one line that says why."""


@dataclass(frozen=True)
class Answer:
    tokens: list[list[int]]
    seconds: float
    cpu_seconds: float


class PeerProcess:
    """A running system. Its output goes to `log`.

    Raises:
        PeerError: it ended, said that it cannot, or gave no answer in time. It is stopped then.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        environment: dict[str, str],
        cwd: Path,
        load_timeout_s: float,
        answer_timeout_s: float,
    ) -> None:
        self._log = log
        self._answer_timeout_s = answer_timeout_s
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as log_file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_file,
                text=True,
                env=environment,
                cwd=cwd,
                start_new_session=True,  # So that its children end with it.
            )
        self._read(load_timeout_s)

    def ask(self, prompts: list[list[int]], new_tokens: int) -> Answer:
        """Raises PeerError also when a sequence has another length than asked for: that work would not be equal."""
        question = json.dumps({"prompts": prompts, "new_tokens": new_tokens})
        with contextlib.suppress(BrokenPipeError):  # It ended; reading tells why.
            print(question, file=self._process.stdin, flush=True)
        answer = Answer(**self._read(self._answer_timeout_s))
        lengths = [len(tokens) for tokens in answer.tokens]
        if lengths != [new_tokens] * len(prompts):
            self.stop()
            raise PeerError(f"asked for {len(prompts)} x {new_tokens} tokens, it gave {lengths}")
        return answer

    def stop(self) -> None:
        """The process and its children are gone."""
        self._kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _read(self, timeout_s: float) -> dict[str, Any]:
        too_late = threading.Event()

        def end_waiting() -> None:
            too_late.set()
            self._kill()

        limit = threading.Timer(timeout_s, end_waiting)
        limit.start()
        line = self._process.stdout.readline() if self._process.stdout else ""
        limit.cancel()
        message: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if too_late.is_set():
            message = {"error": f"no answer within {timeout_s:g} s"}
        if "error" in message:
            self.stop()
            raise PeerError(last_line(message["error"]))
        return message

    def _last_words(self) -> str:
        return f"ended with {self._process.wait()}: {last_line(self._log.read_text(errors='replace'))}"


def last_line(text: str) -> str:
    """Of what a program wrote, the line that says what is wrong; empty lines do not count."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "nothing was written"
