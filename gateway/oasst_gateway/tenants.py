"""Who a caller is, and what that tenant may do. Pure: a tenants file and an `authorization` header in, a tenant out.

The file is TOML:

    [[tenants]]
    name = "search"
    keys = [{ id = "5f0c2a9d1b7e4380", sha256 = "9c56cc51b374c3ba189210d5b6d4bf57790d351c96c47c02190ecf1e430635ab" }]
    weight = 2.0                 # Its share of the workers beside others', 0.01 to 100; 1 if left out.
    max_waiting_requests = 100   # More are refused; no limit of its own if left out.
    max_waiting_tokens = 50_000  # Prompt tokens and tokens asked for of all that wait.
    is_trusted = true            # May send prompts with control tokens, and token ids; false if left out.

`python -m oasst_gateway.keys` makes a key and the line for `keys`. Keys are 256 random bits, so a plain SHA-256 of one
cannot be reversed, and the file holds nothing that opens the door.
"""

import hashlib
import hmac
import re
import secrets
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Protocol

from oasst_jobs import MAX_WEIGHT, MIN_WEIGHT
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from oasst_gateway.errors import StartError, UnauthenticatedError

__all__ = ["AnyOf", "ApiKey", "Authenticator", "OneTenant", "Tenant", "Tenants", "bearer_token", "draw_api_key"]

_KEY = re.compile(r"oasst_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
_SCHEME = "bearer "


@dataclass(frozen=True, slots=True)
class Tenant:
    """On whose behalf requests are made."""

    name: str
    weight: float = 1.0  # Its share of the workers beside others'.
    max_waiting_requests: int | None = None
    max_waiting_tokens: int | None = None
    is_trusted: bool = False  # May form turns itself: raw prompts and token ids.


class Authenticator(Protocol):
    """Tells whose an RPC is."""

    def tenant_of(self, authorization: str) -> Tenant:
        """The tenant that this `authorization` header proves.

        Raises:
            UnauthenticatedError: if it proves none.
        """


class OneTenant:
    """Everybody is the same tenant; for a machine of one's own."""

    def __init__(self, tenant: Tenant) -> None:
        self._tenant = tenant

    def tenant_of(self, authorization: str) -> Tenant:
        return self._tenant


class AnyOf:
    """Believes whomever one of several authenticators believes."""

    def __init__(self, authenticators: Sequence[Authenticator]) -> None:
        self._authenticators = tuple(authenticators)

    def tenant_of(self, authorization: str) -> Tenant:
        for authenticator in self._authenticators:
            with suppress(UnauthenticatedError):
                return authenticator.tenant_of(authorization)
        raise UnauthenticatedError


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as its holder knows it, and what the tenants file holds of it."""

    key: str
    key_id: str
    sha256: str


def draw_api_key() -> ApiKey:
    """A new key of 256 random bits, with an id by which it is found."""
    key_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    key = f"oasst_{key_id}_{secret}"
    return ApiKey(key, key_id, _digest(key))


class Tenants:
    """The tenants of a file, and their keys."""

    def __init__(self, tenants: Mapping[str, Tenant], key_digests: Mapping[str, tuple[str, Tenant]]) -> None:
        self.by_name: Mapping[str, Tenant] = MappingProxyType(dict(tenants))
        self._key_digests = MappingProxyType(dict(key_digests))

    @classmethod
    def from_file(cls, path: Path) -> "Tenants":
        """The tenants that a TOML file describes.

        Raises:
            StartError: with a sentence that says what to change.
        """
        try:
            file = _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise StartError(f"cannot read the tenants in {path}: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise StartError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}") from error
        tenants: dict[str, Tenant] = {}
        digests: dict[str, tuple[str, Tenant]] = {}
        for row in file.tenants:
            if row.name in tenants:
                raise StartError(f"{path}: there are two tenants named {row.name}")
            tenants[row.name] = row.to_tenant()
            for key in row.keys:
                if key.id in digests:
                    raise StartError(f"{path}: there are two keys with the id {key.id}")
                digests[key.id] = (key.sha256, tenants[row.name])
        return cls(tenants, digests)

    def tenant_of(self, authorization: str) -> Tenant:
        """The tenant whose key `authorization` holds, as "Bearer KEY"."""
        match = _KEY.fullmatch(bearer_token(authorization))
        if match is None:
            raise UnauthenticatedError
        known = self._key_digests.get(match[1])
        if known is None:
            raise UnauthenticatedError
        digest, tenant = known
        if not hmac.compare_digest(digest, _digest(match[0])):
            raise UnauthenticatedError
        return tenant


def bearer_token(authorization: str) -> str:
    """What follows "Bearer"; empty if it is no such header."""
    is_bearer = authorization[: len(_SCHEME)].lower() == _SCHEME
    return authorization[len(_SCHEME) :] if is_bearer else ""


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Key(_Row):
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Tenant(_Row):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    keys: tuple[_Key, ...] = ()
    weight: Annotated[float, Field(ge=MIN_WEIGHT, le=MAX_WEIGHT)] = 1.0
    max_waiting_requests: Annotated[int, Field(ge=1)] | None = None
    max_waiting_tokens: Annotated[int, Field(ge=1)] | None = None
    is_trusted: bool = False

    def to_tenant(self) -> Tenant:
        return Tenant(**self.model_dump(exclude={"keys"}))


class _File(_Row):
    tenants: Annotated[tuple[_Tenant, ...], Field(min_length=1)]
