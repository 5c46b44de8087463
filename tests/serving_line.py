"""The line that every process of ours writes to its stdout once it serves."""

import json
import select
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["read_serving_line"]

# A process serves after two seconds on an undisturbed machine.
_START_TIMEOUT_S = 90.0


def read_serving_line(process: subprocess.Popen[Any], log: Path) -> dict[str, Any]:
    """What the process tells of itself; its stderr goes to `log`.

    Raises:
        AssertionError: if it does not serve in time.
    """
    readable, _, _ = select.select([process.stdout], [], [], _START_TIMEOUT_S)
    line = process.stdout.readline() if readable else ""
    if not line:
        raise AssertionError(f"it does not serve within {_START_TIMEOUT_S:g} s: {log.read_text()}")
    return json.loads(line)
