"""Where the service is and how it is reached: from a profile file, the environment, or both.

The file is `$OASST_CONFIG`, or `oasst/profiles.toml` in the user's configuration folder. Each table is a profile, and
the one named `default` is used when nobody asks for another:

    [default]
    address = "127.0.0.1:50051"

    [work]
    address = "chat.example:443"
    api_key = "..."
    tls = true

>>> load_profile(environment={"OASST_CONFIG": "none.toml", "OASST_ADDRESS": "chat.example:443"}).address
'chat.example:443'
"""

import os
import tomllib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import grpc

from oasst_client._async_client import AsyncClient
from oasst_client._channel import Tls, channel_credentials, channel_options, target_of
from oasst_client._client import Client
from oasst_client._errors import OasstError
from oasst_client._retry import DEFAULT_RETRY, RetryPolicy

__all__ = [
    "Profile",
    "ProfileError",
    "connect",
    "connect_async",
    "load_profile",
    "open_channel",
    "profile_path",
]

_DEFAULT_ADDRESS = "127.0.0.1:50051"
_DEFAULT_PROFILE = "default"
_TRUTHS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


class ProfileError(OasstError):
    """The profile file, or a variable of the environment, cannot be used; says which and why."""


@dataclass(frozen=True, slots=True)
class Profile:
    """How a service is reached. Each field is a key of the file, and `OASST_` and its name a variable."""

    # `host:port`, several `ip:port` separated by commas, or any gRPC target.
    address: str = _DEFAULT_ADDRESS
    # Sent with every call. Secret.
    api_key: str | None = field(default=None, repr=False)
    # Whether the connection is encrypted and the server's certificate checked; any of those below turns it on. A key
    # goes to another machine in plain text only where this is False, not where nothing was said.
    tls: bool | None = None
    # Certificates of the authorities to trust (PEM); without it those that gRPC brings.
    tls_ca_file: Path | None = None
    # The caller's own certificate chain and its key (PEM), for a server that asks for them.
    tls_cert_file: Path | None = None
    tls_key_file: Path | None = None
    # The name in the server's certificate, where it is not that of the address.
    tls_server_name: str | None = None

    @property
    def tls_options(self) -> Tls | bool | None:
        """What a client is told of TLS.

        Raises:
            ProfileError: a certificate comes without its key.
        """
        if not self.tls:
            return self.tls
        try:
            return Tls(self.tls_ca_file, self.tls_cert_file, self.tls_key_file, self.tls_server_name)
        except ValueError as error:
            raise ProfileError(str(error)) from error


def connect(
    profile: Profile | str | None = None, *, retry: RetryPolicy = DEFAULT_RETRY, query_timeout_s: float = 10.0
) -> Client:
    """A client of the service that the profile, its name, or else environment and file tell of.

    Raises:
        ProfileError: there is no such profile, or it cannot be used.
    """
    chosen = profile if isinstance(profile, Profile) else load_profile(profile)
    with _told_as_profile_errors():
        return Client(
            chosen.address,
            api_key=chosen.api_key,
            tls=chosen.tls_options,
            retry=retry,
            query_timeout_s=query_timeout_s,
        )


def connect_async(
    profile: Profile | str | None = None, *, retry: RetryPolicy = DEFAULT_RETRY, query_timeout_s: float = 10.0
) -> AsyncClient:
    """`connect` for an event loop; called inside a coroutine."""
    chosen = profile if isinstance(profile, Profile) else load_profile(profile)
    with _told_as_profile_errors():
        return AsyncClient(
            chosen.address,
            api_key=chosen.api_key,
            tls=chosen.tls_options,
            retry=retry,
            query_timeout_s=query_timeout_s,
        )


def open_channel(profile: Profile) -> grpc.Channel:
    """A gRPC channel to the service, for what this package has no call for, such as `grpc.health.v1`.

    Raises:
        ProfileError: the profile cannot be used.
    """
    with _told_as_profile_errors():
        tls = profile.tls_options
        credentials, options = channel_credentials(tls), channel_options(tls)
        target = target_of(profile.address)
    if credentials is None:
        return grpc.insecure_channel(target, options)
    return grpc.secure_channel(target, credentials, options)


@contextmanager
def _told_as_profile_errors() -> Generator[None]:
    """What a client cannot be made of is the profile's fault."""
    try:
        yield
    except OSError as error:
        raise ProfileError(f"{error.filename} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ProfileError(str(error)) from error


def load_profile(
    name: str | None = None, *, path: Path | None = None, environment: Mapping[str, str] | None = None
) -> Profile:
    """The profile in use.

    A profile that is named here is taken as the file has it. Without a name it is the one of `OASST_PROFILE`, else
    the default one, and variables of the environment come on top of it, field by field.

    Args:
        name: of a profile in the file.
        path: of the file, if not the usual one.
        environment: instead of the process's own.

    Raises:
        ProfileError: there is no such profile, or a key or a variable is unknown or wrong.
    """
    variables = os.environ if environment is None else environment
    chosen = path or profile_path(variables)
    if name is not None:
        return _profile_of(chosen, name, is_required=True)
    asked = variables.get("OASST_PROFILE")
    profile = _profile_of(chosen, asked or _DEFAULT_PROFILE, is_required=bool(asked))
    values = {
        each.name: (f"OASST_{each.name.upper()}", variables[f"OASST_{each.name.upper()}"])
        for each in fields(Profile)
        if variables.get(f"OASST_{each.name.upper()}")
    }
    return _with_values(profile, {key: _from_text(key, *value) for key, value in values.items()})


def profile_path(environment: Mapping[str, str]) -> Path:
    """Where the profile file is, whether or not there is one."""
    if given := environment.get("OASST_CONFIG"):
        return Path(given).expanduser()
    folder = environment.get("XDG_CONFIG_HOME")
    return (Path(folder) if folder else Path.home() / ".config") / "oasst" / "profiles.toml"


def _profile_of(path: Path, name: str, *, is_required: bool) -> Profile:
    """The named profile in the file, or one with nothing set where none is required."""
    profiles = _read_profiles(path)
    if name not in profiles:
        if is_required:
            known = ", ".join(profiles) or "none"
            raise ProfileError(f"there is no profile {name!r} in {path}; there is {known}")
        return Profile()
    if not isinstance(profiles[name], dict):
        raise ProfileError(f"{path}: {name} must be a table, [{name}]")
    table: dict[str, Any] = profiles[name]
    types: dict[str, type] = {each.name: bool if each.name == "tls" else str for each in fields(Profile)}
    for key, value in table.items():
        if key not in types:
            raise ProfileError(f"{path}: [{name}] has the unknown key {key!r}; known are {', '.join(types)}")
        if not isinstance(value, types[key]):
            raise ProfileError(f"{path}: {key} of [{name}] must be a {types[key].__name__}")
    # Files are told relative to the one that names them.
    files = {key: path.parent / Path(value).expanduser() for key, value in table.items() if key.endswith("_file")}
    return _with_values(Profile(), {**table, **files})


def _read_profiles(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ProfileError(f"{path} cannot be read: {error}") from error


def _from_text(key: str, variable: str, text: str) -> str | bool | Path:
    """The value of a field as its variable tells it."""
    if key == "tls":
        if text.lower() not in _TRUTHS:
            raise ProfileError(f"{variable} must be one of {', '.join(_TRUTHS)}")
        return _TRUTHS[text.lower()]
    return Path(text).expanduser() if key.endswith("_file") else text


def _with_values(profile: Profile, values: Mapping[str, Any]) -> Profile:
    """`profile` with these values; what is for TLS turns it on."""
    implied = True if any(key.startswith("tls_") for key in values) else profile.tls
    return replace(profile, **{"tls": implied, **values})
