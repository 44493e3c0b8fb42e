"""The registry as commands and jobs use it: register a trained model, list, show, promote, roll back."""

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image

import pixellm.platform.data
from pixellm.platform import registry
from pixellm.platform.gate import Gate
from pixellm.platform.registry import ModelVersion, Promotion
from pixellm.platform.settings import TrackingSettings
from pixellm.platform.tracking import RunReference, Tracker

_DEFAULT = TrackingSettings()
_GOLDEN_PHOTO, _GOLDEN_QUESTION = "000000196393.jpg", "Segment the cat, the bird and the bowl."
_LARGEST_CPU_WEIGHTS_BYTES = 4 * 2**30
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VersionList:
    """The versions of one registered model, newest first."""

    name: str
    versions: tuple[ModelVersion, ...]

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"name": self.name, "versions": [version.to_json_dict() for version in self.versions]}

    def to_text(self) -> str:
        """One line per version."""
        lines = [f"{self.name}: {len(self.versions)} version{'s' if len(self.versions) != 1 else ''}"]
        for version in self.versions:
            aliases = f" @{' @'.join(version.aliases)}" if version.aliases else ""
            own = replace(version, metrics={name: value for name, value in version.metrics.items() if "." not in name})
            lines.append(f"  {version.version:>4}  {_date(version)}  {_metrics(own)}{aliases}")
        return "\n".join(lines)


@dataclass(frozen=True)
class VersionReport:
    """One version, and the local folder of its files (None when they are gone or elsewhere)."""

    version: ModelVersion

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return self.version.to_json_dict()

    def to_text(self) -> str:
        """One fact per line."""
        version = self.version
        facts = {
            "reference": version.reference,
            "aliases": ", ".join(version.aliases) or "none",
            "metrics": _metrics(version),
            "registered": _date(version),
            "run": version.run_id or "none",
            "files": version.source,
        }
        return "\n".join(f"{name:<11}{value}" for name, value in facts.items())


@dataclass(frozen=True)
class PromotionReport:
    """What the gate said, and which version is champion now."""

    promotion: Promotion

    @property
    def passed(self) -> bool:
        """Whether the version is champion now."""
        return self.promotion.passed

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        promotion = self.promotion
        return {
            "passed": promotion.passed,
            "reason": promotion.reason,
            "version": promotion.candidate.to_json_dict(),
            "champion_before": promotion.champion_before,
            "champion_now": promotion.champion_now,
        }

    def to_text(self) -> str:
        """One sentence."""
        promotion = self.promotion
        if promotion.passed:
            return f"{promotion.candidate.reference} is champion: {promotion.reason}"
        return (
            f"{promotion.candidate.reference} was not promoted: {promotion.reason}; the champion stays "
            f"{'none' if promotion.champion_now is None else f'version {promotion.champion_now}'}"
        )


def register_model(
    model_dir: str | Path,
    run: Tracker | RunReference,
    metrics: Mapping[str, float],
    *,
    name: str = "pixellm",
    tags: Mapping[str, str] | None = None,
) -> ModelVersion:
    """Registers a model folder as a new version that answers questions by itself, with the alias `candidate`.

    A golden example is asked of it first and kept in the folder: a service asks it again before the version serves.

    Args:
        model_dir: what `from_pretrained` reads.
        run: the run that the model comes from.
        metrics: name → value; the gate reads them.
        name: registered model name.
        tags: further tags of the version.

    Raises:
        ModelLoadError: `model_dir` is not a model folder.
        TrackingError: the store refused.
    """
    _keep_golden_example(Path(model_dir))
    return registry.register_model(
        model_dir,
        run,
        metrics,
        python_model=Path(__file__).with_name("registered_model.py"),
        name=name,
        signature=_signature(),
        input_example=_input_example(),
        tags=tags,
    )


def list_versions(name: str, tracking: TrackingSettings = _DEFAULT) -> VersionList:
    """All versions of a registered model.

    Raises:
        TrackingError: there is no such model.
    """
    return VersionList(name, tuple(registry.list_versions(name, tracking)))


def show_version(reference: str, tracking: TrackingSettings = _DEFAULT) -> VersionReport:
    """One version.

    Raises:
        ModelLoadError, TrackingError: as `pixellm.platform.registry.look_up`.
    """
    return VersionReport(registry.look_up(reference, tracking))


def promote(
    reference: str,
    *,
    metric: str = "giou",
    floor: float = 0.0,
    max_regression: float = 0.02,
    gates: Sequence[Gate] = (),
    tracking: TrackingSettings = _DEFAULT,
) -> PromotionReport:
    """Moves `champion` to a version if it passes the gate.

    Args:
        reference: models:/NAME@alias or models:/NAME/VERSION.
        metric: the metric the gate looks at.
        floor: the least value that passes.
        max_regression: how far below the champion's value is still accepted.
        gates: conditions in the place of the three before; all must pass.
        tracking: which registry.

    Raises:
        ModelLoadError, TrackingError: as `pixellm.platform.registry.look_up`.
    """
    return PromotionReport(registry.promote(reference, gates or Gate(metric, floor, max_regression), tracking))


def rollback(name: str, tracking: TrackingSettings = _DEFAULT) -> VersionReport:
    """Gives `champion` back to the version that held it before.

    Raises:
        TrackingError: no such model, or nothing to go back to.
    """
    return VersionReport(registry.rollback(name, tracking))


def _keep_golden_example(folder: Path) -> None:
    """Asks the model about a photograph and keeps the answer; left out where loading it here would be reckless."""
    import torch  # slow, here and below

    from pixellm.model.engine import PixelLMEngine
    from pixellm.model.engine.golden_example import write_golden_example

    weights_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not weights_bytes or (device == "cpu" and weights_bytes > _LARGEST_CPU_WEIGHTS_BYTES):
        _log.warning("%s gets no golden example: its weights are absent or too large to load here", folder)
        return
    with PixelLMEngine.from_pretrained(folder, device=device, max_batch_size=1) as engine:
        write_golden_example(folder, engine, _golden_picture(), _GOLDEN_QUESTION)


def _golden_picture() -> bytes:
    photo = Path(pixellm.platform.data.__file__).parent / "demo" / "images" / _GOLDEN_PHOTO
    encoded = io.BytesIO()
    with Image.open(photo) as image:
        image.resize((image.width // 2, image.height // 2)).save(encoded, format="PNG")
    return encoded.getvalue()


def _signature() -> Any:
    from mlflow.models import ModelSignature  # slow
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array, Object, Property

    rle = Object([Property("size", Array(DataType.long)), Property("counts", DataType.string)])
    target = Object(
        [
            Property("index", DataType.long),
            Property("phrase", DataType.string),
            Property("score", DataType.double),
            Property("box", Array(DataType.double)),
            Property("area", DataType.long),
            Property("rle", rle),
        ]
    )
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image"), ColSpec(DataType.string, "prompt")]),
        outputs=Schema([ColSpec(DataType.string, "text"), ColSpec(Array(target), "targets")]),
        params=ParamSchema(
            [ParamSpec("threshold", DataType.double, 0.5), ParamSpec("max_new_tokens", DataType.long, 256)]
        ),
    )


def _input_example() -> Any:
    import pandas as pd  # slow

    encoded = io.BytesIO()
    Image.new("RGB", (64, 48), (120, 160, 90)).save(encoded, format="PNG")
    return pd.DataFrame({"image": [encoded.getvalue()], "prompt": ["Segment the meadow."]})


def _metrics(version: ModelVersion) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in sorted(version.metrics.items())) or "no metrics"


def _date(version: ModelVersion) -> str:
    return datetime.fromtimestamp(version.created_ms / 1000, tz=UTC).strftime("%Y-%m-%d %H:%M UTC")
