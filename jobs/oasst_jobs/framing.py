"""Framed JobUpdates: pieces of an UpdateBatch that Redis can join without reading them.

A framed update is field 1 of UpdateBatch as it stands on the wire (tag, length, JobUpdate), so updates of many jobs
written one behind the other are a batch. The log keeps an entry alone, so an update comes in two pieces, a head and
the entry or outcome itself, and Redis stores the second and hands on both.
"""

from oasst.jobs.v1 import job_pb2

__all__ = ["update_head"]

_LENGTH_DELIMITED = 2


def update_head(job_id: str, start_position: int, *, field: int, length: int) -> bytes:
    """Everything of a framed JobUpdate that stands before its news, which has this field number and length."""
    about = job_pb2.JobUpdate(job_id=job_id, start_position=start_position).SerializeToString()
    about += _tag(field) + _varint(length)
    return _tag(job_pb2.UpdateBatch.UPDATES_FIELD_NUMBER) + _varint(len(about) + length) + about


def _tag(field: int) -> bytes:
    return _varint(field << 3 | _LENGTH_DELIMITED)


def _varint(value: int) -> bytes:
    """Base 128, low groups first, the high bit set on all but the last."""
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)
