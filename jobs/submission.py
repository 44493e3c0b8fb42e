"""What is handed to a cluster for a pixellm command: a pure plan, made before anything is contacted.

The command is run there as `python3 -P -m pixellm.job …` (`-P`: the working directory is never imported from). Settings
travel resolved, in one file: the caller's recipe and overrides need not exist on the cluster.

Where files go: when the head is this machine, the job runs in the caller's folder and relative paths mean what they
mean to the caller (`train.output_dir`, `tracking.root` and existing data are made absolute, since workers run
elsewhere). On another machine, paths must be absolute on storage that all nodes share, or URIs.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pixellm.errors import ConfigError
from pixellm.platform.settings import ClusterSettings, Settings, from_environment, load_settings

RECIPE_FILE = "recipe.yaml"

_WITH_SETTINGS = ("train", "serve")
_OPTIONS_WITH_VALUE = ("--address", "--secret")
_PLACES = ("--in", "--out", "--data", "--images")
_SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD")
_LEAST_SECRET = 8
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")
_STOP_WAIT_S = 120


@dataclass(frozen=True)
class SubmitOptions:
    """The options of `pixellm submit` itself, taken out of the words of the command it submits."""

    address: str | None
    wait: bool
    command: tuple[str, ...]
    secrets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Submission:
    """What a job consists of, besides the wheel.

    Attributes:
        entrypoint: shell command that the head runs.
        files: name → text, the job's small working directory.
        env_vars: environment of the job's driver and workers.
        metadata: what `jobs list` shows.
    """

    entrypoint: str
    files: dict[str, str]
    env_vars: dict[str, str]
    metadata: dict[str, str]


def parse_submit_words(words: Sequence[str]) -> SubmitOptions:
    """Separates `--address URL`, `--secret NAME`, `--wait` and `--follow` from the command that is submitted.

    Args:
        words: e.g. ["train", "--config", "recipes/tiny.yaml", "--address", "http://127.0.0.1:8265", "--wait"].

    Raises:
        ConfigError: no command, an option without its value, or a secret's value where its name is wanted.
    """
    address: str | None = None
    wait = False
    secrets: list[str] = []
    command: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in _OPTIONS_WITH_VALUE:
            if not equals and not rest:
                example = "http://127.0.0.1:8265" if name == "--address" else "OPENAI_API_KEY"
                raise ConfigError(f"{name} needs a value, e.g. {name} {example}")
            given = value if equals else rest.pop(0)
            if name == "--address":
                address = given
            elif _VARIABLE.fullmatch(given):
                secrets.append(given)
            else:
                raise ConfigError("--secret takes the name of a variable, e.g. OPENAI_API_KEY, never its value")
        elif word in ("--wait", "--follow"):
            wait = True
        else:
            command.append(word)
    if not command or command[0].startswith("-"):
        raise ConfigError("got no command to submit; wanted e.g. pixellm submit train --config recipes/tiny.yaml")
    if command[0] in ("submit", "jobs", "demo"):
        raise ConfigError(
            f"{command[0]!r} runs where you are, it is not submitted; wanted train, evaluate, predict, data …"
        )
    return SubmitOptions(address, wait, tuple(command), tuple(secrets))


def plan_submission(
    command: Sequence[str], *, caller_dir: Path, is_head_local: bool, secrets: Sequence[str] = ()
) -> Submission:
    """Plans the job of a command.

    Args:
        command: the words after `pixellm`.
        caller_dir: absolute; relative paths are the caller's.
        is_head_local: whether the cluster's head runs on this machine.
        secrets: names of variables that the job checks for before it starts.

    Raises:
        ConfigError: the recipe cannot be used, or names a place that the cluster does not share.
    """
    words = list(command)
    files: dict[str, str] = {}
    if words[0] in _WITH_SETTINGS:
        settings, others = _take_settings(words[1:])
        files[RECIPE_FILE] = _placed(settings, caller_dir, is_head_local).to_yaml()
        words = [words[0], *others]
    python = ["python3", "-P", "-m", "pixellm.job", *words]
    entrypoint = shlex.join(python)
    if files:
        # $OLDPWD is the job's own working directory once `cd` has left it.
        entrypoint += f' --config "{"$OLDPWD" if is_head_local else "$PWD"}/{RECIPE_FILE}"'
    if is_head_local:
        entrypoint = f"cd {shlex.quote(str(caller_dir))} && exec {entrypoint}"
    if not is_head_local:
        _refuse_places_of_ours(words)
    variables = _environment() | ({"PIXELLM_SECRETS": ",".join(secrets)} if secrets else {})
    return Submission(entrypoint, files, variables, {"pixellm.command": shlex.join(command)[:1000]})


def refuse_secrets(plan: Submission, environment: Mapping[str, str]) -> None:
    """Looks for the values of the caller's secrets in what everybody with access to the dashboard can read.

    Args:
        plan: of the job.
        environment: the caller's; variables whose names speak of a key, token, secret or password are secrets.

    Raises:
        ConfigError: one of them stands there in clear; it is named, not shown.
    """
    texts = [plan.entrypoint, *plan.files.values(), *plan.env_vars.values(), *plan.metadata.values()]
    for name, value in environment.items():
        is_secret = any(word in name.upper() for word in _SECRET_WORDS) and len(value) >= _LEAST_SECRET
        if is_secret and any(value in text for text in texts):
            raise ConfigError(
                f"the value of {name} stands in the command or its recipe, and a job shows both to everybody; set "
                f"{name} where the cluster is started and give its name: --secret {name}"
            )


def _refuse_places_of_ours(words: Sequence[str]) -> None:
    """A relative path would mean a folder on the head that goes with the job."""
    for position, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name not in _PLACES:
            continue
        path = value if equals else "".join(words[position + 1 : position + 2])
        if path and not _is_absolute(path):
            raise ConfigError(
                f"{name} is {path!r}, a path of this machine; the cluster is elsewhere: give an absolute path on "
                "storage that all its nodes share, or a URI"
            )


def _take_settings(words: list[str]) -> tuple[Settings, list[str]]:
    config: str | None = None
    overrides: list[str] = []
    others: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name == "--config":
            if not equals and not rest:
                raise ConfigError("--config needs a value, e.g. --config recipes/tiny.yaml")
            config = value if equals else rest.pop(0)
        elif equals and "." in name and name.startswith("--"):
            overrides.append(word)
        else:
            others.append(word)
    return load_settings(config, overrides), others


def _placed(settings: Settings, caller_dir: Path, is_head_local: bool) -> Settings:
    def made(path: str, knob: str) -> str:
        """A place that the job writes to."""
        if _is_absolute(path):
            return path
        if is_head_local:
            return str(caller_dir / path)
        raise ConfigError(
            f"{knob} is {path!r}, a path of this machine; the cluster is elsewhere: give --{knob}= an absolute path on "
            f"storage that all its nodes share{'' if knob == 'train.output_dir' else ', or a URI'}"
        )

    def read(path: str | None, knob: str) -> str | None:
        """A place that the job reads from; what is no folder here is left to the job."""
        if path is None or _is_absolute(path) or not (caller_dir / path).exists():
            return path
        return made(path, knob)

    sources = tuple(
        source.model_copy(update={"uri": read(source.uri, f"data.sources.{index}.uri")})
        for index, source in enumerate(settings.data.sources)
    )
    return settings.model_copy(
        update={
            "model": settings.model.model_copy(update={"init_from": read(settings.model.init_from, "model.init_from")}),
            "data": settings.data.model_copy(update={"sources": sources}),
            "train": settings.train.model_copy(
                update={"output_dir": made(settings.train.output_dir, "train.output_dir")}
            ),
            "evaluate": settings.evaluate.model_copy(update={"uri": read(settings.evaluate.uri, "evaluate.uri")}),
            "tracking": settings.tracking.model_copy(update={"root": made(settings.tracking.root, "tracking.root")}),
            "cluster": ClusterSettings(),  # the job joins the cluster that it runs on
        }
    )


def _is_absolute(path: str) -> bool:
    return "://" in path or path.startswith("models:") or Path(path).is_absolute()


def _environment() -> dict[str, str]:
    variables = {
        "PYTHONUNBUFFERED": "1",  # logs are followed while they are written
        "RAY_JOB_STOP_SIGNAL": "SIGINT",  # `jobs stop` is a Ctrl-C: training leaves a checkpoint
        "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S),
    }
    known = from_environment()
    variables |= {name: known[name] for name in ("MLFLOW_TRACKING_URI", "PIXELLM_LOG_LEVEL") if name in known}
    if urlsplit(variables.get("MLFLOW_TRACKING_URI", "")).password:
        raise ConfigError(
            "MLFLOW_TRACKING_URI holds a password, which a job's metadata would show; give the address without it and "
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the cluster"
        )
    return variables
