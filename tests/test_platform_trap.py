"""The folder `platform/` at the root never hides the standard library's module of that name.

The fourth place, a Ray job, is in `tests/jobs/test_submit.py`, which has a cluster that takes jobs.
"""

import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
CODE = "import platform; print(platform.system())"


def test_from_the_repository_root() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == platform.system() != ""


def test_inside_pytest() -> None:
    assert platform.system() in ("Linux", "Darwin")
    assert Path(str(platform.__file__)).parent == Path(sysconfig.get_path("stdlib"))


def test_with_the_repository_root_first_on_the_path() -> None:
    code = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); import uuid, pixellm.platform.masks; {CODE}"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout.strip() == platform.system()


@pytest.mark.parametrize("name", ["uuid", "logging.handlers", "ctypes.util"])
def test_standard_modules_that_need_it_import_from_the_root(name: str) -> None:
    subprocess.run([sys.executable, "-c", f"import {name}"], cwd=REPOSITORY, check=True)
