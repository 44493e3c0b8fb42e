"""The folder of a job that goes on where it was stopped: it says whose blocks it holds, and refuses another job's."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixellm.errors import ConfigError
from pixellm.platform import storage

PLAN_FILE = "plan.json"


def take_folder(folder: str | Path, identity: Mapping[str, Any], what: str, *, blocks: str) -> None:
    """Writes what decides the content of a folder into it, or checks that this job is the one that began it.

    Args:
        folder: path or URI.
        identity: name → plain value; the same job has the same.
        what: the kind of job with its article, for errors: "an evaluation".
        blocks: name of the folder inside that finished blocks are kept in.

    Raises:
        ConfigError: the folder holds another job, or blocks of which nobody knows what they are.
    """
    path = storage.join(folder, PLAN_FILE)
    if storage.list_names(storage.join(folder, blocks)):
        if not storage.exists(path):
            raise ConfigError(f"{folder} holds {blocks} without {PLAN_FILE}; choose another --out, or remove it")
        before = storage.read_json(path)
        different = [name for name in identity if before.get(name) != identity[name]]
        if different:
            raise ConfigError(
                f"{folder} holds {what} with another {', '.join(different)}; choose another --out, or remove it"
            )
        return
    storage.write_bytes(path, (json.dumps(identity, indent=1) + "\n").encode())


def model_digest(model_dir: Path | None) -> str:
    """Tells the files of a model apart by name, size, and the bytes at both ends; None has a digest as well."""
    stats = []
    if model_dir is not None:
        files = sorted(file for file in model_dir.rglob("*") if file.is_file())
        stats = [(str(file.relative_to(model_dir)), file.stat().st_size, _ends_digest(file)) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def _ends_digest(path: Path) -> str:
    """SHA-256 of the first and last MiB: a copy elsewhere is the same, and gigabytes of weights are not read."""
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(2**20))
        file.seek(max(0, path.stat().st_size - 2**20))
        digest.update(file.read())
    return digest.hexdigest()
