"""`pixellm up`, `status`, `down`: the state file, refusals, and once the real thing."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pixellm.errors import ConfigError, ServingError
from pixellm.platform.processes import MARK, ProcessId, identify, is_running
from pixellm.platform.settings import load_settings
from pixellm.up import _missing, down, status, up
from pixellm.up_state import STATE_FILE, Part, Ports, State, alone_in, read_state, write_state
from tests.waiting import wait_until


def state_of(parts: dict[str, Part], ray_dir: Path) -> State:
    return State("mark", str(ray_dir), Ports(1, 2, 3, 4, 5), parts)


def test_the_state_file_says_again_what_was_written(tmp_path: Path) -> None:
    state = state_of({"ray": Part(ProcessId(7, "boot:8"), "http://127.0.0.1:3")}, tmp_path)
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"mark": "a"}', '{"mark":"a","ray_dir":"b","ports":{},"parts":{"ray":1}}']
)
def test_a_damaged_state_file_is_an_error_that_says_what_to_do(text: str, tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_text(text)
    for act in (read_state, down, status):
        with pytest.raises(ConfigError, match="is not a state file"):
            act(tmp_path)
    assert (tmp_path / STATE_FILE).exists()


def test_down_never_ends_who_got_the_number_later(tmp_path: Path) -> None:
    folder, ray_dir = tmp_path / "up", tmp_path / "ray"
    folder.mkdir()
    ray_dir.mkdir()
    foreign = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
    try:
        stale = Part(ProcessId(foreign.pid, "an-earlier-boot:17"), "http://127.0.0.1:3")
        write_state(folder, state_of({"ray": stale}, ray_dir))
        assert status(folder).parts["ray"]["state"] == "ended"
        assert down(folder) is True
        assert foreign.poll() is None
        assert not folder.exists()
        assert not ray_dir.exists()
    finally:
        foreign.kill()
        foreign.wait()


def test_down_ends_what_the_file_names_and_leaves_other_files_alone(tmp_path: Path) -> None:
    folder = tmp_path / "up"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    ours = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(300)"], env=os.environ | {MARK: "mark.mlflow"}
    )
    process = identify(ours.pid)
    assert process is not None
    write_state(folder, state_of({"mlflow": Part(process, "http://127.0.0.1:2")}, tmp_path / "ray"))
    assert status(folder).parts["mlflow"] == {"state": "running", "url": "http://127.0.0.1:2", "pid": ours.pid}
    assert down(folder) is True
    assert not is_running(process)
    ours.wait()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_nothing_up_is_said_so(tmp_path: Path) -> None:
    assert down(tmp_path / "nothing") is False
    assert not status(tmp_path / "nothing").is_all_up
    assert not (tmp_path / "nothing").exists()


def test_two_at_once_in_one_folder_are_refused(tmp_path: Path) -> None:
    with alone_in(tmp_path), pytest.raises(ConfigError, match="another `pixellm up`"):
        down(tmp_path)


def test_a_taken_port_is_named_with_the_option_that_changes_it_and_nothing_is_left(tmp_path: Path) -> None:
    settings = load_settings(None, [f"tracking.root={tmp_path / 'mlflow'}"])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = Ports(dashboard=taken.getsockname()[1], ray=free_ports(1)[0], metrics=free_ports(1)[0])
        with pytest.raises(ServingError, match=r"already taken by process \d+ .*--dashboard-port"):
            up(tmp_path / "up", settings, model="models:/pixellm@champion", ports=ports)
    assert not (tmp_path / "up").exists()


def test_every_port_is_looked_at_before_anything_starts(tmp_path: Path) -> None:
    settings = load_settings(None, [f"tracking.root={tmp_path / 'mlflow'}"])
    service, dashboard, ray, metrics = free_ports(4)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = Ports(service, taken.getsockname()[1], dashboard, ray, metrics)
        begun = time.time()
        with pytest.raises(ServingError, match="--mlflow-port"):
            up(tmp_path / "up", settings, model="models:/pixellm@champion", ports=ports)
    assert not (tmp_path / "up").exists()
    made = Path(tempfile.gettempdir()).glob("pixellm-ray-*")
    assert [folder for folder in made if folder.stat().st_mtime >= begun and not any(folder.iterdir())] == []


def test_a_service_goes_with_its_ray_and_mlflow_stays(tmp_path: Path) -> None:
    me = identify(os.getpid())
    assert me is not None
    alive, dead = (
        Part(me, "http://127.0.0.1:1"),
        Part(ProcessId(os.getpid(), "an-earlier-boot:1"), "http://127.0.0.1:1"),
    )
    for ray, service, expected in (
        (alive, alive, []),
        (alive, dead, ["service"]),
        (dead, alive, ["ray", "service"]),
    ):
        state = state_of({"ray": ray, "mlflow": alive, "service": service}, tmp_path)
        assert _missing(state) == expected
    assert _missing(state_of({}, tmp_path)) == ["ray", "mlflow", "service"]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def short_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="up-") as folder:
        yield Path(folder)


@pytest.mark.drill
@pytest.mark.timeout(600)
def test_up_status_and_down_for_real(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray, MLflow and the service of a tiny model come up, a killed part comes again alone, and nothing is left."""
    from pixellm import PixelLMConfig, PixelLMForConditionalGeneration
    from pixellm.jobs.train.build import build_processor

    settings = load_settings("tiny", [])
    model = short_folder / "model"
    PixelLMForConditionalGeneration(PixelLMConfig.from_preset("tiny")).save_pretrained(model)
    build_processor(settings).save_pretrained(model)
    service, mlflow, dashboard, ray, metrics = free_ports(5)
    state = short_folder / "up"

    def pixellm(*words: str, code: int = 0) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "pixellm.cli", *words, "--state", str(state)],
            cwd=short_folder,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout) if "--json" in words else done.stdout

    given = ["--model", str(model), "--port", str(service), "--mlflow-port", str(mlflow), "--num-cpus", "3"]
    given += ["--dashboard-port", str(dashboard), "--ray-port", str(ray), "--metrics-port", str(metrics), "--json"]
    first = pixellm("up", *given)
    ray_dir = Path(json.loads((state / STATE_FILE).read_text())["ray_dir"])
    mark = json.loads((state / STATE_FILE).read_text())["mark"]
    try:
        assert {part["state"] for part in first["parts"].values()} == {"running"}
        assert httpx.get(f"{first['parts']['service']['url']}/readyz").status_code == 200
        assert httpx.get(f"{first['parts']['mlflow']['url']}/health").text == "OK"
        assert "ray_node_mem_used" in httpx.get(f"http://127.0.0.1:{metrics}/metrics").text
        assert "pixellm_model_info" in httpx.get(f"{first['parts']['service']['url']}/metrics").text
        assert httpx.get(f"{first['parts']['ray']['url']}/api/jobs/").status_code == 401  # no token, no jobs
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(state / "ray_token"))
        listed = [sys.executable, "-m", "pixellm.cli", "jobs", "list", "--address", first["parts"]["ray"]["url"]]
        assert subprocess.run(listed, cwd=short_folder, check=False, timeout=120).returncode == 0

        os.kill(first["parts"]["mlflow"]["pid"], 9)
        wait_until(lambda: status(state).parts["mlflow"]["state"] == "ended")
        pixellm("status", code=1)
        again = pixellm("up", *given)
        pids = {name: (first["parts"][name]["pid"], part["pid"]) for name, part in again["parts"].items()}
        assert [name for name, (before, after) in pids.items() if before != after] == ["mlflow"]
        pixellm("status")
    finally:
        assert pixellm("down") == "down\n"
    assert not state.exists()
    assert not ray_dir.exists()
    assert [pid for pid in running_pids() if mark in command_and_environment(pid)] == []
    assert pixellm("down") == "nothing was up\n"


def running_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and identify(int(entry.name))]


def command_and_environment(pid: int) -> str:
    try:
        return "".join(
            (Path(f"/proc/{pid}") / name).read_bytes().decode(errors="replace") for name in ("cmdline", "environ")
        )
    except OSError:
        return ""
