"""The code that a cluster runs, as a wheel: built from the checkout, or packed again from the installed files.

Ray installs a wheel given as `py_modules` with pip *and its dependencies* into a private folder, and names the upload
after the file name. So the wheel made here (1) states no dependencies: they are the cluster's image's, and installing
torch once per job is nobody's wish; (2) carries a digest of its contents as the build tag of its name, so that a
changed checkout of an unchanged version is not mistaken for the one uploaded before. The same input gives a
byte-identical file.
"""

import base64
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pixellm
from pixellm.errors import ClusterError
from pixellm.platform.version import BUILD_FILE, checkout_folder, code_version, package_folder, read_build_file

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip can hold
_BUILD_ENTRY = f"pixellm/{BUILD_FILE}"
_NOT_SHIPPED = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}
_BUILD_COMMAND = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


def build_wheel(out_dir: str | Path) -> Path:
    """Writes the wheel of the running code.

    Args:
        out_dir: folder to write to; made when absent.

    Returns:
        Path of `pixellm-VERSION-0DIGEST-py3-none-any.whl`.

    Raises:
        ClusterError: the wheel cannot be built; the last lines of the build say why.
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    root = checkout_folder()
    entries = _entries_of_installation() if root is None else _entries_of_checkout(root)
    return _write(entries, out)


def _entries_of_checkout(root: Path) -> dict[str, bytes]:
    """Builds in a copy, so that neither stale nor new build folders of the checkout matter; needs no network."""
    with tempfile.TemporaryDirectory(prefix="pixellm-wheel-") as scratch:
        stage, built = Path(scratch) / "source", Path(scratch) / "built"
        stage.mkdir()
        built.mkdir()
        ignore = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "*.egg-info")
        shutil.copytree(root / "pixellm", stage / "pixellm", symlinks=False, ignore=ignore)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(root / name, stage / name)
        done = subprocess.run(
            [sys.executable, "-c", _BUILD_COMMAND, str(built)], cwd=stage, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            reason = " / ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
            raise ClusterError(
                f"the wheel of {root} could not be built: {reason}; needed: pip install 'setuptools>=77'"
            )
        [wheel] = built.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return {name: archive.read(name) for name in archive.namelist() if not _is_left_out(name)}


def _entries_of_installation() -> dict[str, bytes]:
    home = package_folder().parent
    for distribution in importlib.metadata.distributions(name="pixellm", path=[str(home)]):
        files = distribution.files or []
        names = [str(file) for file in files if not str(file).startswith(("..", "/")) and not _is_left_out(str(file))]
        if _BUILD_ENTRY in names or "pixellm/__init__.py" in names:
            return {name: (home / name).read_bytes() for name in names}
    raise ClusterError(
        f"pixellm is imported from {home}, which is neither a checkout nor an installed wheel; pip install "
        "one of them and run again"
    )


def _is_left_out(name: str) -> bool:
    path = Path(name)
    is_installer_note = path.name in _NOT_SHIPPED and path.parent.name.endswith(".dist-info")
    return is_installer_note or path.suffix == ".pyc" or name == _BUILD_ENTRY or name.endswith("/")


def _write(entries: dict[str, bytes], out: Path) -> Path:
    [dist_info] = {name.split("/")[0] for name in entries if name.endswith(".dist-info/METADATA")}
    entries = dict(entries)
    metadata, requires = _without_requirements(entries[f"{dist_info}/METADATA"].decode())
    entries[f"{dist_info}/METADATA"] = metadata.encode()
    code = code_version()
    build: dict[str, object] = {
        "commit": code.commit,
        "is_modified": code.is_modified,
        "requires": requires or read_build_file().get("requires", []),
    }
    build["wheel_digest"] = digest = _digest(entries, build)
    entries[_BUILD_ENTRY] = json.dumps(build, indent=1).encode()
    wheel = out / f"pixellm-{pixellm.__version__}-0{digest[:16]}-py3-none-any.whl"
    unfinished = wheel.with_suffix(f".{os.getpid()}.part")
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as archive:
        record = [f"{name},sha256={_record_hash(content)},{len(content)}" for name, content in sorted(entries.items())]
        entries[f"{dist_info}/RECORD"] = "\n".join([*record, f"{dist_info}/RECORD,,", ""]).encode()
        for name, content in sorted(entries.items()):
            member = zipfile.ZipInfo(name, _EPOCH)
            member.external_attr = 0o644 << 16
            archive.writestr(member, content, zipfile.ZIP_DEFLATED)
    unfinished.rename(wheel)
    return wheel


def _without_requirements(metadata: str) -> tuple[str, list[str]]:
    header, separator, body = metadata.partition("\n\n")
    lines = header.splitlines()
    prefix = "Requires-Dist:"
    kept = [line for line in lines if not line.startswith(prefix)]
    required = [line.removeprefix(prefix).strip() for line in lines if line.startswith(prefix)]
    return "\n".join(kept) + separator + body, required


def _digest(entries: dict[str, bytes], build: dict[str, object]) -> str:
    total = hashlib.sha256(json.dumps(build, sort_keys=True).encode())
    for name, content in sorted(entries.items()):
        total.update(f"\0{name}\0".encode() + hashlib.sha256(content).digest())
    return total.hexdigest()


def _record_hash(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
