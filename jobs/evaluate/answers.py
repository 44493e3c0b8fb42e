"""How a model answers the questions of an evaluation: by itself, or with the words of the true answer given to it."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch

from pixellm.errors import ConfigError
from pixellm.jobs.evaluate.questions import Question
from pixellm.jobs.evaluate.types import Answer
from pixellm.model.conversation import MERGED_ANSWER
from pixellm.model.networks import NETWORKS, load_network, model_type_of
from pixellm.model.processing import PixelLMProcessor
from pixellm.model.segmenter import open_segmenter
from pixellm.platform.masks import Rle


class GeneratedAnswers:
    """The model answers by itself, greedily: what a user gets. PixelLM or a baseline, as the folder says."""

    def __init__(self, model_dir: Path, *, device: str = "cpu", max_new_tokens: int = 128, batch_size: int = 8) -> None:
        self._segmenter = open_segmenter(model_dir, device=device, batch_size=batch_size, max_new_tokens=max_new_tokens)

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """One generated answer per question."""
        answers = self._segmenter.segment_many([(question.image, question.prompt) for question in questions])
        return [
            Answer(
                answer.text,
                answer.phrases,
                answer.masks,
                is_ordered=False,
                rles=cast(tuple[Rle, ...] | None, answer.rles),
            )
            for answer in answers
        ]

    def close(self) -> None:
        """Lets go of the model."""
        self._segmenter.close()


class ForcedAnswers:
    """Teacher-forced: the true answer is given, only the masks are the model's. One forward per batch.

    Raises:
        ConfigError: a model that writes no answer of its own.
    """

    def __init__(self, model_dir: Path, *, device: str = "cpu") -> None:
        kind = model_type_of(model_dir)
        if kind and kind not in NETWORKS:
            raise ConfigError(f"{model_dir} ({kind}) cannot be given the words of an answer; use --mode generated")
        model = load_network(model_dir)
        self._model = model.to(device).eval()  # type: ignore[arg-type]
        self._processor = PixelLMProcessor.from_pretrained(model_dir)

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """The masks of the given answers, in the order of their markers."""
        examples = [
            self._processor.encode_sample(
                question.image,
                [(question.prompt, question.answer, len(question.masks))],
                question.masks,
                8,  # masks are scored at the picture's size; here they only count the groups
                sample_id=question.sample_id,
            )
            for question in questions
        ]
        batch = self._processor.collate(examples)
        names = ("input_ids", "attention_mask", "pixel_values", "image_valid_hw", "image_index", "target_rows")
        output = self._model(**{name: batch[name].to(self._model.device) for name in names})
        answers = []
        for row, (question, example) in enumerate(zip(questions, examples, strict=True)):
            logits = output.mask_logits[output.target_rows == row]
            valid, original = tuple(map(int, example.valid_hw)), tuple(map(int, example.original_hw))
            full = self._processor.post_process(logits.cpu(), valid, original)  # type: ignore[arg-type]
            masks = tuple((full > 0).numpy())
            text, phrases = question.answer, question.phrases
            if self._processor.merges_targets:
                text, phrases = MERGED_ANSWER, phrases and (" and ".join(phrases),)
            answers.append(Answer(_with_numbers(text), phrases, masks, is_ordered=True))
        return answers

    def close(self) -> None:
        """Nothing to let go of."""


def _with_numbers(answer: str) -> str:
    first, *rest = answer.split("{seg}")
    return first + "".join(f"[{number}]{piece}" for number, piece in enumerate(rest, 1))
