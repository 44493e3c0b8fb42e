"""Which code is running: version, git commit and wheel digest, from a checkout or from an installed wheel.

A checkout asks git. A wheel built by `pixellm.platform.wheel` carries `pixellm/build.json`, written when it was built,
so that a job on a cluster still knows the commit it was submitted from.
"""

import json
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pixellm

BUILD_FILE = "build.json"


@dataclass(frozen=True)
class CodeVersion:
    """The identity of the running code. `wheel_digest` is the SHA-256 of the wheel's contents, None in a checkout."""

    version: str
    commit: str | None
    is_modified: bool
    wheel_digest: str | None


def package_folder() -> Path:
    """The folder of the imported `pixellm` package."""
    return Path(pixellm.__file__).resolve().parent


def checkout_folder() -> Path | None:
    """The root of the source checkout that `pixellm` is imported from; None when it is an installed wheel."""
    root = package_folder().parent
    project_file = root / "pyproject.toml"
    if not project_file.is_file():
        return None
    try:
        name = tomllib.loads(project_file.read_text(encoding="utf-8")).get("project", {}).get("name")
    except (OSError, tomllib.TOMLDecodeError):
        return None
    return root if name == "pixellm" else None


def code_version() -> CodeVersion:
    """Version, commit and digest of the running code; unknown parts are None."""
    root = checkout_folder()
    if root is not None:
        commit = _git(root, "rev-parse", "HEAD")
        is_modified = bool(commit and _git(root, "status", "--porcelain", "--untracked-files=no"))
        return CodeVersion(pixellm.__version__, commit, is_modified, None)
    build = read_build_file()
    return CodeVersion(
        pixellm.__version__, build.get("commit"), bool(build.get("is_modified")), build.get("wheel_digest")
    )


def read_build_file() -> dict[str, Any]:
    """What the wheel's builder wrote: commit, is_modified, wheel_digest, requires; empty in a checkout."""
    try:
        return json.loads((package_folder() / BUILD_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
