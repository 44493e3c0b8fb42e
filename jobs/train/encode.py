"""From a row and the dialogue composed about it to what the network trains on; runs in the reading tasks.

Decoding and resizing a picture and its masks costs far more than the words. Each process keeps the last ones it made,
so that a picture that comes again soon (a small dataset, several questions in a row) is not decoded again.
"""

import zlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pixellm.errors import DataError
from pixellm.model.images import PreparedImage, mask_on_canvas
from pixellm.model.processing import PixelLMProcessor, TrainingExample
from pixellm.platform.data.compose import Dialogue
from pixellm.platform.data.order import Draw
from pixellm.platform.data.schema import Row
from pixellm.platform.masks import rle_decode

_CACHE_BYTES = 64 * 2**20


class SampleEncoder:
    """Encodes samples with a processor. Picklable: reading tasks on other machines get it by value, without its cache.

    Attributes:
        processor: of the model that is trained.
        mask_size: side of the square canvas that training masks live on, in pixels.
    """

    def __init__(self, processor: PixelLMProcessor, mask_size: int) -> None:
        self.processor = processor
        self.mask_size = mask_size
        self._recent = _ByteBoundCache(_CACHE_BYTES)

    def __reduce__(self) -> tuple[Any, ...]:
        return (SampleEncoder, (self.processor, self.mask_size))

    def __call__(self, row: Row, dialogue: Dialogue, draw: Draw) -> TrainingExample:
        """Encodes one sample; its targets come in the order of the `{seg}` markers.

        Raises:
            DataError: a damaged picture, a mask of another size, or more text than the processor takes.
        """
        del draw  # the composed dialogue already holds what was random
        sample_id = f"{row.source}/{row.image_id}"
        key = (sample_id, zlib.crc32(row.image))
        prepared: PreparedImage = self._recent.get(
            key, partial(self.processor.prepare_training_image, row.image), _picture_bytes
        )
        masks = [
            self._recent.get((*key, index), partial(self._mask, row, index, prepared), _mask_bytes)
            for index in dialogue.target_indices
        ]
        written = [(turn.question, turn.answer, len(turn.target_indices)) for turn in dialogue.turns]
        turns, merged = self.processor.merged(written, masks)
        input_ids, labels = self.processor.encode_dialogue(turns)
        shape = (self.mask_size, self.mask_size)
        return TrainingExample(
            pixels=prepared.pixels,
            valid_hw=np.array(prepared.valid_hw, dtype=np.int64),
            original_hw=np.array(prepared.original_hw, dtype=np.int64),
            input_ids=np.array(input_ids, dtype=np.int64),
            labels=np.array(labels, dtype=np.int64),
            masks=np.stack(merged) if merged else np.zeros((0, *shape), dtype=np.uint8),
            sample_id=sample_id,
            kind=dialogue.kind,
        )

    def _mask(self, row: Row, index: int, prepared: PreparedImage) -> npt.NDArray[np.uint8]:
        mask = rle_decode(row.targets[index].mask)
        if mask.shape != prepared.original_hw:
            raise DataError(
                f"{row.source}/{row.image_id} has a mask of {mask.shape} for a picture of {prepared.original_hw} "
                "(rows, columns); prepare the data again"
            )
        return mask_on_canvas(mask, self.mask_size)


class _ByteBoundCache:
    """Keeps what was used last, up to a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any], size_of: Callable[[Any], int]) -> Any:
        """The value of a key, made where it is not kept."""
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key][0]
        value = make()
        num_bytes = size_of(value)
        self._entries[key] = (value, num_bytes)
        self._num_bytes += num_bytes
        while self._num_bytes > self._max_bytes:
            _, (_, freed) = self._entries.popitem(last=False)
            self._num_bytes -= freed
        return value


def _picture_bytes(prepared: PreparedImage) -> int:
    return int(prepared.pixels.nbytes)


def _mask_bytes(mask: npt.NDArray[np.uint8]) -> int:
    return int(mask.nbytes)
