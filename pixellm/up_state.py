"""The state file of `pixellm up`: which processes are whose, so that `down` ends these and no others."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pixellm.errors import ConfigError
from pixellm.platform.processes import ProcessId

STATE_FILE = "state.json"


@dataclass(frozen=True)
class Ports:
    """Where things listen: MLflow and the dashboard on 127.0.0.1, Ray's control store and metrics on every address."""

    service: int = 8000
    mlflow: int = 5000
    dashboard: int = 8265
    ray: int = 6379
    metrics: int = 8080


@dataclass(frozen=True)
class Part:
    """One thing that is up.

    Attributes:
        process: the process that was started for it.
        url: where it answers.
    """

    process: ProcessId
    url: str


@dataclass(frozen=True)
class State:
    """What `state.json` holds.

    Attributes:
        mark: what all processes of this `up` carry in their environment, followed by a dot and the part's name.
        ray_dir: Ray's temporary folder, removed by `down`.
        ports: where things listen.
        parts: name → part, of `pixellm.up.PARTS`.
    """

    mark: str
    ray_dir: str
    ports: Ports
    parts: dict[str, Part] = field(default_factory=dict)


def read_state(folder: Path) -> State | None:
    """The state file; None where there is none.

    Raises:
        ConfigError: it is damaged.
    """
    path = folder / STATE_FILE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        parts = {name: Part(ProcessId(**part["process"]), part["url"]) for name, part in tree["parts"].items()}
        return State(tree["mark"], tree["ray_dir"], Ports(**tree["ports"]), parts)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a state file of `pixellm up` ({error}); see which processes still run (ps), end them, and "
            f"remove {folder}"
        ) from None


def write_state(folder: Path, state: State) -> None:
    """Writes the state file, in one step."""
    writing = folder / f".{STATE_FILE}.writing"
    writing.write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")
    writing.rename(folder / STATE_FILE)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds the folder's lock; the kernel gives it back however the process ends."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another `pixellm up` or `down` works in {folder}; wait for it") from None
        yield
    finally:
        os.close(descriptor)
