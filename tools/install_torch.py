"""Installs the pinned torch, and never gigabytes of CUDA libraries onto a machine without a GPU.

Asks pip first what it would install (`--dry-run --report`). Where that includes CUDA libraries and no NVIDIA driver is
found, it stops and says how to choose another source: TORCH_INDEX_URL.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"


def pinned_torch() -> str:
    """The `torch==X` line of constraints.txt."""
    match = re.search(r"^torch==\S+$", CONSTRAINTS.read_text(), re.MULTILINE)
    if match is None:
        sys.exit(f"{CONSTRAINTS} pins no torch; add a line torch==VERSION")
    return match.group()


def main() -> None:
    """Installs torch, or exits with 1 and the mend."""
    requirement = pinned_torch()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(CONSTRAINTS)]
    index = os.environ.get("TORCH_INDEX_URL", "")
    source = ["--index-url", index] if index else []
    report = subprocess.run(
        [*pip, "--dry-run", "--report", "-", *source, requirement], check=True, capture_output=True, text=True
    )
    names = [item["metadata"]["name"].lower() for item in json.loads(report.stdout)["install"]]
    cuda = [name for name in names if name.startswith(("nvidia-", "cuda-", "triton"))]
    if cuda and shutil.which("nvidia-smi") is None:
        sys.exit(
            f"{requirement} from the configured source would bring {len(cuda)} CUDA packages, and this machine has no "
            "NVIDIA driver. Set TORCH_INDEX_URL to PyTorch's CPU wheel index (its address is on pytorch.org under "
            "'Get Started', compute platform CPU) and run the command again: make demo TORCH_INDEX_URL=…"
        )
    subprocess.run([*pip, *source, requirement], check=True)


if __name__ == "__main__":
    main()
