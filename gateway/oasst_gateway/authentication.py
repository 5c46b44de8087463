"""Which proofs of identity the settings ask for."""

from oasst_gateway.errors import StartError
from oasst_gateway.settings import GatewaySettings
from oasst_gateway.tenants import AnyOf, Authenticator, OneTenant, Tenant, Tenants
from oasst_gateway.web_tokens import JwtAuthenticator, JwtIssuer

__all__ = ["DEFAULT_TENANT", "FileAuthenticator"]

# All callers of a gateway without a tenants file.
DEFAULT_TENANT = Tenant("default", is_trusted=True)


class FileAuthenticator:
    """Believes whom the settings' files named when they were read last."""

    def __init__(self, settings: GatewaySettings) -> None:
        """Raises StartError if a file is missing or wrong."""
        self._settings = settings
        self._current = _read_authenticator(settings)

    def reload(self) -> None:
        """Believes whom the files name now. Raises StartError, and goes on as before, if one is missing or wrong."""
        self._current = _read_authenticator(self._settings)

    def tenant_of(self, authorization: str) -> Tenant:
        return self._current.tenant_of(authorization)


def _read_authenticator(settings: GatewaySettings) -> Authenticator:
    """Believes API keys of the tenants file and, where an issuer is named, its tokens; without a file, everybody."""
    if settings.tenants is None:
        return OneTenant(DEFAULT_TENANT)
    tenants = Tenants.from_file(settings.tenants)
    if settings.jwt_key is None or settings.jwt_issuer is None or settings.jwt_audience is None:
        return tenants
    try:
        key = settings.jwt_key.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"cannot read the JWT key in {settings.jwt_key}: {error}") from error
    issuer = JwtIssuer(
        issuer=settings.jwt_issuer,
        audience=settings.jwt_audience,
        key=key,
        algorithm=settings.jwt_algorithm,
        tenant_claim=settings.jwt_tenant_claim,
    )
    return AnyOf((tenants, JwtAuthenticator(issuer, tenants.by_name)))
