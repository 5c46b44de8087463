"""Streams one chat and fails if no text comes: what `helm test` runs.

Asks OASST_QUESTION of the service that the SDK's own variables tell of: OASST_ADDRESS, OASST_API_KEY, OASST_TLS and so
on.
"""

import os
import sys

from oasst_client import connect


def main() -> int:
    with (
        connect() as client,
        client.stream(os.environ["OASST_QUESTION"], max_new_tokens=32, timeout_s=120) as stream,
    ):
        pieces = list(stream)
    print("".join(pieces))
    return 0 if pieces else 1


if __name__ == "__main__":
    sys.exit(main())
