"""Which model is served: a reference pinned to one version, with where it comes from in the registry."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pixellm.errors import ModelLoadError
from pixellm.platform import registry
from pixellm.platform.settings import TrackingSettings


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One served version.

    Attributes:
        id: the name that requests give as `model`: the registered name, or the folder's.
        version: registry version as text, or "folder" for a model that is in no registry.
        reference: what replicas resolve: `models:/NAME/VERSION` (never an alias, which may move between two replicas'
            starts) or the folder's absolute path.
        requested: the reference as it was given.
        created_s: when it was registered (or the folder written), Unix seconds.
        lineage: registry name, version, aliases, run id and metrics; empty for a folder.
    """

    id: str
    version: str
    reference: str
    requested: str
    created_s: int
    lineage: dict[str, Any] = field(default_factory=dict)

    def answers_to(self, name: str | None) -> bool:
        """Whether a request's `model` field means this model; None means whatever is served."""
        return name is None or name in {self.id, self.reference, self.requested, f"{self.id}/{self.version}"}

    def to_json_dict(self) -> dict[str, Any]:
        """The entry of `GET /v1/models`: OpenAI's model object with version and lineage."""
        return {
            "id": self.id,
            "object": "model",
            "created": self.created_s,
            "owned_by": "pixellm",
            "version": self.version,
            "reference": self.reference if self.lineage else self.id,
            "lineage": self.lineage,
        }


def pin(reference: str | Path, tracking: TrackingSettings) -> ModelCard:
    """Looks a reference up once, and checks that its files are there.

    Raises:
        ModelLoadError: no such folder, alias or version, or its weights are not safetensors (a pickle runs code).
        TrackingError: the registry cannot be opened or has no such model.
    """
    text = str(reference)
    if not text.startswith("models:"):
        folder = registry.resolve(text, tracking)
        _require_safetensors(folder, text)
        created_s = int((folder / "config.json").stat().st_mtime)
        return ModelCard(folder.name, "folder", str(folder), text, created_s)
    found = registry.look_up(text, tracking)
    _require_safetensors(registry.resolve(found.reference, tracking), text)
    lineage = {
        "name": found.name,
        "version": found.version,
        "aliases": list(found.aliases),
        "run_id": found.run_id,
        "metrics": dict(found.metrics),
    }
    created_s = int(found.created_ms / 1000) or int(time.time())
    return ModelCard(found.name, str(found.version), found.reference, text, created_s, lineage)


def _require_safetensors(folder: Path, reference: str) -> None:
    if not any(folder.glob("*.safetensors")):
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ModelLoadError(
            f"{reference} has no weights as safetensors, and pickled ones are never loaded; the folder holds {found}; "
            "save it with save_pretrained and register it again"
        )
