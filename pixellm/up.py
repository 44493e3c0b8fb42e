"""`pixellm up`, `status`, `down`: a team's one machine. Ray, MLflow's page and the service, as processes that stay.

What runs is written in one file, `state.json` in the state folder: for each part its process (number and moment of
start, `platform.processes`) and address. `up` starts what is missing and returns when everything answers; `down` ends
exactly what the file names and removes what `up` wrote. Ray asks for a token, which stands in the same folder.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from pixellm.errors import ClusterError, ConfigError, ModelLoadError, TrackingError
from pixellm.platform.processes import MARK, identify, is_running, stop
from pixellm.platform.settings import Settings
from pixellm.platform.tracking import store_address
from pixellm.serve.controller import reachable
from pixellm.serve.model_card import pin
from pixellm.serve.port_check import check_port_is_free
from pixellm.up_state import STATE_FILE, Part, Ports, State, alone_in, read_state, write_state

PARTS = ("ray", "mlflow", "service")  # in the order in which they start

_TOKEN, _PROMETHEUS = "ray_token", "prometheus.yml"
_PORTS = Ports()
_POLL_S = 0.2
_START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = {"service": 75.0, "mlflow": 10.0, "ray": 30.0}
_RAY_VARIABLES = {
    "RAY_AUTH_MODE": "token",
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # the service's engines would get what other work leaves
}
#: The store runs no jobs of its own: without their runners it starts in half the time and needs half the memory.
_MLFLOW_VARIABLES = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


@dataclass(frozen=True)
class UpReport:
    """What is up. `state` by part: running, ended (it died), or absent."""

    folder: str
    parts: dict[str, dict[str, Any]]
    note: str = ""

    @property
    def is_all_up(self) -> bool:
        """Whether every part runs."""
        return all(part["state"] == "running" for part in self.parts.values())

    def to_json_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)

    def to_text(self) -> str:
        """For people."""
        lines = [f"{name:8} {part['state']:8} {part.get('url', '')}".rstrip() for name, part in self.parts.items()]
        if self.parts["ray"]["state"] == "running":
            lines += [
                f"jobs     export RAY_AUTH_TOKEN_PATH={self.folder}/{_TOKEN}",
                f"         pixellm submit … --address {self.parts['ray']['url']}",
                f"metrics  prometheus --config.file={self.folder}/{_PROMETHEUS}",
                f"logs     {self.folder}/*.log",
            ]
        return "\n".join([*lines, *([self.note] if self.note else [])])


def up(
    folder: Path,
    settings: Settings,
    *,
    model: str,
    ports: Ports = _PORTS,
    host: str = "127.0.0.1",
    num_cpus: int | None = None,
    service_words: Sequence[str] = (),
) -> UpReport:
    """Starts what is not up, and returns when all of it answers. What this call started ends if it fails.

    Args:
        folder: for state, token and logs.
        settings: `tracking` says where MLflow's store is.
        model: what is served; where it does not exist yet the service is left out, and the report says so.
        ports: where things listen.
        host: where the service listens.
        num_cpus: logical CPUs of the Ray cluster; None: what the machine has.
        service_words: further words of `pixellm serve`.

    Raises:
        ConfigError: another `up` or `down` works in this folder, or other ports are asked for than those in use.
        ServingError: a port is taken.
        ClusterError: a part does not come up; with the last lines of its log.
    """
    with alone_in(folder):
        state = read_state(folder)
        if state is None or not any(is_running(part.process) for part in state.parts.values()):
            if state is not None:
                _clear(folder, _end(folder, state, PARTS))  # what parts that died may have left
            state = State(secrets.token_hex(8), tempfile.mkdtemp(prefix="pixellm-ray-"), ports)
        elif ports != state.ports:
            raise ConfigError(f"{folder} is up at {state.ports}; wanted {ports}: run `pixellm down` first")
        started: list[str] = []
        try:
            commands = _commands(state, settings, model, host, num_cpus, service_words)
            store = store_address(settings.tracking)
            note = _why_not_served(model, settings)
            missing = _missing(state)
            state = _end(folder, state, missing)  # it died, but what it had started may live and hold its port
            to_start = [name for name in missing if not (name == "service" and note)]
            for name in to_start:
                _check_ports(name, state.ports, host)
            for name in to_start:
                started.append(name)
                state = _start(folder, state, name, commands[name], _urls(state.ports, host)[name], store)
                _wait_until_it_answers(folder, state.parts[name], name)
        except BaseException:
            state = _end(folder, state, started)
            if not state.parts:
                _clear(folder, state)
                _remove_if_empty(folder)
            raise
        _write_prometheus(folder, state.ports, host)
        return _report(folder, state, note)


def down(folder: Path) -> bool:
    """Ends what is up and removes what `up` wrote; whether there was anything.

    Raises:
        ConfigError: another `up` or `down` works in this folder, or its state file cannot be read.
    """
    if not folder.exists():
        return False
    with alone_in(folder):
        state = read_state(folder)
        if state is not None:
            _clear(folder, _end(folder, state, PARTS))
        _remove_if_empty(folder)
    return state is not None


def status(folder: Path) -> UpReport:
    """What is up. Starts and changes nothing.

    Raises:
        ConfigError: the state file cannot be read.
    """
    return _report(folder, read_state(folder))


def _commands(
    state: State,
    settings: Settings,
    model: str,
    host: str,
    num_cpus: int | None,
    service_words: Sequence[str],
) -> dict[str, list[str]]:
    ports = state.ports
    root = settings.tracking.root
    words = ["start", "--head", "--block", "--disable-usage-stats", "--include-dashboard=true"]
    words += [f"--port={ports.ray}", "--node-ip-address=127.0.0.1", f"--temp-dir={state.ray_dir}"]
    words += ["--dashboard-host=127.0.0.1", f"--dashboard-port={ports.dashboard}"]
    words += [f"--metrics-export-port={ports.metrics}", *([f"--num-cpus={num_cpus}"] if num_cpus else [])]
    mlflow = ["server", "--host=127.0.0.1", f"--port={ports.mlflow}", "--workers=1"]
    serve = ["serve", "--model", model, "--host", host, "--port", str(ports.service), *service_words]
    serve += [f"--cluster.address=127.0.0.1:{ports.ray}"]
    serve += [f"--tracking.root={root if '://' in root else Path(root).absolute()}"]
    python = [sys.executable, "-P", "-m"]
    return {
        "ray": [*python, "ray.scripts.scripts", *words],
        "mlflow": [*python, "mlflow", *mlflow],
        "service": [*python, "pixellm.cli", *serve],
    }


def _urls(ports: Ports, host: str) -> dict[str, str]:
    return {
        "ray": f"http://127.0.0.1:{ports.dashboard}",
        "mlflow": f"http://127.0.0.1:{ports.mlflow}",
        "service": f"http://{reachable(host)}:{ports.service}",
    }


def _missing(state: State) -> list[str]:
    """The parts that do not run, in the order of their start; no service outlives its Ray."""
    dead = [name for name in PARTS if name not in state.parts or not is_running(state.parts[name].process)]
    return [name for name in PARTS if name in dead or (name == "service" and "ray" in dead)]


def _check_ports(name: str, ports: Ports, host: str) -> None:
    """Raises ServingError where one of the part's ports is taken."""
    wanted = {
        "ray": {"--ray-port": ports.ray, "--dashboard-port": ports.dashboard, "--metrics-port": ports.metrics},
        "mlflow": {"--mlflow-port": ports.mlflow},
        "service": {"--port": ports.service},
    }[name]
    for option, port in wanted.items():
        check_port_is_free(host if name == "service" else "127.0.0.1", port, option=option)


def _why_not_served(model: str, settings: Settings) -> str:
    try:
        pin(model, settings.tracking)
    except (ModelLoadError, TrackingError) as error:
        return f"service  not started: {error}; `pixellm up` again when there is one"
    return ""


def _start(folder: Path, state: State, name: str, command: list[str], url: str, store: str) -> State:
    token = folder / _TOKEN
    if not token.exists():
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
    environment = os.environ | _RAY_VARIABLES | _MLFLOW_VARIABLES
    environment |= {MARK: f"{state.mark}.{name}", "RAY_AUTH_TOKEN_PATH": str(token.absolute())}
    # By the environment: a store's address may hold a password, and command lines are everybody's to read.
    environment |= {"MLFLOW_TRACKING_URI": store, "MLFLOW_BACKEND_STORE_URI": store}
    for variable in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):  # of another cluster
        environment.pop(variable, None)
    with (folder / f"{name}.log").open("ab") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C in this terminal is not for it
        )
    process = identify(child.pid)
    if process is None:
        raise ClusterError(f"{name} ended at once: {_last_lines(folder, name)}")
    state = replace(state, parts={**state.parts, name: Part(process, url)})
    write_state(folder, state)
    return state


def _wait_until_it_answers(folder: Path, part: Part, name: str) -> None:
    path = {"ray": "/api/authentication_mode", "mlflow": "/health", "service": "/readyz"}[name]
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if not is_running(part.process):
            raise ClusterError(f"{name} does not start: {_last_lines(folder, name)}")
        try:
            if httpx.get(f"{part.url}{path}", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(_POLL_S)
    raise ClusterError(f"{name} did not answer within {_START_TIMEOUT_S:g} s: {_last_lines(folder, name)}")


def _last_lines(folder: Path, name: str) -> str:
    """The end of a part's log, which `_end` removes."""
    text = (folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return errors[-1].removeprefix("error: ") if errors else " | ".join(lines[-3:])[:600] or "its log is empty"


def _end(folder: Path, state: State, names: Sequence[str]) -> State:
    """Ends these parts, the last started first, and returns what is left; its files stay."""
    kept = dict(state.parts)
    for name in reversed([name for name in PARTS if name in names]):
        part = kept.pop(name, None)
        if part is not None:
            stop(part.process, f"{state.mark}.{name}", _STOP_TIMEOUT_S[name])
    left = replace(state, parts=kept)
    if kept:
        write_state(folder, left)
    return left


def _clear(folder: Path, state: State) -> None:
    shutil.rmtree(state.ray_dir, ignore_errors=True)
    for name in (_TOKEN, _PROMETHEUS, *(f"{part}.log" for part in PARTS), STATE_FILE):
        (folder / name).unlink(missing_ok=True)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # it holds something that is not ours
        folder.rmdir()


def _write_prometheus(folder: Path, ports: Ports, host: str) -> None:
    service = _urls(ports, host)["service"].removeprefix("http://")
    jobs = [
        {"job_name": name, "static_configs": [{"targets": [target]}]}
        for name, target in (("pixellm", service), ("ray", f"127.0.0.1:{ports.metrics}"))
    ]
    # JSON is YAML.
    tree = {"global": {"scrape_interval": "15s"}, "scrape_configs": jobs}
    (folder / _PROMETHEUS).write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def _report(folder: Path, state: State | None, note: str = "") -> UpReport:
    parts: dict[str, dict[str, Any]] = {}
    for name in PARTS:
        part = state.parts.get(name) if state else None
        if part is None:
            parts[name] = {"state": "absent"}
        else:
            alive = is_running(part.process)
            parts[name] = {"state": "running" if alive else "ended", "url": part.url, "pid": part.process.pid}
    return UpReport(str(folder.absolute()), parts, note)
