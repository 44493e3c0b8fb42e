"""Asks the OSV database for known vulnerabilities of every pinned package, with pip-audit: `make audit`.

Exits with 0 when there are none, with 1 when there are, with 2 when pip-audit failed. Where the database cannot be
reached it says that nothing was audited and exits with 0, or with 3 under `--must-reach`, which a release wants.
pip-audit's own default, the index's JSON API, is not asked: behind a mirror without that API it skips every package and
reports none vulnerable.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parent.parent
UNREACHABLE = re.compile(
    r"ConnectionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError|Could not connect|50[234] Server"
)
OK, FOUND, FAILED, NOT_AUDITED = 0, 1, 2, 3


def pins() -> list[str]:
    """`name==version` of constraints.txt and of what the locks add to it."""
    found = {}
    for name in ("requirements.lock", "requirements-dev.lock", "constraints.txt"):
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        for package, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE):
            found[canonicalize_name(package)] = version
    return [f"{package}=={version}" for package, version in sorted(found.items())]


def verdict(returncode: int, stdout: str, stderr: str) -> tuple[int, str]:
    """What pip-audit's outcome means: an exit status and what to say."""
    if not stdout.strip():
        if returncode and UNREACHABLE.search(stderr):
            return NOT_AUDITED, "NOT AUDITED: the advisory database could not be reached"
        return FAILED, f"pip-audit failed with exit status {returncode}:\n{stderr}"
    packages = json.loads(stdout)["dependencies"]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    if skipped:
        return FAILED, "pip-audit skipped " + ", ".join(skipped)
    found = [
        f"{package['name']} {package['version']}: {', '.join([vulnerability['id'], *vulnerability['aliases']])}; "
        f"mended in {', '.join(vulnerability['fix_versions']) or 'no version yet'}"
        for package in packages
        for vulnerability in package["vulns"]
    ]
    if found:
        return FOUND, "\n".join([*found, f"{len(found)} known vulnerabilities in {len(packages)} packages"])
    if returncode:
        return FAILED, f"pip-audit failed with exit status {returncode}:\n{stderr}"
    return OK, f"no known vulnerability in {len(packages)} packages"


def main() -> None:
    """Audits; `--must-reach` and pip-audit's own options (`--ignore-vuln ID`) may follow."""
    options = [option for option in sys.argv[1:] if option != "--must-reach"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        requirements.write("\n".join(pins()))
        requirements.flush()
        command = [
            Path(sys.executable).with_name("pip-audit"),
            "--vulnerability-service",
            "osv",
            "--no-deps",
            "--disable-pip",
        ]
        command += ["--progress-spinner", "off", "--format", "json", "--requirement", requirements.name, *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    status, text = verdict(done.returncode, done.stdout, done.stderr)
    print(text)
    sys.exit(OK if status == NOT_AUDITED and "--must-reach" not in sys.argv else status)


if __name__ == "__main__":
    main()
