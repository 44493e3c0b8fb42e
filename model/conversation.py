"""The conversation format, `llava_v1` style (reference.md, "Vocabulary and prompt"), as a list of sections.

A section is a run of plain words, or one control element: start, picture, group, end of an answer. Words and control
elements never share a string, which is why nothing that a user types can become a control element. White space around
a control element belongs to the tokenizer's own prefix space, so section texts are stripped.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from pixellm.errors import DataError

SYSTEM_PROMPT = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
GROUP_MARKER = "{seg}"
"""Stands for one group of codebook tokens in the answer of a training dialogue."""
MERGED_ANSWER = f"Sure, it is {GROUP_MARKER}."
"""The answer of a model that has one mask for all that is asked for."""

_NUMBERED_MARKER = re.compile(r"\[(\d+)\]")


class SectionKind(Enum):
    """What a section becomes when it is tokenized."""

    START = "start"
    WORDS = "words"
    PICTURE = "picture"
    GROUP = "group"
    END = "end"


@dataclass(frozen=True)
class Section:
    """One run of a conversation.

    Attributes:
        kind: what it becomes.
        text: the words, for `WORDS`.
        is_supervised: whether the loss covers it: answers and their end.
    """

    kind: SectionKind
    text: str = ""
    is_supervised: bool = False


@dataclass(frozen=True)
class Turn:
    """One question and its answer.

    Attributes:
        question: the user's words.
        answer: words with `GROUP_MARKER` where a target's group stands; None for the answer that is to be generated.
    """

    question: str
    answer: str | None = None


def conversation_sections(turns: Sequence[Turn]) -> list[Section]:
    """Lays out a conversation about one picture, which stands in front of the first question.

    Args:
        turns: at least one; only the last may lack an answer.

    Raises:
        DataError: no turn, an empty question, or a missing answer before the last turn.
    """
    if not turns:
        raise DataError("the conversation has no question; give at least one")
    sections = [Section(SectionKind.START)]
    for index, turn in enumerate(turns):
        question = turn.question.strip()
        if not question:
            raise DataError(f"question {index + 1} of {len(turns)} is empty; write what to look for in the picture")
        if index == 0:
            sections += [Section(SectionKind.WORDS, f"{SYSTEM_PROMPT} USER:"), Section(SectionKind.PICTURE)]
            sections.append(Section(SectionKind.WORDS, f"{question} ASSISTANT:"))
        else:
            sections.append(Section(SectionKind.WORDS, f"USER: {question} ASSISTANT:"))
        if turn.answer is None:
            if index + 1 < len(turns):
                raise DataError(f"turn {index + 1} of {len(turns)} has no answer; only the last one may be open")
            break
        sections += _answer_sections(turn.answer)
    return sections


def merge_targets(
    turns: Sequence[tuple[str, str, int]], masks: Sequence[np.ndarray]
) -> tuple[list[tuple[str, str, int]], list[np.ndarray]]:
    """One target for all that a question asks for, as models with a single mask per answer are trained.

    Args:
        turns: (question, answer with markers, number of targets) in order.
        masks: [H, W] of 0 and 1, in the order of the markers.

    Returns:
        Turns with one target, their answers `MERGED_ANSWER`, and the unions; answers without targets stay.
    """
    merged: list[tuple[str, str, int]] = []
    unions: list[np.ndarray] = []
    first = 0
    for question, answer, count in turns:
        merged.append((question, MERGED_ANSWER if count else answer, min(count, 1)))
        if count:
            unions.append(np.maximum.reduce([np.asarray(mask) for mask in masks[first : first + count]]))
        first += count
    return merged, unions


def history_turns(history: Iterable[tuple[str, str]]) -> list[Turn]:
    """Turns earlier questions and the engine's answers to them back into turns.

    In an answer, the markers `[1]`, `[2]`, … that count up from 1 stand for groups again; other brackets are words.
    """
    turns = []
    for question, answer in history:
        pieces: list[str] = []
        start, expected = 0, 1
        for match in _NUMBERED_MARKER.finditer(answer):
            if int(match.group(1)) != expected:
                continue
            pieces.append(answer[start : match.start()].replace(GROUP_MARKER, "{ seg }"))
            start, expected = match.end(), expected + 1
        pieces.append(answer[start:].replace(GROUP_MARKER, "{ seg }"))
        turns.append(Turn(question, GROUP_MARKER.join(pieces)))
    return turns


def _answer_sections(answer: str) -> list[Section]:
    sections: list[Section] = []
    for index, words in enumerate(answer.split(GROUP_MARKER)):
        if index > 0:
            sections.append(Section(SectionKind.GROUP, is_supervised=True))
        if words.strip():
            sections.append(Section(SectionKind.WORDS, words.strip(), is_supervised=True))
    return [*sections, Section(SectionKind.END, is_supervised=True)]
