"""Finds the field that keeps a request from being parsed.

Protobuf refuses a whole message when one string in it is not UTF-8, and does not say which. The walk below reads the
wire format (https://protobuf.dev/programming-guides/encoding) along the message's descriptor until it meets that field.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from google.protobuf.descriptor import Descriptor, FieldDescriptor

__all__ = ["find_invalid_text"]

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10
# More are not looked at: this walk holds up every stream, and nobody who means well sends so many.
_MAX_FIELDS = 10_000


class _UnreadableError(Exception):
    """The bytes are not a protobuf message, or one of too many fields."""


class _Field(NamedTuple):
    number: int
    payload: bytes | None  # Of a length-delimited field, else None.


def find_invalid_text(data: bytes, descriptor: Descriptor) -> str | None:
    """The path of the first string in `data` that is not UTF-8, for example "conversation.messages[2].content".

    None if there is none among the first 10,000 fields, or if `data` is no message of this type at all.
    """
    try:
        return _walk(data, descriptor, prefix="", budget=iter(range(_MAX_FIELDS)))
    except _UnreadableError:
        return None


def _walk(data: bytes, descriptor: Descriptor, *, prefix: str, budget: Iterator[int]) -> str | None:
    """`budget` has one element for each field that may still be read, at any depth."""
    seen: Counter[int] = Counter()
    for number, payload in _read_fields(data):
        if next(budget, None) is None:
            raise _UnreadableError("too many fields")
        field = descriptor.fields_by_number.get(number)
        if field is None or payload is None:
            continue
        path = f"{prefix}{field.name}[{seen[number]}]" if field.is_repeated else f"{prefix}{field.name}"
        seen[number] += 1
        if field.type == FieldDescriptor.TYPE_STRING and not _is_utf8(payload):
            return path
        if field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type is not None:
            found = _walk(payload, field.message_type, prefix=f"{path}.", budget=budget)
            if found is not None:
                return found
    return None


def _is_utf8(payload: bytes) -> bool:
    try:
        payload.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _read_fields(data: bytes) -> Iterator[_Field]:
    position = 0
    while position < len(data):
        tag, position = _read_varint(data, position)
        number, wire_type = tag >> 3, tag & 0b111
        payload = None
        if wire_type == _VARINT:
            _, position = _read_varint(data, position)
        elif wire_type == _FIXED64:
            position += 8
        elif wire_type == _FIXED32:
            position += 4
        elif wire_type == _LENGTH:
            length, start = _read_varint(data, position)
            position = start + length
            payload = data[start:position]
        else:
            raise _UnreadableError(f"wire type {wire_type}")
        if position > len(data):
            raise _UnreadableError("truncated field")
        yield _Field(number, payload)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """The number that starts at `position`, and the position after it."""
    value = 0
    for index, byte in enumerate(data[position : position + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise _UnreadableError("truncated number")
