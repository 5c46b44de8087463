"""Framed JobUpdates: pieces of an UpdateBatch that Redis can join without reading them.

A framed update is field 1 of UpdateBatch as it stands on the wire (tag, length, JobUpdate), so updates of many jobs
written one behind the other are a batch. The log keeps an entry alone, so an update comes in two pieces, a head and
the entry or outcome itself, and Redis stores the second and hands on both.

A head is made for every job at every step, so it is written by hand: that takes a fifth of what protobuf takes.
"""

from oasst.jobs.v1 import job_pb2

__all__ = ["update_head"]

_VARINT = 0
_LENGTH_DELIMITED = 2
_ONE_BYTE = tuple(bytes([value]) for value in range(0x80))


def update_head(job_id: str, start_position: int, *, field: int, length: int) -> bytes:
    """Everything of a framed JobUpdate that stands before its news, which has this field number and length."""
    name = job_id.encode()
    about = b"".join(
        (
            _JOB_ID_TAG,
            _varint(len(name)),
            name,
            _START_POSITION_TAG,
            _varint(start_position),
            _tag(field, _LENGTH_DELIMITED),
            _varint(length),
        )
    )
    return _UPDATES_TAG + _varint(len(about) + length) + about


def _tag(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _varint(value: int) -> bytes:
    """Base 128, low groups first, the high bit set on all but the last."""
    if value < 0x80:
        return _ONE_BYTE[value]
    return bytes([value & 0x7F | 0x80]) + _varint(value >> 7)


_UPDATES_TAG = _tag(job_pb2.UpdateBatch.UPDATES_FIELD_NUMBER, _LENGTH_DELIMITED)
_JOB_ID_TAG = _tag(job_pb2.JobUpdate.JOB_ID_FIELD_NUMBER, _LENGTH_DELIMITED)
_START_POSITION_TAG = _tag(job_pb2.JobUpdate.START_POSITION_FIELD_NUMBER, _VARINT)
