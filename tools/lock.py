"""Writes the lock files with uv: the pins of constraints.txt with the hash of every file that the package index has.

`requirements.lock` is what runs (the dependencies and the extra `tracking`), `requirements-dev.lock` what the extra
`dev` adds, `tools/release.lock` the tools of a release. The hashes are those of all platforms' files; which packages
are in was resolved for the machine that ran this (Linux, CPython 3.11). Run by `make lock` with the Python that has uv.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
WITHOUT_TORCH = """\
# torch is not here: PyPI's build, the CPU build and each CUDA build are different files of different indexes.
# It is installed after these, at the version of constraints.txt; it and what it brings (CUDA) have no hash here.
"""


def compile_lock(output: str, *options: str, head: str = "") -> None:
    """Lets uv resolve and hash; `head` is put above what it wrote."""
    path = REPOSITORY / output
    before = (path.read_text(encoding="utf-8"), path.stat()) if path.exists() else None
    command = [Path(sys.executable).with_name("uv"), "pip", "compile", "--quiet", "--python", sys.executable]
    command += ["--config-file", "tools/uv.toml", "--no-annotate", "--generate-hashes"]
    command += ["--custom-compile-command", "make lock", "--output-file", output, *options]
    done = subprocess.run(command, cwd=REPOSITORY, check=False)
    if done.returncode:
        sys.exit(f"uv could not write {output}; where it names two versions, mend constraints.txt")
    text = head + path.read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8")
    if before is not None and before[0] == text:  # nothing for make to do again
        os.utime(path, ns=(before[1].st_atime_ns, before[1].st_mtime_ns))


def locked_names(lock: str) -> list[str]:
    """The packages of a lock file."""
    return re.findall(r"^([a-z0-9-]+)==", (REPOSITORY / lock).read_text(encoding="utf-8"), re.MULTILINE)


def main() -> None:
    """Writes the three files."""
    pinned = ["pyproject.toml", "--constraint", "constraints.txt", "--no-emit-package", "torch"]
    compile_lock("requirements.lock", *pinned, "--extra", "tracking", head=WITHOUT_TORCH)
    runtime = [option for name in locked_names("requirements.lock") for option in ("--no-emit-package", name)]
    compile_lock("requirements-dev.lock", *pinned, "--extra", "dev", *runtime, head=WITHOUT_TORCH)
    compile_lock("tools/release.lock", "tools/release.in")


if __name__ == "__main__":
    main()
