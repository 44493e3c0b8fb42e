"""Small changes of a question's wording while training, so that an answer does not hang on its exact letters.

A person writes "photo" for "picture", forgets the capital or the full stop, is polite, or slips on the keyboard. What
is asked for stays readable; answers are never changed.
"""

import re

import numpy as np

_PICTURE_WORDS = ("image", "picture", "photo", "photograph")
_POLITE_STARTS = ("Hi! ", "Hello, ", "Hey, ", "Okay: ", "Next: ", "Thanks. ")
_POLITE_ENDS = (" Thank you!", " Thanks.", " That would help me.")
_MIN_SLIP_LETTERS = 6


def vary(question: str, rng: np.random.Generator) -> str:
    """A question with one or two small changes; the same generator state gives the same ones."""
    changes = (_other_picture_word, _uncapitalised, _unpunctuated, _polite_start, _polite_end, _slip)
    chosen = rng.choice(len(changes), size=int(rng.integers(1, 3)), replace=False)
    for number in sorted(chosen):
        question = changes[number](question, rng)
    return question


def _other_picture_word(question: str, rng: np.random.Generator) -> str:
    word = _PICTURE_WORDS[int(rng.integers(len(_PICTURE_WORDS)))]
    return re.sub(rf"\b(this|the) ({'|'.join(_PICTURE_WORDS)})\b", rf"\1 {word}", question)


def _uncapitalised(question: str, rng: np.random.Generator) -> str:
    del rng
    return question[:1].lower() + question[1:]


def _unpunctuated(question: str, rng: np.random.Generator) -> str:
    del rng
    return question.rstrip(".?!")


def _polite_start(question: str, rng: np.random.Generator) -> str:
    return _POLITE_STARTS[int(rng.integers(len(_POLITE_STARTS)))] + question


def _polite_end(question: str, rng: np.random.Generator) -> str:
    return question + _POLITE_ENDS[int(rng.integers(len(_POLITE_ENDS)))]


def _slip(question: str, rng: np.random.Generator) -> str:
    """Two neighbouring letters inside one long word change places."""
    words = [match for match in re.finditer(r"[a-z]+", question) if len(match[0]) >= _MIN_SLIP_LETTERS]
    if not words:
        return question
    word = words[int(rng.integers(len(words)))]
    place = word.start() + int(rng.integers(1, len(word[0]) - 2))
    return question[:place] + question[place + 1] + question[place] + question[place + 2 :]
