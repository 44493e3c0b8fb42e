"""LISA_rec (paper Sec. 5.2): a LLaVA names the targets of a question, then LISA segments them one by one."""

import re
from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch

from pixellm.model.baselines import pictures
from pixellm.model.baselines.text_prompted import load_part, load_tokenizer
from pixellm.model.images import open_rgb
from pixellm.model.segmentation import Picture, Segmentation, Segmenter, listed, merged

LISA_REC = "pixellm-lisa-rec"
NOUNS_PROMPT = "{question}, Please only use noun phrases in answer"
"""The paper's prompt of the first step."""
ONE_PROMPT = "Please segment {phrase}."
_SEPARATOR = re.compile(r"(?:^|\n)\s*(?:\d+[.)]|[-*•])\s+|\s*(?:[,;\n]|\.(?:\s|$)|\band\b)\s*")
_MARKER = re.compile(r"\s*\[\d+\]")
_DETERMINED = re.compile(r"(?:the|an?|this|that|these|those|all|my|your|his|her|its|their)\b", re.IGNORECASE)


class LisaRecSegmenter:
    """Two models in a row; both answer all questions together."""

    def __init__(self, language: Segmenter, lisa: Segmenter) -> None:
        """Takes both over.

        Args:
            language: names targets in words; its masks, if any, are not used.
            lisa: segments one phrase at a time.
        """
        self._language, self._lisa = language, lisa

    def segment_many(self, questions: Sequence[tuple[Picture, str]]) -> list[Segmentation]:
        """One answer per pair: the phrases that got a mask, each with it."""
        named = self._language.segment_many([(picture, nouns_question(question)) for picture, question in questions])
        asked = [(place, phrase) for place, answer in enumerate(named) for phrase in noun_phrases(answer.text)]
        single = self._lisa.segment_many([(questions[place][0], one_question(phrase)) for place, phrase in asked])
        found: list[list[tuple[str, Any]]] = [[] for _ in questions]
        for (place, phrase), answer in zip(asked, single, strict=True):
            found[place] += [(phrase, mask) for mask in merged(answer.text, answer.masks).masks]
        return [listed(pairs) for pairs in found]

    def close(self) -> None:
        """Closes both models."""
        self._language.close()
        self._lisa.close()


class LlavaWords:
    """A LLaVA-1.5 from transformers (`llava-hf/llava-1.5-13b-hf`), which answers in words only."""

    def __init__(self, path: str | PathLike[str], device: str = "cpu", *, max_new_tokens: int = 128) -> None:
        """Loads a Hugging Face folder with its tokenizer."""
        from transformers import LlavaForConditionalGeneration  # slow import

        self._model: Any = load_part(LlavaForConditionalGeneration, path, device)
        self._tokenizer = load_tokenizer(path)
        self._device, self._max_new_tokens = device, max_new_tokens

    @torch.inference_mode()
    def segment_many(self, questions: Sequence[tuple[Picture, str]]) -> list[Segmentation]:
        """Answers without masks, one after another."""
        return [Segmentation(self._words(picture, question), (), ()) for picture, question in questions]

    def close(self) -> None:
        """Nothing to let go of."""

    def _words(self, picture: Picture, question: str) -> str:
        vision = self._model.config.vision_config
        pixels = pictures.centre_square(open_rgb(picture), vision.image_size, pictures.CLIP).to(self._device)
        before, after = (
            self._tokenizer(text, add_special_tokens=is_first, return_tensors="pt").input_ids[0]
            for text, is_first in (("USER: ", True), (f"\n{question} ASSISTANT:", False))
        )
        image = before.new_full(((vision.image_size // vision.patch_size) ** 2,), self._model.config.image_token_id)
        ids = torch.cat([before, image, after])[None].to(self._device)
        output = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels.to(self._model.dtype),
            max_new_tokens=self._max_new_tokens,
            do_sample=False,
        )
        return str(self._tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def nouns_question(question: str) -> str:
    """The paper's prompt for the first step."""
    return NOUNS_PROMPT.format(question=question)


def one_question(phrase: str) -> str:
    """What LISA is asked for one phrase."""
    return ONE_PROMPT.format(phrase=phrase if _DETERMINED.match(phrase) else f"the {phrase}")


def noun_phrases(text: str) -> list[str]:
    """The phrases of an answer such as "the cat, a red ball and the dog.", each once, in order."""
    pieces = (piece.strip(" .:!?\"'") for piece in _SEPARATOR.split(_MARKER.sub("", text)))
    return list(dict.fromkeys(piece for piece in pieces if piece))
