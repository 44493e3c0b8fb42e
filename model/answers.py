"""Reads a generated answer: token ids in, words with `[k]` markers and a phrase per target out, one piece at a time.

Words are final as soon as they are emitted, so an answer can be streamed. The rule for a target's phrase looks only at
words that stand before its group, so a finished target can be sent on at once.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CLAUSE_END = re.compile(r"[.!?;:\n]+\s*")
_ITEM_SEPARATOR = re.compile(r"\s*,\s*(?:and\s+|or\s+)?|\s+and\s+|\s+or\s+")
_CONNECTORS_ONLY = re.compile(r"[\s,;&/]*(?:(?:and|or|as well as)\b)?[\s,]*", re.IGNORECASE)
_FILLER_START = re.compile(
    r"^(?:sure|yes|ok|okay|of course|certainly|and|or|but|then|so|also|here)\b[\s,]*", re.IGNORECASE
)
_COPULA_END = re.compile(r"[\s,]*\b(?:is|are|was|were|here|located|at|in|as|by)$", re.IGNORECASE)
_DETERMINER = re.compile(
    "the|an?|this|that|these|those|his|her|its|their|my|your|our|some|one|two|three|four|five|six|both|each|every|another"
)
_ATTACHING = re.compile(
    "of|with|in|wearing|on|at|by|against|near|beside|behind|above|below|under|over|across|among|between|through|inside|"
    "(?:next|close|closer|closest|nearest) to"
)
_AUXILIARY = re.compile("is|are|was|were|be|been|being|has|have|had|can|could|will|would|should|may|might|do|does")
_NAMES_NOTHING = re.compile(
    "|it|they|them|this|that|these|those|one|here|(?:the )?(?:segmentation )?(?:results?|masks?|answer|target|region)"
)
_QUESTION_START = re.compile(
    r"^(?:(?:please|now|can|could|would|will|you|help me to|help me|i want you to|i would like to|kindly)\s+)*"
    r"(?:segment|show me|show|find|locate|mark|outline|highlight|mask|point out|detect|identify|"
    r"where (?:is|are)|what (?:is|are)|which (?:is|are))\s+(?:out\s+)?",
    re.IGNORECASE,
)
_QUESTION_END = re.compile(
    r"\s+(?:in|on|from|of)\s+(?:this|the|that)\s+(?:image|picture|photo|photograph)s?\b.*$|[,.]?\s+please$",
    re.IGNORECASE,
)
_MAX_PHRASE_WORDS = 12


@dataclass
class AnswerReader:
    """Turns a stream of token ids and finished groups into text, markers and phrases.

    Attributes:
        tokenizer: decodes the words.
        question: its object names a target that the answer does not name.
        text: everything emitted so far.
        phrases: one per finished group.
    """

    tokenizer: "PreTrainedTokenizerBase"
    question: str = ""
    text: str = ""
    phrases: list[str] = field(default_factory=list)
    _ids: list[int] = field(default_factory=list)
    _decoded: int = 0
    _window: int = 0
    _section: str = ""
    _segments: list[str] = field(default_factory=list)

    def add_token(self, token_id: int) -> str:
        """Takes one word-piece and returns the text that became final (often empty or one word).

        Only a short window of ids is decoded each time, so the cost does not grow with the answer.
        """
        self._ids.append(token_id)
        whole = self._decode(self._ids[self._window :])
        if whole.endswith("\ufffd") and len(self._ids) - self._decoded < 8:
            return ""
        known = self._decode(self._ids[self._window : self._decoded])
        self._window, self._decoded = self._decoded, len(self._ids)
        return self._emit(whole[len(known) :])

    def add_group(self) -> str:
        """Takes one finished group and returns the text with its marker, `[k]` counting from 1."""
        tail = self._flush()
        self._segments.append(self._section)
        self.phrases.append(target_phrase(self._segments) or question_phrase(self.question, len(self._segments) - 1))
        marker = f"[{len(self.phrases)}]"
        glued = not self.text or self.text.endswith((" ", "(", "\n", "“", '"'))
        marker = marker if glued else f" {marker}"
        self.text += marker
        self._section = ""
        return tail + marker

    def finish(self) -> str:
        """Returns whatever words were still held back."""
        return self._flush()

    def _flush(self) -> str:
        whole = self._decode(self._ids[self._window :])
        known = self._decode(self._ids[self._window : self._decoded])
        self._ids, self._window, self._decoded = [], 0, 0
        return self._emit(whole[len(known) :])

    def _decode(self, ids: Sequence[int]) -> str:
        if not ids:
            return ""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _emit(self, delta: str) -> str:
        if not delta:
            return ""
        if not self._section:
            delta = delta.lstrip(" ")
            if not delta:
                return ""
            if self.text.endswith("]") and delta[0] not in ".,;:!?)]}'\"”…":
                delta = f" {delta}"
        self._section += delta
        self.text += delta
        return delta


def target_phrase(segments: Sequence[str]) -> str:
    """Names the target whose group follows the last segment, by the words before it.

    The rule: the clause before the group; of a list in front of several groups (`the cat and dog are [1] and [2]`) the
    item at the group's place; without its filler and copula; from its first determiner on, unless a verb stands
    between. Words like `it` name nothing.

    Args:
        segments: texts between groups, the last one directly in front of the group in question.

    Returns:
        The phrase, or an empty string where the words name nothing.
    """
    last = len(segments) - 1
    start = last
    while start > 0 and _CONNECTORS_ONLY.fullmatch(segments[start]):
        start -= 1
    clause = _last_clause(segments[start])
    items = _list_items(clause)
    if items and re.search(r"\bare\s*:?\s*$", segments[start], re.IGNORECASE):
        return _clean(items[min(last - start, len(items) - 1)])
    return _clean(items[-1] if items else clause)


def question_phrase(question: str, index: int) -> str:
    """Names target `index` by the object of a question such as `Segment the cat and the laptop.`"""
    phrases = question_phrases(question)
    return phrases[min(index, len(phrases) - 1)] if phrases else ""


def question_phrases(question: str) -> list[str]:
    """All objects of such a question; none where it is of another form."""
    sentence = re.split(r"[.?!]", question.strip(), maxsplit=1)[0].strip()
    rest = _QUESTION_START.sub("", sentence, count=1)
    if rest == sentence:
        return []
    items = _ITEM_SEPARATOR.split(_QUESTION_END.sub("", rest))
    return [_shorten(item.strip()) for item in items if item.strip()]


def _last_clause(segment: str) -> str:
    clauses = [clause for clause in _CLAUSE_END.split(segment.strip(" ,;:\n")) if clause.strip()]
    return clauses[-1].strip(" ,") if clauses else ""


def _list_items(clause: str) -> list[str]:
    clause = _strip_filler(clause)
    body = _COPULA_END.sub("", clause)
    return [item for item in _ITEM_SEPARATOR.split(body) if item.strip()]


def _strip_filler(clause: str) -> str:
    previous = None
    while clause != previous:
        previous, clause = clause, _FILLER_START.sub("", clause, count=1).strip(" ,")
    return clause


def _clean(phrase: str) -> str:
    phrase = _strip_filler(phrase.strip(" ,\"'“”()"))
    phrase = _COPULA_END.sub("", phrase).strip(" ,\"'“”()")
    phrase = _noun_phrase(phrase.split())
    return "" if _NAMES_NOTHING.fullmatch(phrase.lower()) else _shorten(phrase)


def _noun_phrase(words: list[str]) -> str:
    """The last noun phrase, with those in front of it that prepositions attach: `the cup on the table by the door`."""
    lowered = [word.lower() for word in words]
    starts = [
        i
        for i, word in enumerate(lowered)
        if _DETERMINER.fullmatch(word) and not (i > 0 and _DETERMINER.fullmatch(lowered[i - 1]))
    ]
    if not starts:
        return " ".join(words)
    start = starts.pop()
    while starts:
        between = lowered[starts[-1] + 1 : start]
        attached = _ATTACHING.fullmatch(between[-1]) or _ATTACHING.fullmatch(" ".join(between[-2:]))
        is_tool = between[-1] == "with" and "with" in lowered[start:]  # cut the cake with a knife with a black handle
        is_too_long = len(words) - starts[-1] > _MAX_PHRASE_WORDS
        if not attached or is_tool or is_too_long or any(map(_AUXILIARY.fullmatch, between)):
            break
        start = starts.pop()
    return " ".join(words[start:])


def _shorten(phrase: str) -> str:
    return " ".join(phrase.split()[-_MAX_PHRASE_WORDS:])
