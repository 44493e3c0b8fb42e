"""Where the deployment files are, and helper modules of this folder."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # for `from kustomize import …`


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def pins(repository: Path) -> dict[str, str]:
    """Package → version, of constraints.txt."""
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)
