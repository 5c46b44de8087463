"""Callers who prove themselves by a JSON Web Token of an issuer that the operator names."""

from collections.abc import Mapping
from dataclasses import dataclass

import jwt
from cryptography.exceptions import UnsupportedAlgorithm

from oasst_gateway.errors import StartError, UnauthenticatedError
from oasst_gateway.tenants import Tenant, bearer_token

__all__ = ["JwtAuthenticator", "JwtIssuer"]

_REQUIRED_CLAIMS = ["aud", "exp", "iss"]


@dataclass(frozen=True, slots=True)
class JwtIssuer:
    """Whose tokens are believed. The algorithm is ours to choose, never the token's."""

    issuer: str
    audience: str
    key: str  # The issuer's public key, as PEM.
    algorithm: str
    tenant_claim: str  # Names the tenant.


class JwtAuthenticator:
    """Tells a tenant by its token; a token that is signed, ours and current, and names a tenant of the file."""

    def __init__(self, issuer: JwtIssuer, tenants: Mapping[str, Tenant]) -> None:
        """Raises StartError if the issuer's key is none of its algorithm."""
        self._issuer = issuer
        self._tenants = tenants
        try:
            self._key = jwt.get_algorithm_by_name(issuer.algorithm).prepare_key(issuer.key)
        except (jwt.PyJWTError, UnsupportedAlgorithm, ValueError, TypeError) as error:
            raise StartError(f"the JWT key is no public key for {issuer.algorithm}: {error}") from error
        if hasattr(self._key, "private_bytes"):
            raise StartError("the JWT key holds a private key; give the public one")

    def tenant_of(self, authorization: str) -> Tenant:
        """The tenant that the token in `authorization` names, as "Bearer TOKEN"."""
        try:
            claims = jwt.decode(
                bearer_token(authorization),
                self._key,
                algorithms=[self._issuer.algorithm],
                audience=self._issuer.audience,
                issuer=self._issuer.issuer,
                options={"require": [*_REQUIRED_CLAIMS, self._issuer.tenant_claim]},
            )
        except jwt.PyJWTError as error:
            raise UnauthenticatedError from error
        tenant = self._tenants.get(str(claims[self._issuer.tenant_claim]))
        if tenant is None:
            raise UnauthenticatedError
        return tenant
