"""Is this machine fit to run pixellm? Each check gives one row: ok, warn or fail, what was found, and what mends it.

The slow checks (starting Ray, writing to MLflow's store) run at the same time, each in a process of its own and with a
deadline, so that a broken part is a row and not a hang. Works from an installed wheel, outside the checkout.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import Version

from pixellm.errors import PixelLMError
from pixellm.platform.settings import TrackingSettings
from pixellm.platform.tracking import store_address
from pixellm.platform.version import checkout_folder, code_version, package_folder, read_build_file

Verdict = Literal["ok", "warn", "fail"]

_GIB = 2**30
_DEADLINE_S = 45.0  # a process that starts in 5 s on an idle machine; a loaded one may take longer and is still fit
_RAY_PROBE = """
import logging, os
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray
ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
print("answer", ray.get(ray.remote(lambda: 6 * 7).remote()))
"""
_MLFLOW_PROBE = """
import os, sys
os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"
from pixellm.platform.tracking import connect_store
client = connect_store(sys.argv[1])
if sys.argv[2] == "write":
    client.create_run(client.create_experiment("doctor"))
print("answer 42")
"""


@dataclass(frozen=True)
class Row:
    """One check: its verdict, what was found, and (unless ok) what mends it."""

    check: str
    verdict: Verdict
    found: str
    mend: str = ""


@dataclass(frozen=True)
class DoctorReport:
    """All checks, in the order they are printed."""

    rows: tuple[Row, ...]

    @property
    def is_healthy(self) -> bool:
        """Whether no check failed (warnings are allowed)."""
        return all(row.verdict != "fail" for row in self.rows)

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"is_healthy": self.is_healthy, "rows": [vars(row) for row in self.rows]}

    def to_text(self) -> str:
        """A table, one row per check, with the mend below what needs one."""
        width = max(len(row.check) for row in self.rows)
        lines = []
        for row in self.rows:
            lines.append(f"{row.verdict:<5}{row.check:<{width}}  {row.found}")
            if row.mend:
                lines.append(f"{'':<5}{'':<{width}}  → {row.mend}")
        return "\n".join(lines)


def diagnose(tracking: TrackingSettings | None = None) -> DoctorReport:
    """Runs all checks.

    Args:
        tracking: which MLflow store is tried; None: the one that commands use in this folder.
    """
    store = tracking or TrackingSettings()
    with ThreadPoolExecutor(max_workers=2) as pool:
        ray_row = pool.submit(_check_ray)
        store_row = pool.submit(_check_store, store)
        quick = [
            check_python(),
            _check_package(),
            *check_requirements(_requirements(), importlib.metadata.version),
            _check_platform_module(),
            _check_devices(),
            _check_compiler(),
            check_disk(shutil.disk_usage(_nearest_folder(Path(store.root))).free),
            check_memory(_memory_bytes()),
        ]
        return DoctorReport((*quick, ray_row.result(), store_row.result()))


def check_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> Row:
    """Python 3.11 or 3.12."""
    found = ".".join(map(str, version))
    if (3, 11) <= version[:2] < (3, 13):
        return Row("python", "ok", f"{found} ({sys.executable})")
    return Row("python", "fail", found, "make the environment with Python 3.11 or 3.12")


def check_requirements(requirements: list[str], installed: Callable[[str], str]) -> list[Row]:
    """Are the installed packages within the ranges that pixellm states?

    Args:
        requirements: as in a wheel's metadata ("torch>=2.13", "build; extra == 'dev'").
        installed: name → version; raises `PackageNotFoundError`.

    Returns:
        One row per package that is missing or out of range, or a single ok row.
    """
    problems, num_fit = [], 0
    for text in requirements:
        try:
            wanted = Requirement(text)
        except InvalidRequirement:
            continue
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        mend = f"pip install '{wanted.name}{wanted.specifier}'"
        try:
            version = installed(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(
                Row(wanted.name, "fail", f"not installed, wanted {wanted.specifier or 'any version'}", mend)
            )
            continue
        if wanted.specifier.contains(Version(version), prereleases=True):
            num_fit += 1
        else:
            problems.append(Row(wanted.name, "fail", f"{version}, wanted {wanted.specifier}", mend))
    if not requirements:
        return [Row("packages", "warn", "pixellm's metadata states no requirements", "install pixellm with pip")]
    return problems or [Row("packages", "ok", f"{num_fit} within their ranges")]


def check_disk(free_bytes: int) -> Row:
    """Room for shards, checkpoints and versions where runs are kept."""
    found = f"{free_bytes / _GIB:.1f} GiB free"
    if free_bytes < 1 * _GIB:
        return Row(
            "disk", "fail", found, "free some, or run in a folder on another disk (train.output_dir, tracking.root)"
        )
    if free_bytes < 5 * _GIB:
        return Row("disk", "warn", found, "enough for the demo; a real run keeps several checkpoints (train.keep_last)")
    return Row("disk", "ok", found)


def check_memory(total_bytes: int) -> Row:
    """Memory for Ray's object store and two training workers."""
    found = f"{total_bytes / _GIB:.1f} GiB"
    if total_bytes < 4 * _GIB:
        return Row(
            "memory", "warn", found, "the demo wants 4 GiB: train with --train.num_workers=1, close other programs"
        )
    return Row("memory", "ok", found)


def _check_package() -> Row:
    code = code_version()
    root = checkout_folder()
    place = f"checkout {root}" if root is not None else f"installed in {package_folder()}"
    commit = f", commit {code.commit[:12]}{' (modified)' if code.is_modified else ''}" if code.commit else ""
    return Row("pixellm", "ok", f"{code.version}, {place}{commit}")


def _requirements() -> list[str]:
    try:
        stated = importlib.metadata.requires("pixellm") or []
    except importlib.metadata.PackageNotFoundError:
        stated = []
    return stated or list(read_build_file().get("requires", []))


def _check_platform_module() -> Row:
    if hasattr(platform, "system"):
        return Row("import platform", "ok", f"the standard library's, {platform.system()} {platform.machine()}")
    where = getattr(platform, "__file__", None) or str(getattr(platform, "__path__", "?"))
    return Row("import platform", "fail", f"{where} hides the standard library's", "delete platform/__init__.py there")


def _check_devices() -> Row:
    import torch  # slow

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Row(
            "devices", "ok", f"{cores} CPU cores, {len(names)} GPU: {', '.join(names)}; torch {torch.__version__}"
        )
    if shutil.which("nvidia-smi") and "+cpu" in torch.__version__:
        return Row(
            "devices",
            "warn",
            f"{cores} CPU cores; there is an NVIDIA driver, but torch {torch.__version__} is a CPU build",
            "install torch from a CUDA index (TORCH_INDEX_URL=… make setup)",
        )
    return Row("devices", "ok", f"{cores} CPU cores, no GPU; torch {torch.__version__}")


def _check_compiler() -> Row:
    missing = [name for name, path in (("g++", shutil.which("g++")), ("ninja", _ninja())) if path is None]
    if not missing:
        return Row("compiler", "ok", "g++ and ninja, for DeepSpeed's communication op")
    return Row(
        "compiler",
        "fail",
        f"{' and '.join(missing)} not found; DeepSpeed compiles a communication op once",
        "apt-get install g++ (or your system's like), pip install ninja",
    )


def _ninja() -> str | None:
    beside_python = Path(sys.executable).parent / "ninja"
    return str(beside_python) if beside_python.is_file() else shutil.which("ninja")


def _check_ray() -> Row:
    answer = _run_probe([_RAY_PROBE])
    if answer.is_right:
        version = importlib.metadata.version("ray")
        return Row("ray", "ok", f"{version}: a local cluster starts and runs a task")
    mend = "look at /tmp/ray/session_latest/logs; is /tmp writable, is memory left?"
    return Row("ray", "warn" if answer.is_excused else "fail", answer.problem, mend)


def _check_store(tracking: TrackingSettings) -> Row:
    """Writes a run to a scratch SQLite file where a local store would be; a store elsewhere is only opened."""
    mend = "set tracking.root to a writable folder, or tracking.uri / MLFLOW_TRACKING_URI to a store that answers"
    try:
        address = store_address(tracking, make_folder=False)
    except PixelLMError as error:
        return Row("mlflow", "fail", str(error), mend)
    if not address.startswith("sqlite:///"):
        return _store_row(_run_probe([_MLFLOW_PROBE, address, "read"]), address, mend)
    wanted = Path(address.removeprefix("sqlite:///")).parent
    shown = f"SQLite beside the artifacts, in {wanted}"
    try:
        with tempfile.TemporaryDirectory(prefix=".pixellm-doctor-", dir=_nearest_folder(wanted)) as scratch:
            return _store_row(_run_probe([_MLFLOW_PROBE, f"sqlite:///{scratch}/mlflow.db", "write"]), shown, mend)
    except OSError as error:
        return Row("mlflow", "fail", f"{shown}: {error.strerror}", mend)


@dataclass(frozen=True)
class _Answer:
    """What a probe process said; `is_excused`: it was late, on a machine that is busy with other things."""

    problem: str = ""
    is_excused: bool = False

    @property
    def is_right(self) -> bool:
        return not self.problem


def _store_row(answer: _Answer, shown: str, mend: str) -> Row:
    if answer.is_right:
        return Row("mlflow", "ok", shown)
    return Row("mlflow", "warn" if answer.is_excused else "fail", f"{shown}: {answer.problem}", mend)


def _run_probe(arguments: list[str]) -> _Answer:
    """Runs a Python program that prints "answer 42" when all is well."""
    with tempfile.TemporaryDirectory(prefix="pixellm-doctor-") as scratch:  # nothing there that could be imported
        process = subprocess.Popen(
            [sys.executable, "-c", *arguments],
            cwd=scratch,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            out, err = process.communicate(timeout=_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.terminate()  # Ray ends its own processes on this signal
            try:
                process.wait(_DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()
            load = os.getloadavg()[0]
            busy = f" (the machine is busy: load {load:.0f})" if load > 2 * (os.cpu_count() or 1) else ""
            return _Answer(f"no answer within {_DEADLINE_S:g} s{busy}", bool(busy))
    if "answer 42" in out:
        return _Answer()
    lines = [line for line in err.splitlines() if line.strip()]
    return _Answer(lines[-1][:300] if lines else f"ended with exit code {process.returncode}")


def _nearest_folder(path: Path) -> Path:
    """The path itself or its nearest parent that exists."""
    path = path.absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def _memory_bytes() -> int:
    """Memory this process may use: the machine's, or its control group's limit."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total
