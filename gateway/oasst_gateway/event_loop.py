"""What keeps one request's work from holding up all streams."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from google.protobuf.message import Message

__all__ = ["beside_streams"]

T = TypeVar("T")

# Work on larger requests is done in a thread.
_BIG_REQUEST_BYTES = 8 * 1024


async def beside_streams(request: Message, work: Callable[[], T]) -> T:
    """What `work`, which takes time by the request's size, returns or raises."""
    return await asyncio.to_thread(work) if request.ByteSize() > _BIG_REQUEST_BYTES else work()
