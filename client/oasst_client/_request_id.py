"""Request ids: UUIDv7 of RFC 9562, which sort by the time they were drawn."""

import secrets
import time
import uuid

__all__ = ["new_request_id"]


def new_request_id() -> str:
    """A fresh UUIDv7: 48 bits of Unix milliseconds, then 74 random bits around version and variant.

    >>> uuid.UUID(new_request_id()).version
    7
    """
    timestamp_ms = time.time_ns() // 1_000_000
    value = (timestamp_ms & (1 << 48) - 1) << 80 | secrets.randbits(80)
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return str(uuid.UUID(int=value))
