"""Reaching Ray, and the wheel that carries the code there."""

import json
import os
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import pixellm
from pixellm.errors import ClusterError, ConfigError
from pixellm.platform import cluster
from pixellm.platform.cluster import connect, is_local_host, probe, runtime_env
from pixellm.platform.settings import ClusterSettings
from pixellm.platform.version import checkout_folder, code_version
from pixellm.platform.wheel import build_wheel

REPOSITORY = Path(__file__).resolve().parents[2]


# Addresses


@pytest.fixture
def not_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no connection were open, whatever the suite's cluster does."""
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)


@pytest.mark.usefixtures("not_connected")
def test_an_address_where_nothing_listens_is_refused_within_seconds() -> None:
    with socket.socket() as taken:  # bound, not listening: nobody else can listen there either
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(ClusterError, match=f"{address}.*ray start"):
            connect(ClusterSettings(address=address))
    assert time.monotonic() - began < 60  # Ray by itself tries for more than ten minutes


@pytest.mark.usefixtures("not_connected")
@pytest.mark.parametrize(
    ("address", "said"),
    [("http://127.0.0.1:8265", "pixellm submit"), ("somewhere", "host:port"), ("host:port", "host:port")],
)
def test_an_address_of_another_kind_is_a_configuration_error(address: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        connect(ClusterSettings(address=address))


@pytest.mark.usefixtures("not_connected")
def test_the_recipes_address_goes_before_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "from-environment")
    with pytest.raises(ConfigError, match="from-environment"):
        connect()
    with pytest.raises(ConfigError, match="from-recipe"):
        connect(ClusterSettings(address="from-recipe"))


def test_a_machine_knows_its_own_names() -> None:
    assert all(is_local_host(name) for name in ("localhost", "127.0.0.1", "::1", socket.gethostname()))
    assert not is_local_host("192.0.2.254")  # reserved for documentation, nobody's
    assert not is_local_host("no-such-host.invalid")


def test_probe_accepts_what_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        probe("127.0.0.1", server.getsockname()[1], "test")


def test_connecting_twice_returns_the_same_cluster(ray_cluster: str) -> None:
    first, second = connect(), connect(ClusterSettings(num_cpus=1))
    assert first == second
    assert first.address == ray_cluster
    assert first.num_cpus == 4
    assert not first.is_ours
    assert first.dashboard_url is not None
    assert first.dashboard_url.startswith("http://")


def test_the_runtime_environment_ships_a_wheel_and_never_the_checkout() -> None:
    assert runtime_env(Path("/w/x.whl"), {"A": "1"}) == {"py_modules": ["/w/x.whl"], "env_vars": {"A": "1"}}
    assert runtime_env(None) == {}


def test_disconnect_without_a_connection_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: pytest.fail("shut down what was not ours"))
    cluster.disconnect()


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_every_tracked_python_file_of_the_packages_and_the_recipes(wheel: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "pixellm/*.py", "model", "platform", "jobs", "serve", "recipes"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    wanted = {
        name if name.startswith("pixellm/") else f"pixellm/{name}"
        for name in tracked
        if name.endswith((".py", ".yaml"))
    }
    present = {name for name in wanted if (REPOSITORY / name).is_file()}
    assert len(present) > 50
    assert present <= set(members(wheel))


def test_the_wheel_states_no_dependencies_since_ray_would_install_them_per_job(wheel: Path) -> None:
    files = members(wheel)
    [metadata] = [content.decode() for name, content in files.items() if name.endswith("METADATA")]
    assert "Requires-Dist" not in metadata
    assert f"Version: {pixellm.__version__}" in metadata
    build = json.loads(files["pixellm/build.json"])
    assert any(requirement.startswith("torch") for requirement in build["requires"])
    assert build["commit"] == code_version().commit


def test_the_name_of_the_wheel_changes_with_its_contents(wheel: Path) -> None:
    digest = json.loads(members(wheel)["pixellm/build.json"])["wheel_digest"]
    assert wheel.name == f"pixellm-{pixellm.__version__}-0{digest[:16]}-py3-none-any.whl"


_ELSEWHERE = """
import json, sys
from pathlib import Path
from pixellm.platform.version import checkout_folder, code_version, package_folder
from pixellm.platform.wheel import build_wheel
from pixellm.platform.settings import load_settings
load_settings("demo")
again = build_wheel(sys.argv[1])
code = code_version()
print(json.dumps([str(package_folder()), checkout_folder(), code.commit, code.wheel_digest, again.name]))
"""


def test_an_installed_wheel_knows_its_commit_and_packs_itself_again_byte_for_byte(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", installed, wheel],
        check=True,
    )
    done = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE, str(tmp_path / "again")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    folder, root, commit, digest, name = json.loads(done.stdout)
    assert folder == str(installed / "pixellm")
    assert root is None
    build = json.loads(members(wheel)["pixellm/build.json"])
    assert (commit, digest) == (build["commit"], build["wheel_digest"])
    assert name == wheel.name
    assert (tmp_path / "again" / name).read_bytes() == wheel.read_bytes()


def test_this_checkout_is_recognised_as_one() -> None:
    assert checkout_folder() == REPOSITORY
    assert code_version().wheel_digest is None


def test_a_build_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "checkout"
    (broken / "pixellm").mkdir(parents=True)
    (broken / "pyproject.toml").write_text("[project]\nname = 'pixellm'\nversion = 'no version'\n")
    for name in ("README.md", "LICENSE"):
        (broken / name).write_text("")
    monkeypatch.setattr("pixellm.platform.wheel.checkout_folder", lambda: broken)
    with pytest.raises(ClusterError, match="version"):
        build_wheel(tmp_path / "out")


_LOCAL = """
import ray
from pixellm.platform.cluster import connect, disconnect
from pixellm.platform.settings import ClusterSettings
info = connect(ClusterSettings(num_cpus=3), env_vars={"PIXELLM_TEST_MARK": "seen"})
assert info.is_ours and info.num_cpus == 3 and info.dashboard_url, info
task = ray.remote(lambda: __import__("os").environ["PIXELLM_TEST_MARK"])
print(ray.get(task.remote()))
disconnect()
assert not ray.is_initialized()
"""


def test_without_an_address_a_local_cluster_starts_quietly_and_ends_when_asked(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LOCAL],
        cwd=tmp_path,
        env=os.environ | {"RAY_ADDRESS": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert (done.returncode, done.stdout) == (0, "seen\n"), done.stderr
