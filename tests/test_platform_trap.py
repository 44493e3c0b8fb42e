"""The folder `platform/` at the root never hides the standard library's module of that name."""

import platform
import shutil
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


def test_inside_a_ray_job_whose_working_directory_has_our_layout(ray_cluster: str, tmp_path: Path) -> None:
    from pixellm.jobs.job_client import JobHandle, open_client, submit_job
    from pixellm.platform.cluster import connect

    for name in ("model", "platform", "jobs", "serve"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=lambda _, names: [n for n in names if "." in n])
        (tmp_path / name / "here.py").write_text("")
    url = connect().dashboard_url
    assert url is not None
    client = open_client(url)
    entrypoint = f'{sys.executable} -c "{CODE}"'
    job = JobHandle(client, submit_job(client, entrypoint=entrypoint, runtime_env={"working_dir": str(tmp_path)}))
    assert job.wait(timeout_s=240) == 0, job.logs()
    assert platform.system() in job.logs().splitlines(), job.logs()


@pytest.mark.parametrize("name", ["uuid", "logging.handlers", "ctypes.util"])
def test_standard_modules_that_need_it_import_from_the_root(name: str) -> None:
    subprocess.run([sys.executable, "-c", f"import {name}"], cwd=REPOSITORY, check=True)
