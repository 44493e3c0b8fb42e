"""Reading and writing sharded weights with bounded memory: one shard at a time in, one tensor at a time out.

Reads Hugging Face folders of `.safetensors` or `.bin` files (the latter with `weights_only`, so that a pickle cannot
run code). Writes safetensors directly, because serialising a whole shard at once would hold it twice.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pixellm.errors import ModelLoadError

Shapes = dict[str, tuple[int, ...]]

_NAMES = ("model.safetensors", "pytorch_model.bin")
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a folder.

    Attributes:
        folder: where they lie.
        files: their names, in order.
    """

    folder: Path
    files: tuple[str, ...]

    @classmethod
    def find(cls, folder: Path) -> "WeightFiles":
        """Finds a folder's weights: an index and its shards, or a single file.

        Raises:
            ModelLoadError: none, or an index that names a shard which is not there.
        """
        for name in _NAMES:
            index = folder / f"{name}.index.json"
            if index.is_file():
                files = tuple(sorted(set(json.loads(index.read_text())["weight_map"].values())))
                absent = [file for file in files if not (folder / file).is_file()]
                if absent:
                    raise ModelLoadError(f"{index} names {', '.join(absent)}, which the folder lacks; copy all shards")
                return cls(folder, files)
            if (folder / name).is_file():
                return cls(folder, (name,))
        raise ModelLoadError(f"{folder} holds no weights: wanted {' or '.join(_NAMES)}, single or with an index")

    def shapes(self) -> Shapes:
        """Shape of every tensor, read from headers only."""
        return {key: shape for file in self.files for key, shape in self.shapes_in(file).items()}

    def shapes_in(self, file: str) -> Shapes:
        """Shape of every tensor of one file, in the order in which `tensors` yields them."""
        return {key: shape for key, (shape, _) in self._header(file).items()}

    def dtypes_in(self, file: str) -> dict[str, torch.dtype]:
        """Dtype of every tensor of one file."""
        return {key: dtype for key, (_, dtype) in self._header(file).items()}

    def _header(self, file: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        path = self.folder / file
        if path.suffix == ".safetensors":
            by_name = {name: dtype for dtype, name in _DTYPES.items()}
            with _readable(path), safe_open(path, "pt") as stored:
                slices = {key: stored.get_slice(key) for key in stored.keys()}  # noqa: SIM118 (no mapping)
                return {key: (tuple(s.get_shape()), by_name[s.get_dtype()]) for key, s in slices.items()}
        return {key: (tuple(t.shape), t.dtype) for key, t in _load_bin(path, "meta").items()}

    def tensors(self, file: str) -> Iterator[tuple[str, Tensor]]:
        """Yields one file's tensors; of a safetensors file one at a time is in memory, of a `.bin` the file's pages.

        Raises:
            ModelLoadError: a file that is damaged or holds other things than tensors.
        """
        path = self.folder / file
        if path.suffix == ".safetensors":
            with _readable(path), safe_open(path, "pt") as stored:
                for key in stored.keys():  # noqa: SIM118 (no mapping)
                    yield key, stored.get_tensor(key)
            return
        state_dict = _load_bin(path, "cpu")
        for key in list(state_dict):
            yield key, state_dict.pop(key)

    def all_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every tensor, file by file."""
        for file in self.files:
            yield from self.tensors(file)


def write_shard(
    path: Path, shapes: Shapes, dtypes: dict[str, torch.dtype], tensors: Iterable[tuple[str, Tensor]]
) -> int:
    """Writes one safetensors file, tensor by tensor.

    Args:
        path: file to write.
        shapes: of the tensors, in the order in which they come.
        dtypes: to store them in.
        tensors: exactly those, in that order.

    Returns:
        Bytes of weights written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * dtypes[name].itemsize
        header[name] = {"dtype": _DTYPES[dtypes[name]], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    order = iter(shapes)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in tensors:
            wanted = next(order, None)
            if name != wanted or tuple(tensor.shape) != tuple(shapes[name]):
                raise ModelLoadError(f"{path.name}: got {name} {list(tensor.shape)} where {wanted} was to be written")
            file.write(tensor.detach().to(dtypes[name]).contiguous().flatten().view(torch.uint8).numpy().data)
    if (left := next(order, None)) is not None:
        raise ModelLoadError(f"{path.name}: {left} was to be written and never came")
    return offset


def write_index(folder: Path, weight_map: dict[str, str], total_size: int) -> None:
    """Writes `model.safetensors.index.json`: which file holds which tensor."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _load_bin(path: Path, device: str) -> dict[str, Tensor]:
    """A `.bin` as tensors: mapped, not read, where its format allows; on `meta`, shapes alone."""
    with _readable(path):
        try:
            state_dict = torch.load(path, map_location=device, weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            state_dict = torch.load(path, map_location=device, weights_only=True)
    if not isinstance(state_dict, dict) or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise ModelLoadError(f"{path} is no state dict: wanted a dict of tensors")
    return state_dict


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ModelLoadError(f"{path} cannot be read as weights: {error}; copy or download it again") from error
