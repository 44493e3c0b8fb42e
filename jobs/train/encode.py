"""From a row and the dialogue composed about it to what the network trains on; runs in the reading tasks."""

from dataclasses import dataclass

from pixellm.model.processing import PixelLMProcessor, TrainingExample
from pixellm.platform.data.compose import Dialogue
from pixellm.platform.data.order import Draw
from pixellm.platform.data.schema import Row
from pixellm.platform.masks import rle_decode


@dataclass(frozen=True)
class SampleEncoder:
    """Encodes samples with a processor. Picklable: reading tasks on other machines get it by value.

    Attributes:
        processor: of the model that is trained.
        mask_size: side of the square canvas that training masks live on, in pixels.
    """

    processor: PixelLMProcessor
    mask_size: int

    def __call__(self, row: Row, dialogue: Dialogue, draw: Draw) -> TrainingExample:
        """Encodes one sample; its targets come in the order of the `{seg}` markers.

        Raises:
            DataError: a damaged picture, or more text than the processor takes.
        """
        del draw  # the composed dialogue already holds what was random
        return self.processor.encode_sample(
            row.image,
            [(turn.question, turn.answer, len(turn.target_indices)) for turn in dialogue.turns],
            [rle_decode(row.targets[index].mask) for index in dialogue.target_indices],
            self.mask_size,
            sample_id=f"{row.source}/{row.image_id}",
            kind=dialogue.kind,
        )
