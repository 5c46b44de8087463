"""A service that answers at once, in a process of its own: what the load generator measures of it is its own cost."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from oasst.v1 import chat_pb2
from oasst_client import Profile
from oasst_client.testing import FakeServer

__all__ = ["instant_service"]


@contextmanager
def instant_service() -> Iterator[Profile]:
    """The service runs inside the context; how it is reached."""
    command = [sys.executable, "-m", __name__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        # On leaving, its standard input ends, and with it the process.
        if process.stdout is None or not (address := process.stdout.readline().strip()):
            raise RuntimeError("the instant service did not start")
        yield Profile(address=address)
        process.communicate()


def _answer(request: chat_pb2.ChatRequest) -> str:
    """As many tokens as are asked for; the fake service's tokens are words."""
    return " a" * (request.limits.max_new_tokens or 1)


if __name__ == "__main__":
    with FakeServer(_answer) as server:
        print(server.address, flush=True)
        sys.stdin.read()
