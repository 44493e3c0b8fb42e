"""The folder of one training run, `output_dir/name`: what it is, how far it is, and who works in it.

    run.json        settings, MLflow run, state (running, interrupted, finished) — rewritten in one step
    checkpoints/    see `checkpoints`
    model/          the finished model
    data/           shards of `demo:` sources

The same command finds its own folder again and goes on. Settings that would make it another run are refused by name.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pixellm.errors import CheckpointError, ConfigError, PixelLMError
from pixellm.jobs.train.events import WorkerResult
from pixellm.platform.settings import Settings

State = Literal["new", "running", "interrupted", "failed", "trained", "finished"]

_STATE_FILE = "run.json"
_LOCK_FILE = ".lock"
#: What may differ between the parts of one run: where and how fast it runs, not what it computes.
_FREE_SECTIONS = ("plan", "evaluate", "tracking", "registry", "serve", "cluster")
_FREE_TRAIN_KEYS = (
    "output_dir",
    "num_workers",
    "use_gpu",
    "threads_per_worker",
    "worker_cpus",
    "grad_accumulation",
    "zero_stage",
    "offload_optimizer",
    "gradient_checkpointing",
    "checkpoint_every",
    "keep_last",
    "checkpoint_uri",
    "max_skipped_steps",
    "resize_check_s",
    "validation",
    "max_failures",
)
_FREE_DATA_KEYS = ("block_size", "task_cpus")


@dataclass(frozen=True)
class RunState:
    """What `run.json` holds.

    Attributes:
        state: how the run stands; "trained" is between the last step and the registry.
        run_id: of MLflow.
        identity: the settings that make it this run.
        data_digests: source → digest of its shards.
        step: steps done, as of the last time the driver wrote it.
        result: what the workers returned ("trained"), or the whole job ("finished").
    """

    state: State = "new"
    run_id: str | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    data_digests: dict[str, str] = field(default_factory=dict)
    step: int = 0
    result: dict[str, Any] = field(default_factory=dict)

    def worker_result(self) -> WorkerResult:
        """What the workers returned, of a run that is trained and not yet registered."""
        return WorkerResult(**self.result)


class RunFolder:
    """One run's folder on disk."""

    def __init__(self, settings: Settings) -> None:
        self.path = (Path(settings.train.output_dir).expanduser() / settings.name).absolute()

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.path / "checkpoints"

    @property
    def model_dir(self) -> Path:
        """Where the finished model is."""
        return self.path / "model"

    @property
    def data_dir(self) -> Path:
        """Where shards of `demo:` sources are."""
        return self.path / "data"

    def read(self) -> RunState:
        """The run's state; a new one where there is none.

        Raises:
            CheckpointError: `run.json` cannot be read.
        """
        path = self.path / _STATE_FILE
        if not path.exists():
            return RunState()
        try:
            return RunState(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); start anew with --fresh or another name") from None

    def write(self, state: RunState) -> RunState:
        """Replaces the run's state in one step; returns it."""
        temporary = self.path / f"{_STATE_FILE}.writing"
        temporary.write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path / _STATE_FILE)
        return state

    def update(self, **changes: Any) -> RunState:
        """Changes some of the run's state."""
        return self.write(replace(self.read(), **changes))

    def set_aside(self) -> Path | None:
        """Moves a former run of this name out of the way; returns where it is now.

        Nothing is deleted: a folder of the same name with the time behind it keeps the former run.
        """
        if not (self.path / _STATE_FILE).exists():
            return None
        aside = self.path.with_name(f"{self.path.name}.before-{time.strftime('%Y%m%dT%H%M%S')}")
        aside.mkdir()
        for entry in self.path.iterdir():
            if entry.name != _LOCK_FILE:
                entry.rename(aside / entry.name)
        return aside

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder, and keeps other drivers out of it while the block runs.

        Raises:
            ConfigError: another process trains here, or the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / _LOCK_FILE).open("a+")
        except OSError as error:
            raise ConfigError(
                f"cannot make the run folder {self.path} ({error.strerror}); set train.output_dir to a writable folder"
            ) from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                raise ConfigError(
                    f"another process ({file.read().strip() or 'unknown'}) trains in {self.path}; wait for it, or give "
                    "this run another --name"
                ) from None
            file.truncate(0)
            file.write(f"pid {os.getpid()}")
            file.flush()
            yield


def identity_of(settings: Settings) -> dict[str, Any]:
    """The settings that decide what a run computes, flat: key → text."""
    tree = settings.model_dump(mode="json", exclude=set(_FREE_SECTIONS))
    for key in _FREE_TRAIN_KEYS:
        tree["train"].pop(key, None)
    for key in _FREE_DATA_KEYS:
        tree["data"].pop(key, None)
    tree["train"]["global_batch_size"] = settings.train.global_batch_size
    return dict(_flat(tree))


def check_same_run(state: RunState, settings: Settings, data_digests: dict[str, str]) -> None:
    """Refuses to go on with a run under settings that would make it another one.

    More steps are allowed: the schedule stretches from where the run is. A setting that an earlier version did not have
    counts as its default.

    Raises:
        ConfigError: naming each differing key with both values.
        DataError-like PixelLMError: the shards have another content now.
    """
    mine = identity_of(settings)
    was = identity_of(Settings()) | state.identity
    differing = sorted(key for key in mine.keys() | state.identity.keys() if mine.get(key) != was.get(key))
    if "train.steps" in differing and settings.train.steps > state.step:
        differing.remove("train.steps")
    if differing:
        listed = "; ".join(f"{key}: was {was.get(key)}, now {mine.get(key)}" for key in differing[:6])
        raise ConfigError(
            f"the run {settings.name!r} was started with other settings ({listed}); use the same ones to go on, "
            "--fresh to start anew, or another --name"
        )
    changed = sorted(name for name, digest in data_digests.items() if state.data_digests.get(name, digest) != digest)
    if changed:
        raise PixelLMError(
            f"the data of the run {settings.name!r} has changed since it started ({', '.join(changed)}); bring it "
            "back, or use --fresh or another --name"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, json.dumps(value, sort_keys=True)
