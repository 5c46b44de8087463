"""The server's certificate, as its files were read last."""

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from oasst_gateway.errors import StartError

__all__ = ["ServerCertificate", "TlsFiles"]


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of a server."""

    cert: Path
    key: Path
    client_ca: Path | None  # Who signs the callers' certificates; None if they need none.

    def read(self) -> grpc.ServerCertificateConfiguration:
        """What they hold now.

        Raises:
            StartError: if one is missing, or they do not belong together.
        """
        client_ca = None if self.client_ca is None else _read(self.client_ca)
        pair = (_read(self.key), _read(self.cert))
        self._check()
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=client_ca)

    def _check(self) -> None:
        # gRPC would say so in no way that we could tell.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.cert, self.key, password="")
        except (OSError, ValueError) as error:
            raise StartError(f"{self.cert} and {self.key} are no certificate and its key: {error}") from error
        try:
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
        except (OSError, ValueError) as error:
            raise StartError(f"{self.client_ca} holds no certificate: {error}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartError(f"cannot read {path}: {error.strerror}") from error


class ServerCertificate:
    """What the server shows to new connections. Those that are open keep what they were shown."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises StartError if a file is missing or wrong."""
        self._files = files
        self._first = files.read()
        self._renewed: grpc.ServerCertificateConfiguration | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Those of a server; callers must show a certificate if a CA for them is given."""
        return grpc.dynamic_ssl_server_credentials(
            self._first,
            self._take_renewed,  # type: ignore[arg-type]  # The stubs do not know that it may be None.
            require_client_authentication=self._files.client_ca is not None,
        )

    def read(self) -> grpc.ServerCertificateConfiguration:
        """What its files hold now, for `renew`. Raises StartError if one is missing or wrong."""
        return self._files.read()

    def renew(self, configuration: grpc.ServerCertificateConfiguration) -> None:
        """New connections are shown this from now on."""
        self._renewed = configuration

    def _take_renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC's threads before each handshake; None leaves it as it was."""
        renewed, self._renewed = self._renewed, None
        return renewed
