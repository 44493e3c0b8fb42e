"""How a model answers the questions of an evaluation: by itself, or with the words of the true answer given to it."""

from collections.abc import Sequence
from pathlib import Path

import torch

from pixellm.jobs.evaluate.questions import Question
from pixellm.jobs.evaluate.types import Answer
from pixellm.model.engine import PixelLMEngine
from pixellm.model.engine.types import GenerationOptions, SegmentRequest, TargetMask
from pixellm.model.modeling import PixelLMForConditionalGeneration
from pixellm.model.processing import PixelLMProcessor
from pixellm.platform.masks import Rle


class GeneratedAnswers:
    """The engine answers by itself, greedily: what a user gets."""

    def __init__(self, model_dir: Path, *, device: str = "cpu", max_new_tokens: int = 128, batch_size: int = 8) -> None:
        self._engine = PixelLMEngine.from_pretrained(model_dir, device=device, max_batch_size=batch_size)
        self._options = GenerationOptions(max_new_tokens=max_new_tokens)

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """One generated answer per question."""
        requests = [SegmentRequest(question.image, question.prompt, self._options) for question in questions]
        return [
            Answer(
                result.text,
                tuple(target.phrase for target in result.targets),
                tuple(target.mask for target in result.targets),
                is_ordered=False,
                rles=tuple(_packed(target) for target in result.targets),
            )
            for result in self._engine.segment_batch(requests)
        ]

    def close(self) -> None:
        """Stops the engine's threads."""
        self._engine.close()


class ForcedAnswers:
    """Teacher-forced: the true answer is given, only the masks are the model's. One forward per batch."""

    def __init__(self, model_dir: Path, *, device: str = "cpu") -> None:
        model = PixelLMForConditionalGeneration.from_pretrained(model_dir)
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
            answers.append(Answer(_with_numbers(question.answer), question.phrases, masks, is_ordered=True))
        return answers

    def close(self) -> None:
        """Nothing to let go of."""


def _packed(target: TargetMask) -> Rle:
    size, counts = target.rle["size"], target.rle["counts"]
    assert isinstance(size, list)
    assert isinstance(counts, str)
    return {"size": size, "counts": counts.encode()}


def _with_numbers(answer: str) -> str:
    first, *rest = answer.split("{seg}")
    return first + "".join(f"[{number}]{piece}" for number, piece in enumerate(rest, 1))
