"""Who asks: API keys, kept as SHA-256 digests only, and compared in constant time.

A key is 32 random bytes, so one round of SHA-256 is as good as a slow hash here. Without any key the service answers
this machine only.
"""

import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pixellm.errors import AuthenticationError, ConfigError
from pixellm.platform.settings import ServeSettings

ENVIRONMENT_VARIABLE = "PIXELLM_API_KEYS"

_LINE = re.compile(r"(?P<name>[A-Za-z0-9_.-]{1,64}) sha256:(?P<digest>[0-9a-f]{64})(?P<limits>( \w+=\d+)*)")
_LIMITS = ("concurrent", "per_minute")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key that is let in.

    Attributes:
        name: what logs and limits call it.
        digest: SHA-256 of the key, hexadecimal.
        concurrent: open requests at once; None takes the service's limit.
        per_minute: requests in a minute; None takes the service's limit.
    """

    name: str
    digest: str
    concurrent: int | None = None
    per_minute: int | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: `key` is None on a service without keys, and `name` is then the client's address."""

    name: str
    key: ApiKey | None = None


def new_key(name: str) -> tuple[str, str]:
    """Makes a key.

    Args:
        name: letters, digits, `_`, `.` and `-`.

    Returns:
        (the key, to be given to whoever asks and kept nowhere; the line for the service's key file).

    Raises:
        ConfigError: the name has other characters.
    """
    secret = f"px-{secrets.token_urlsafe(32)}"
    line = f"{name} sha256:{_digest(secret)}"
    if _LINE.fullmatch(line) is None:
        raise ConfigError(f"got the key name {name[:80]!r}; wanted 1 to 64 letters, digits, '_', '.' or '-'")
    return secret, line


def read_keys(settings: ServeSettings, environment: Mapping[str, str]) -> tuple[ApiKey, ...]:
    """The keys of a service: those of `serve.api_keys_file` and those of the variable `PIXELLM_API_KEYS`.

    Lines are `NAME sha256:HEX [concurrent=N] [per_minute=N]`; the variable may separate them by `;`, too.

    Raises:
        ConfigError: the file cannot be read, or a line is of another form (what it holds is not quoted).
    """
    text = environment.get(ENVIRONMENT_VARIABLE, "").replace(";", "\n")
    lines = [(ENVIRONMENT_VARIABLE, line) for line in text.splitlines()]
    if settings.api_keys_file is not None:
        try:
            content = Path(settings.api_keys_file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read serve.api_keys_file {settings.api_keys_file}: {error}") from None
        lines += [(settings.api_keys_file, line) for line in content.splitlines()]
    return tuple(
        _read_line(line.strip(), where) for where, line in lines if line.strip() and not line.strip().startswith("#")
    )


def check_exposure(host: str, keys: Sequence[ApiKey]) -> None:
    """Refuses to listen beyond this machine without a key.

    Raises:
        ConfigError: it says how to make a key.
    """
    if not keys and not is_loopback(host):
        raise ConfigError(
            f"serve.host is {host}, which others can reach, and no API key is set; make one with `pixellm key NAME`, "
            "put its line into a file and give --serve.api_keys_file=FILE (or set PIXELLM_API_KEYS), or listen on "
            "127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Doorkeeper:
    """Says who asks.

    Args:
        keys: those let in; none means that only this machine is.
    """

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._keys = tuple(keys)

    def identify(self, authorization: str | None, client_host: str | None) -> Caller:
        """Who a request comes from.

        Args:
            authorization: the request's Authorization header.
            client_host: address that the request came from.

        Raises:
            AuthenticationError: no key, another key, or a keyless service asked from elsewhere.
        """
        if not self._keys:
            if client_host is None or not is_loopback(client_host):
                raise AuthenticationError("this service has no API keys and answers its own machine only")
            return Caller(client_host)
        scheme, _, presented = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not presented.strip():
            raise AuthenticationError("no API key was sent; wanted the header 'Authorization: Bearer KEY'")
        digest = _digest(presented.strip())
        found: ApiKey | None = None
        for key in self._keys:  # all of them, whichever fits: the time taken tells nothing
            if hmac.compare_digest(key.digest, digest):
                found = key
        if found is None:
            raise AuthenticationError("this API key is not known here")
        return Caller(found.name, found)


def _read_line(line: str, where: str) -> ApiKey:
    match = _LINE.fullmatch(line)
    limits = dict(part.split("=") for part in match["limits"].split()) if match else {}
    if match is None or not set(limits) <= set(_LIMITS) or "0" in limits.values():
        raise ConfigError(
            f"a line of {where} is not NAME sha256:HEX [concurrent=N] [per_minute=N]; `pixellm key NAME` makes one"
        )
    numbers = {name: int(value) for name, value in limits.items()}
    return ApiKey(match["name"], match["digest"], numbers.get("concurrent"), numbers.get("per_minute"))


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
