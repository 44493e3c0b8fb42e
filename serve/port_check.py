"""Whether a port can be listened on, and who holds it otherwise."""

import errno
import os
import socket
from contextlib import suppress
from pathlib import Path

from pixellm.errors import ConfigError, ServingError

_LAST_PORT = 65535
_LISTEN = "0A"


def check_port_is_free(host: str, port: int, *, option: str = "--port") -> None:
    """Raises ServingError when nothing can listen on `host:port`; the message names the holder where it can be seen.

    A number that is no port is a ConfigError.

    Args:
        host: address to listen on.
        port: the port.
        option: what chooses another port, for the message.
    """
    if not 0 <= port <= _LAST_PORT:
        raise ConfigError(f"{option} is {port}; wanted a port from 1 to {_LAST_PORT}, or 0 for any that is free")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ServingError(
                    f"port {port} on {host} is already taken{_holder(port)}; choose another with {option}"
                ) from None
            raise ServingError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another with --host and {option}"
            ) from None


def _holder(port: int) -> str:
    """ " by process 123 (python …)", or nothing where the system does not show it (another user, not Linux)."""
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    if not sockets:
        return ""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended meanwhile, or another user's
            if any(_link(entry) in sockets for entry in (process / "fd").iterdir()):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                return f" by process {process.name} ({command[:60]})"
    return ""


def _link(entry: Path) -> str:
    try:
        return os.readlink(entry)
    except OSError:  # closed meanwhile
        return ""


def _listening_inodes(port: int) -> set[str]:
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(fields[9])
    return inodes
