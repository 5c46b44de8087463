"""What Ctrl-C does to an answer that is being read."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from oasst_client import CompletionStream

__all__ = ["closed_by_ctrl_c"]


@contextmanager
def closed_by_ctrl_c(stream: CompletionStream) -> Generator[threading.Event]:
    """The event is set, and the stream closed, once Ctrl-C was heard.

    Nothing is raised: an exception inside gRPC may leave one of the channel's locks held, and every later call on it
    would wait for ever.
    """
    is_stopped = threading.Event()
    closing = threading.Thread(target=stream.close, name="stop-answer", daemon=True)

    def stop(number: int, frame: FrameType | None) -> None:
        if not is_stopped.is_set():
            is_stopped.set()
            closing.start()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield is_stopped
    finally:
        signal.signal(signal.SIGINT, before)
        if is_stopped.is_set():
            closing.join()  # Or the client might be closed before it has told the server.
