"""Streams one chat and fails if no text comes: what `helm test` runs.

Reads OASST_ADDRESS and OASST_QUESTION; OASST_API_KEY where there are tenants; OASST_TLS, a folder with ca.crt (and with
tls.crt and tls.key where the gateway asks for a certificate), and OASST_SERVER_NAME where there is TLS.
"""

import os
import sys
from pathlib import Path

from oasst_client import Client, Tls


def main() -> int:
    with (
        Client(os.environ["OASST_ADDRESS"], api_key=os.environ.get("OASST_API_KEY"), tls=_tls()) as client,
        client.stream(os.environ["OASST_QUESTION"], max_new_tokens=32, timeout_s=120) as stream,
    ):
        pieces = list(stream)
    print("".join(pieces))
    return 0 if pieces else 1


def _tls() -> Tls | None:
    if "OASST_TLS" not in os.environ:
        return None
    ca, cert, key = (Path(os.environ["OASST_TLS"], name) for name in ("ca.crt", "tls.crt", "tls.key"))
    has_cert = cert.exists()
    return Tls(
        ca=ca,
        cert=cert if has_cert else None,
        key=key if has_cert else None,
        server_name=os.environ.get("OASST_SERVER_NAME") or None,
    )


if __name__ == "__main__":
    sys.exit(main())
