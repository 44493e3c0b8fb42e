"""`PixelLMProcessor`: everything between a person's picture and words and the tensors that the network takes.

It owns the tokenizer with its codebook tokens, the image statistics (SAM's, on 0..255) and sizes, and is saved
beside the weights. Samples travel as numpy (`TrainingExample`, few bytes, picklable); `collate` makes the tensors.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from pixellm.errors import ConfigError, DataError, ModelLoadError
from pixellm.model import images
from pixellm.model.answers import AnswerReader
from pixellm.model.config import IMAGE_TOKEN_ID, PixelLMConfig
from pixellm.model.conversation import (
    GROUP_MARKER,
    Section,
    SectionKind,
    Turn,
    conversation_sections,
    merge_targets,
)
from pixellm.model.images import DEFAULT_MAX_IMAGE_PIXELS, PreparedImage
from pixellm.model.tokenization import (
    PlainTextEncoder,
    add_codebook_tokens,
    find_codebook_tokens,
    load_tiny_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAM_MEAN = (123.675, 116.28, 103.53)
SAM_STD = (58.395, 57.12, 57.375)
IGNORED_LABEL = -100
_SETTINGS_FILE = "preprocessor_config.json"


@dataclass(frozen=True)
class TrainingExample:
    """One picture with one conversation and its masks; numpy only, so that it pickles small.

    Attributes:
        pixels: uint8 [S, S, 3], zero-padded, not normalised.
        valid_hw: int64 [2], rows and columns of the canvas that hold the picture.
        original_hw: int64 [2], the picture's own size.
        input_ids: int64 [L], with `IMAGE_TOKEN_ID` at picture positions.
        labels: int64 [L], -100 where not supervised.
        masks: uint8 [M, m, m] of 0 and 1 on the padded canvas, or [M, H, W] at the picture's own size where the
            example was encoded without a mask size; in order of appearance in the answers.
        sample_id: where it comes from.
        kind: the group of sources it was drawn for.
    """

    pixels: np.ndarray
    valid_hw: np.ndarray
    original_hw: np.ndarray
    input_ids: np.ndarray
    labels: np.ndarray
    masks: np.ndarray
    sample_id: str = ""
    kind: str = ""


@dataclass(frozen=True)
class ParsedAnswer:
    """A generated answer in words.

    Attributes:
        text: the words, each complete group as `[k]`, k counting from 1.
        phrases: per complete group, the words that name its target (may be empty).
        dropped: what was left out because its group was malformed or unfinished, in words; None if nothing.
    """

    text: str
    phrases: tuple[str, ...]
    dropped: str | None = None


@dataclass
class PixelLMProcessor:
    """Turns pictures and words into the network's inputs, and mask logits back to the picture's own size.

    Attributes:
        tokenizer: a Hugging Face fast tokenizer that holds the codebook tokens.
        tokens_per_scale: N.
        num_scales: L.
        image_size: S, side of the square canvas in pixels.
        num_image_tokens: positions that a picture takes in the language model.
        max_text_tokens: longest conversation in tokens, picture positions not counted.
        max_image_pixels: larger pictures are refused before decoding.
        image_mean: per channel, on 0..255.
        image_std: per channel, on 0..255.
        merges_targets: examples have one mask for all that a question asks for.
    """

    tokenizer: "PreTrainedTokenizerBase"
    tokens_per_scale: int = 3
    num_scales: int = 2
    image_size: int = 448
    num_image_tokens: int = 256
    max_text_tokens: int = 512
    max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS
    image_mean: Sequence[float] = field(default=SAM_MEAN)
    image_std: Sequence[float] = field(default=SAM_STD)
    merges_targets: bool = False

    def __post_init__(self) -> None:
        self.token_ids = find_codebook_tokens(self.tokenizer, self.tokens_per_scale, self.num_scales)
        self._words = PlainTextEncoder(self.tokenizer)

    @classmethod
    def for_preset(cls, name: str, **overrides: Any) -> "PixelLMProcessor":
        """Builds the processor that fits `PixelLMConfig.from_preset(name, **overrides)`, with the shipped tokenizer.

        Raises:
            ConfigError: the preset's vocabulary is another tokenizer's (the 7B and 13B shapes use Llama's).
        """
        config = PixelLMConfig.from_preset(name, **overrides)
        tokenizer = load_tiny_tokenizer()
        ids = add_codebook_tokens(tokenizer, config.tokens_per_scale, config.num_scales)
        if ids.vocab_size != config.text_config.vocab_size:
            raise ConfigError(
                f"preset {name!r} has a vocabulary of {config.text_config.vocab_size}, the shipped tokenizer "
                f"{ids.vocab_size}: use PixelLMProcessor.for_config with the Llama tokenizer of your checkpoint"
            )
        return cls.for_config(config, tokenizer)

    @classmethod
    def for_config(cls, config: PixelLMConfig, tokenizer: "PreTrainedTokenizerBase") -> "PixelLMProcessor":
        """Builds the processor of a config around a tokenizer; adds codebook tokens that it lacks.

        Raises:
            ModelLoadError: the tokenizer's codebook ids are not the config's.
        """
        add_codebook_tokens(tokenizer, config.tokens_per_scale, config.num_scales)
        processor = cls(
            tokenizer,
            tokens_per_scale=config.tokens_per_scale,
            num_scales=config.num_scales,
            image_size=config.image_size,
            num_image_tokens=config.num_image_tokens,
            merges_targets=config.merges_targets,
        )
        processor.check_matches(config)
        return processor

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "PixelLMProcessor":
        """Reads a processor from a model folder.

        Raises:
            ModelLoadError: a file is missing or does not fit.
        """
        from transformers import AutoTokenizer  # slow import

        settings_path = Path(path) / _SETTINGS_FILE
        if not settings_path.is_file():
            raise ModelLoadError(f"{path} has no {_SETTINGS_FILE}; it is not a model folder that pixellm saved")
        try:
            settings = json.loads(settings_path.read_text(encoding="utf-8"))
            settings.pop("processor_class", None)
            json.loads((Path(path) / "tokenizer.json").read_text(encoding="utf-8"))
            tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
            return cls(tokenizer, **settings)
        except (OSError, ValueError, TypeError) as error:
            raise ModelLoadError(f"the processor in {path} cannot be read: {error}; save it again") from error

    def save_pretrained(self, path: str | Path) -> None:
        """Writes tokenizer files and `preprocessor_config.json` into a folder."""
        Path(path).mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(str(path))
        settings = {
            "processor_class": type(self).__name__,
            "tokens_per_scale": self.tokens_per_scale,
            "num_scales": self.num_scales,
            "image_size": self.image_size,
            "num_image_tokens": self.num_image_tokens,
            "max_text_tokens": self.max_text_tokens,
            "max_image_pixels": self.max_image_pixels,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "merges_targets": self.merges_targets,
        }
        (Path(path) / _SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def check_matches(self, config: PixelLMConfig) -> None:
        """Refuses a config that this processor does not fit: the commonest silent failure is masks of noise.

        Raises:
            ModelLoadError: naming each difference.
        """
        wanted = {
            "codebook_token_ids": list(config.codebook_token_ids or []),
            "im_start_id": config.im_start_id,
            "im_end_id": config.im_end_id,
            "image_size": config.image_size,
            "num_image_tokens": config.num_image_tokens,
        }
        got = {
            "codebook_token_ids": list(self.token_ids.codebook),
            "im_start_id": self.token_ids.im_start,
            "im_end_id": self.token_ids.im_end,
            "image_size": self.image_size,
            "num_image_tokens": self.num_image_tokens,
        }
        differences = [
            f"{name}: tokenizer/processor {got[name]}, config {wanted[name]}"
            for name in wanted
            if got[name] != wanted[name]
        ]
        if self.token_ids.vocab_size > config.text_config.vocab_size:
            differences.append(
                f"vocabulary: tokenizer {self.token_ids.vocab_size}, embedding rows {config.text_config.vocab_size}"
            )
        if differences:
            raise ModelLoadError(
                "tokenizer and model do not belong together: " + "; ".join(differences) + "; load the processor that "
                "was saved with these weights"
            )

    def prepare_image(self, image: Image.Image | bytes) -> PreparedImage:
        """Decodes a picture and lays it on the canvas; see `images.prepare_image`.

        Raises:
            DataError: not a picture, damaged, or above `max_image_pixels`.
        """
        return images.prepare_image(image, self.image_size, max_pixels=self.max_image_pixels)

    def prepare_training_image(self, image: Image.Image | bytes) -> PreparedImage:
        """Likewise, faster and equal up to rounding; see `images.prepare_training_image`."""
        return images.prepare_training_image(image, self.image_size, max_pixels=self.max_image_pixels)

    def normalise(self, pixels_ISSC: np.ndarray | torch.Tensor, valid_hw: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Normalises pictures; the padding becomes exactly zero, as released.

        Args:
            pixels_ISSC: uint8 [I, S, S, 3].
            valid_hw: [I, 2] rows and columns that hold the picture.

        Returns:
            float32 [I, 3, S, S] on the device of the pixels.
        """
        pixels = torch.as_tensor(pixels_ISSC)
        valid = torch.as_tensor(valid_hw)
        mean = torch.tensor(self.image_mean, dtype=torch.float32, device=pixels.device)[:, None, None]
        std = torch.tensor(self.image_std, dtype=torch.float32, device=pixels.device)[:, None, None]
        values = pixels.permute(0, 3, 1, 2).contiguous().float().sub_(mean).div_(std)
        for picture, (rows, columns) in zip(values, valid.tolist(), strict=True):
            picture[:, rows:] = 0.0
            picture[:, :, columns:] = 0.0
        return values

    def encode_prompt(self, question: str | Sequence[Turn]) -> list[int]:
        """Tokenizes a question about a picture, up to and including `ASSISTANT:`.

        Args:
            question: the user's words, or turns of which the last has no answer.

        Returns:
            Ids with `IMAGE_TOKEN_ID` × `num_image_tokens` between im_start and im_end.

        Raises:
            DataError: empty, or more text than `max_text_tokens`.
        """
        turns = [Turn(question)] if isinstance(question, str) else list(question)
        if turns and turns[-1].answer is not None:
            raise DataError("the last turn already has an answer; end with a question")
        input_ids, _ = self._encode(conversation_sections(turns))
        return input_ids

    def encode_dialogue(self, turns: Sequence[tuple[str, str, int]]) -> tuple[list[int], list[int]]:
        """Tokenizes a training dialogue.

        Args:
            turns: (question, answer with `{seg}` markers, number of targets) in order.

        Returns:
            (input_ids, labels), equally long; only answers and their `</s>` are supervised. Groups are never cut.

        Raises:
            DataError: markers and targets differ in number, or the text is over-long.
        """
        for index, (_, answer, num_targets) in enumerate(turns):
            markers = answer.count(GROUP_MARKER)
            if markers != num_targets:
                raise DataError(
                    f"answer {index + 1} has {markers} {GROUP_MARKER} markers for {num_targets} targets: {answer!r}"
                )
        return self._encode(conversation_sections([Turn(question, answer) for question, answer, _ in turns]))

    def merged(
        self, turns: Sequence[tuple[str, str, int]], masks: Sequence[np.ndarray]
    ) -> tuple[Sequence[tuple[str, str, int]], Sequence[np.ndarray]]:
        """Turns and masks as this model learns them; see `conversation.merge_targets`."""
        return merge_targets(turns, masks) if self.merges_targets else (turns, masks)

    def encode_sample(
        self,
        image_bytes: bytes | Image.Image,
        turns: Sequence[tuple[str, str, int]],
        masks: Sequence[np.ndarray],
        mask_size: int | None,
        sample_id: str = "",
        kind: str = "",
    ) -> TrainingExample:
        """Encodes one training sample.

        Args:
            image_bytes: the encoded picture.
            turns: as for `encode_dialogue`.
            masks: bool or uint8 [H, W] at the picture's own size, in order of appearance in the answers.
            mask_size: m, side of the mask canvas; None keeps the picture's own size.
            sample_id: where the sample comes from; named in errors.
            kind: the group of sources it was drawn for.

        Raises:
            DataError: a damaged picture, masks of another size or number, over-long text.
        """
        num_targets = sum(turn[2] for turn in turns)
        if num_targets != len(masks):
            raise DataError(f"sample {sample_id!r} has {len(masks)} masks for {num_targets} targets in its answers")
        prepared = self.prepare_image(image_bytes)
        for mask in masks:
            if mask.shape != prepared.original_hw:
                raise DataError(
                    f"sample {sample_id!r} has a mask of {mask.shape} for a picture of {prepared.original_hw} "
                    "(rows, columns); masks must have the picture's own size"
                )
        turns, masks = self.merged(turns, masks)
        input_ids, labels = self.encode_dialogue(turns)
        return TrainingExample(
            pixels=prepared.pixels,
            valid_hw=np.array(prepared.valid_hw, dtype=np.int64),
            original_hw=np.array(prepared.original_hw, dtype=np.int64),
            input_ids=np.array(input_ids, dtype=np.int64),
            labels=np.array(labels, dtype=np.int64),
            masks=_stack_masks(masks, mask_size, prepared.original_hw),
            sample_id=sample_id,
            kind=kind,
        )

    def collate(self, examples: Sequence[TrainingExample]) -> dict[str, Any]:
        """Makes one batch for the network's `forward`, padded right with the pad id.

        Args:
            examples: B of them, one picture each; all with masks on one canvas size, or all at their own sizes.

        Returns:
            input_ids, attention_mask, labels [B, L]; pixel_values [B, 3, S, S]; image_valid_hw [B, 2];
            image_index [B]; target_rows [M]; target_masks [M, m, m] float, or a list of [M_i, H_i, W_i] with
            original_hw [B, 2].
        """
        if not examples:
            raise DataError("collate got no examples; a batch needs at least one")
        length = max(len(example.input_ids) for example in examples)
        shape = (len(examples), length)
        input_ids = torch.full(shape, int(self.tokenizer.pad_token_id or 0), dtype=torch.long)
        labels = torch.full(shape, IGNORED_LABEL, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        for row, example in enumerate(examples):
            count = len(example.input_ids)
            input_ids[row, :count] = torch.from_numpy(example.input_ids)
            labels[row, :count] = torch.from_numpy(example.labels)
            attention_mask[row, :count] = 1
        valid_hw = torch.from_numpy(np.stack([example.valid_hw for example in examples]))
        counts = torch.tensor([len(example.masks) for example in examples])
        batch: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "pixel_values": self.normalise(np.stack([example.pixels for example in examples]), valid_hw),
            "image_valid_hw": valid_hw,
            "image_index": torch.arange(len(examples)),
            "target_rows": torch.repeat_interleave(torch.arange(len(examples)), counts),
        }
        masks = [torch.from_numpy(example.masks.astype(np.float32)) for example in examples]
        if len({mask.shape[1:] for mask in masks}) == 1 and masks[0].shape[1] == masks[0].shape[2]:
            return batch | {"target_masks": torch.cat(masks)}
        original_hw = torch.from_numpy(np.stack([example.original_hw for example in examples]))
        return batch | {"target_masks": masks, "original_hw": original_hw}

    def post_process(
        self, mask_logits_MHW: torch.Tensor, valid_hw: tuple[int, int], original_hw: tuple[int, int]
    ) -> torch.Tensor:
        """Brings mask logits to the picture's own size: [M, h, w] → fp32 [M, H, W]; a target is where they are > 0."""
        return images.logits_at_original_size(mask_logits_MHW, self.image_size, valid_hw, original_hw)

    def parse_answer(self, token_ids: Sequence[int], question: str = "") -> ParsedAnswer:
        """Reads generated ids: words with a marker per complete group, and a phrase per target.

        Args:
            token_ids: the answer; reading stops at eos. Codebook tokens that do not stand in a complete group are
                dropped and reported.
            question: names a target that the answer itself does not name.
        """
        reader = AnswerReader(self.tokenizer, question)
        codebook, group_size = list(self.token_ids.codebook), len(self.token_ids.codebook)
        position, num_dropped = 0, 0
        while position < len(token_ids) and token_ids[position] != self.tokenizer.eos_token_id:
            if list(token_ids[position : position + group_size]) == codebook:
                reader.add_group()
                position += group_size
                continue
            if token_ids[position] in codebook:
                num_dropped += 1
            elif token_ids[position] >= 0:
                reader.add_token(int(token_ids[position]))
            position += 1
        reader.finish()
        dropped = f"{num_dropped} codebook tokens outside a complete group of {group_size}" if num_dropped else None
        return ParsedAnswer(reader.text.strip(), tuple(reader.phrases), dropped)

    def _encode(self, sections: Sequence[Section]) -> tuple[list[int], list[int]]:
        input_ids: list[int] = []
        labels: list[int] = []
        for section in sections:
            ids = self._section_ids(section)
            input_ids += ids
            labels += ids if section.is_supervised else [IGNORED_LABEL] * len(ids)
        num_text_tokens = len(input_ids) - self.num_image_tokens
        if num_text_tokens > self.max_text_tokens:
            raise DataError(
                f"the conversation has {num_text_tokens} text tokens, the limit is {self.max_text_tokens} "
                "(max_text_tokens); shorten it"
            )
        return input_ids, labels

    def _section_ids(self, section: Section) -> list[int]:
        if section.kind is SectionKind.WORDS:
            return self._words.encode(section.text)
        if section.kind is SectionKind.GROUP:
            return list(self.token_ids.codebook)
        if section.kind is SectionKind.PICTURE:
            return [self.token_ids.im_start, *[IMAGE_TOKEN_ID] * self.num_image_tokens, self.token_ids.im_end]
        token_id = self.tokenizer.bos_token_id if section.kind is SectionKind.START else self.tokenizer.eos_token_id
        return [] if token_id is None else [int(token_id)]


def _stack_masks(masks: Sequence[np.ndarray], mask_size: int | None, original_hw: tuple[int, int]) -> np.ndarray:
    if mask_size is None:
        resized, shape = [(mask != 0).astype(np.uint8) for mask in masks], original_hw
    else:
        resized, shape = [images.mask_on_canvas(mask, mask_size) for mask in masks], (mask_size, mask_size)
    return np.stack(resized) if resized else np.zeros((0, *shape), dtype=np.uint8)
