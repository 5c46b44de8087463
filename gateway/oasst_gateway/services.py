"""The services that this gateway serves, by their full names."""

from google.protobuf.descriptor import FileDescriptor
from oasst.v1 import chat_pb2, model_pb2, scoring_pb2

__all__ = ["PLAIN_SERVICES", "QUEUE_SERVICES", "SERVICES"]


def _names(*files: FileDescriptor) -> tuple[str, ...]:
    return tuple(service.full_name for file in files for service in file.services_by_name.values())


SERVICES = _names(chat_pb2.DESCRIPTOR, model_pb2.DESCRIPTOR, scoring_pb2.DESCRIPTOR)
# Reading text needs no queue.
PLAIN_SERVICES = _names(model_pb2.DESCRIPTOR)
QUEUE_SERVICES = tuple(name for name in SERVICES if name not in PLAIN_SERVICES)
