"""Putting a model folder together from weights of other models, with bounded memory.

`pixellm init` and `pixellm convert official` both stream shards of someone else's weights under our names, draw or
compute the parts that are new, and leave a folder that `from_pretrained` reads. It appears whole or not at all.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixellm.errors import ConfigError, ModelLoadError
from pixellm.model.config import PixelLMConfig
from pixellm.model.networks import meta_network, network_class
from pixellm.model.official import guess_vision_config, is_weight
from pixellm.model.weight_files import Shapes, WeightFiles, write_index, write_shard


@dataclass(frozen=True)
class AssemblyReport:
    """What was written.

    Attributes:
        path: the model folder.
        num_weights: tensors.
        num_parameters: numbers in them.
        size_bytes: of the weight files.
        num_files: weight files.
        unused: keys of the source that no result depends on, left out.
        has_tokenizer: whether tokenizer and processor lie beside the weights, so that the folder can be served.
    """

    path: str
    num_weights: int
    num_parameters: int
    size_bytes: int
    num_files: int
    unused: tuple[str, ...] = ()
    has_tokenizer: bool = False

    def to_json_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)

    def to_text(self) -> str:
        """What was written, and what is still missing before the folder can be served."""
        lines = [
            f"{self.path}: {self.num_parameters:,} parameters in {self.num_weights} weights, "
            f"{self.size_bytes / 2**20:,.1f} MiB in {self.num_files} files"
        ]
        if self.unused:
            lines.append(f"left out, because nothing depends on them: {', '.join(self.unused)}")
        if not self.has_tokenizer:
            lines.append("no tokenizer lies beside the weights; give --tokenizer FOLDER before serving it")
        return "\n".join(lines)


@dataclass
class ModelFolderWriter:
    """Writes weight files one after another, and knows what is still missing.

    Attributes:
        folder: an empty folder.
        config: of the model.
        wanted: shape of every weight of the model, by name.
        weight_map: file by name of every weight written so far.
        size_bytes: written so far.
    """

    folder: Path
    config: PixelLMConfig
    wanted: Shapes
    weight_map: dict[str, str] = field(default_factory=dict)
    size_bytes: int = 0

    def add(self, shapes: Shapes, dtypes: dict[str, torch.dtype], tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Writes the next file, if there is anything for it; arguments as of `write_shard`."""
        if not shapes:
            return
        name = f"model-{self.num_files + 1:05d}.safetensors"
        self.size_bytes += write_shard(self.folder / name, shapes, dtypes, tensors)
        self.weight_map |= dict.fromkeys(shapes, name)

    def add_all(self, tensors: dict[str, Tensor]) -> None:
        """Writes the next file from tensors in memory."""
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.add(shapes, {name: tensor.dtype for name, tensor in tensors.items()}, iter(tensors.items()))

    @property
    def num_files(self) -> int:
        """Weight files written so far."""
        return len(set(self.weight_map.values()))

    def finish(self, *, unused: tuple[str, ...] = (), has_tokenizer: bool = False) -> AssemblyReport:
        """Writes index and config.

        Raises:
            ModelLoadError: weights of the model that no file holds.
        """
        if absent := sorted(self.wanted.keys() - self.weight_map.keys()):
            raise ModelLoadError(f"no source gave {len(absent)} weights: {', '.join(absent)}")
        write_index(self.folder, self.weight_map, self.size_bytes)
        self.config.architectures = [network_class(self.config.model_type).__name__]
        self.config.save_pretrained(self.folder)
        return AssemblyReport(
            path=str(self.folder),
            num_weights=len(self.weight_map),
            num_parameters=sum(torch.Size(shape).numel() for shape in self.wanted.values()),
            size_bytes=self.size_bytes,
            num_files=self.num_files,
            unused=unused,
            has_tokenizer=has_tokenizer,
        )


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder beside `path` to fill, which takes its name when the block ends well, and vanishes when it does not.

    Raises:
        ConfigError: `path` exists and is not empty.
    """
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not empty; give a new folder")
    staging = target.with_name(f".{target.name}.{os.getpid()}.partial")
    staging.mkdir(parents=True)
    try:
        yield staging
        if target.exists():
            target.rmdir()
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def resolve_folder(path_or_id: str | os.PathLike[str]) -> Path:
    """A local folder as it is, or a Hugging Face model id downloaded to the cache.

    Raises:
        ModelLoadError: neither.
    """
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download  # slow import
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.model", "*.safetensors", "pytorch_model*.bin"]
    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelLoadError(
            f"{path_or_id} is neither a local folder nor a Hugging Face model that can be fetched: {error}"
        ) from error


def weight_shapes(config: PixelLMConfig) -> Shapes:
    """Shape of every weight that a model folder holds, by name."""
    return {name: tuple(t.shape) for name, t in meta_network(config).state_dict().items() if is_weight(name)}


def copy_file(
    writer: ModelFolderWriter,
    source: WeightFiles,
    file: str,
    names: Mapping[str, str],
    dtype: torch.dtype | None,
    change: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Writes one file's weights under our names.

    Args:
        writer: of the new folder.
        source: folder that the file lies in.
        file: its name.
        names: our name by source key; other keys are left out.
        dtype: to store in; None keeps each weight's own.
        change: makes the tensor to write from our name and the stored tensor.
    """
    kept = [key for key in source.shapes_in(file) if key in names]
    stored = source.dtypes_in(file)

    def renamed() -> Iterator[tuple[str, Tensor]]:
        for key, tensor in source.tensors(file):
            if key in names:
                yield names[key], change(names[key], tensor) if change else tensor

    shapes = {names[key]: writer.wanted[names[key]] for key in kept}
    writer.add(shapes, {names[key]: dtype or stored[key] for key in kept}, renamed())


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's `config.json`.

    Raises:
        ModelLoadError: absent or no JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}; copy the whole checkpoint folder") from error
    if not isinstance(config, dict):
        raise ModelLoadError(f"{path} is no JSON object")
    return config


def read_vision_config(folder: Path, shapes: Shapes) -> dict[str, Any]:
    """A CLIP folder's vision configuration, completed from the weights' shapes."""
    config = read_config(folder) if (folder / "config.json").is_file() else {}
    return guess_vision_config(shapes) | dict(config.get("vision_config") or config)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, or None where there are no tokenizer files."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    from transformers import AutoTokenizer  # slow import

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"the tokenizer in {folder} cannot be read: {error}") from error
