"""Which pairs are good enough to train on: pure checks of one pair, in a fixed order, each with its reason.

The paper wants answers that refer to each object and imply no other, questions that are complete activities and not too
broad, and class names rephrased (Sec. 4.2, Fig. 4). What words can show of it is checked here; the 32 hand-written
questions of the demo data all pass.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from pixellm.jobs.muse.drafts import Draft, Fault, Reason
from pixellm.jobs.muse.selection import Instance
from pixellm.platform.data.phrases import plural
from pixellm.platform.data.schema import SEG_MARKER

#: Part of what names a run: other filters keep other pairs.
FILTERS_VERSION = 1


@dataclass(frozen=True, slots=True)
class FilterLimits:
    """How much a pair may hold.

    Attributes:
        min_targets: targets of an answer, at least (the paper's answers have several).
        max_targets: targets of an answer, at most.
        max_question_words: words of a question.
        max_answer_words: words of an answer, markers not counted.
        max_description_words: words of one description.
    """

    min_targets: int = 2
    max_targets: int = 10
    max_question_words: int = 60
    max_answer_words: int = 150
    max_description_words: int = 20


def find_fault(draft: Draft, offered: Sequence[Instance], limits: FilterLimits) -> Fault | None:
    """The first reason against a pair, or None.

    Args:
        draft: a pair whose parts agree.
        offered: all instances that the generator could choose from.
        limits: how much a pair may hold.
    """
    for check in _CHECKS:
        fault = check(draft, offered, limits)
        if fault is not None:
            return fault
    return None


def _few_targets(draft: Draft, _offered: Sequence[Instance], limits: FilterLimits) -> Fault | None:
    count = len(draft.instances)
    return Fault(Reason.FEW_TARGETS, f"{count} targets") if count < limits.min_targets else None


def _too_long(draft: Draft, _offered: Sequence[Instance], limits: FilterLimits) -> Fault | None:
    lengths = (
        ("question", len(draft.question.split()), limits.max_question_words),
        ("answer", len(draft.answer.replace(SEG_MARKER, " ").split()), limits.max_answer_words),
        ("description", max(len(text.split()) for text in draft.descriptions), limits.max_description_words),
    )
    for name, words, most in lengths:
        if words > most:
            return Fault(Reason.LONG, f"{name} of {words} words")
    return None


def _unsafe(draft: Draft, _offered: Sequence[Instance], _limits: FilterLimits) -> Fault | None:
    found = _UNSAFE.search("\n".join((draft.question, draft.answer, *draft.descriptions)).lower())
    return Fault(Reason.UNSAFE, found.group(0)[:40]) if found else None


def _too_broad(draft: Draft, offered: Sequence[Instance], limits: FilterLimits) -> Fault | None:
    found = _BROAD.search(draft.question)
    if found or len(draft.question.split()) < _MIN_QUESTION_WORDS:
        return Fault(Reason.BROAD, found.group(0) if found else "hardly any words")
    count = len(draft.instances)
    if count > limits.max_targets or (count == len(offered) and count >= _WHOLE_PICTURE_TARGETS):
        return Fault(Reason.BROAD, f"{count} of {len(offered)} objects are the answer")
    return None


def _leak(draft: Draft, offered: Sequence[Instance], _limits: FilterLimits) -> Fault | None:
    found = _META.search(f"{draft.question} {draft.answer}".lower())
    if found:
        return Fault(Reason.LEAK, f"speaks of {found.group(0)!r}")
    question = draft.question
    for description in draft.descriptions:
        if len(description.split()) > 1 and description.lower() in question.lower():
            return Fault(Reason.LEAK, description)
    named = _words_for(question, draft.instances)
    distinct = len({instance.name for instance in draft.instances})
    if len(named) >= 2 and 2 * len(named) > distinct:
        return Fault(Reason.LEAK, ", ".join(named))
    listed = _words_for(question, offered)
    return Fault(Reason.LEAK, ", ".join(listed)) if len(listed) >= _LISTED_NAMES else None


def _unmentioned(draft: Draft, _offered: Sequence[Instance], _limits: FilterLimits) -> Fault | None:
    """Before each marker, after the one before it, stands some word of its description or its class."""
    before = draft.answer.split(SEG_MARKER)
    for text, instance, description in zip(before, draft.instances, draft.descriptions, strict=False):
        wanted = _content_words(f"{description} {instance.name}") | {plural(instance.name).rpartition(" ")[2]}
        if wanted.isdisjoint(_content_words(text)):
            return Fault(Reason.UNMENTIONED, description)
    return None


def _unmarked(draft: Draft, offered: Sequence[Instance], _limits: FilterLimits) -> Fault | None:
    """A class of the list stands in the answer, is no target's, and is not part of a target's description."""
    answer = draft.answer.lower()
    for description in sorted(draft.descriptions, key=len, reverse=True):
        answer = answer.replace(description.lower(), " ")
    found = _ANOTHER.search(answer)
    if found and any(_names(found.group(1), instance.name) for instance in draft.instances):
        return Fault(Reason.UNMARKED, found.group(0))
    targets = {instance.name for instance in draft.instances}
    kinds = {_last_word(name) for name in targets}  # "the racket" may be the tennis racket that is marked
    pieces = answer.split(SEG_MARKER)
    for name in dict.fromkeys(instance.name for instance in offered if instance.name not in targets):
        is_kind_marked = _last_word(name) in kinds
        for index, piece in enumerate(pieces):
            if not (_full_pattern(name) if is_kind_marked else _name_pattern(name)).search(piece):
                continue
            # "the mug on the table {seg}" may shorten "the blue mug on the wooden table"
            is_place = index < len(draft.descriptions) and _names(draft.descriptions[index], name)
            if not is_place:
                return Fault(Reason.UNMARKED, name)
    return None


_Check = Callable[[Draft, Sequence[Instance], FilterLimits], Fault | None]
_CHECKS: tuple[_Check, ...] = (_few_targets, _too_long, _unsafe, _leak, _too_broad, _unmentioned, _unmarked)

#: An answer that uses everything there is, is no choice, unless there is hardly anything.
_WHOLE_PICTURE_TARGETS = 7
_MIN_QUESTION_WORDS = 4
#: A question that names this many classes of the list recites it.
_LISTED_NAMES = 3

_BROAD = re.compile(
    r"\b(?:what(?:'s| is| are| do you see| can (?:you|be) (?:see|seen))?"
    r"(?: all)?(?: of)?(?: the)? (?:objects?|items?|things?|in|there in|visible in) "
    r"(?:are |is )?(?:visible |there |shown )?(?:in |on )?(?:this|the) (?:picture|image|photo(?:graph)?|scene)"
    r"|what(?:'s| is| are)? (?:shown|visible|depicted|happening) in (?:this|the) (?:picture|image|photo\w*|scene)"
    r"|(?:describe|segment|list|name|identify|find|locate) "
    r"(?:everything|all|the (?:picture|image|photo|scene)|each|every)"
    r"|(?:what|which) (?:objects?|items?|things?) (?:can|do) (?:you|i|we) see)\b",
    re.IGNORECASE,
)

#: This and `_UNSAFE` are searched in lower-cased text: twice as fast as a search that ignores case.
_META = re.compile(
    r"\b(?:bounding[ -]box(?:es)?|(?:object|instance|class|category) (?:id|ids|name|names|list)|ids? \d+|coordinates?"
    r"|segmentation masks?|listed objects?|object list)\b|\[\s*\d+(?:\.\d+)?\s*,"
)

_UNSAFE = re.compile(
    r"\b(?:ignore (?:all |any |the )?(?:previous|prior|above) (?:instructions?|prompts?)|system prompt|as an ai\b"
    r"|language model|porn\w*|nudes?|naked|sexual\w*|rap(?:e|ed|ing|ist)|suicid\w+|self-harm"
    r"|kill (?:him|her|them|your|my)\w*|murder\w*|terroris\w+|molotov|explosives?|cocaine|heroin|genocide|nazi\w*)\b"
    r"|https?://|www\.|\b[\w.+-]+@[\w-]+\.\w+|\b\d{3}[-. ]\d{3}[-. ]\d{4}\b"
    r"|\[seg\d*\]|<image>|<im_(?:start|end)>|<\|[^|]{1,40}\|>|</?s>|<script"
)

#: One more of a kind that is marked elsewhere: "and the other cup".
_ANOTHER = re.compile(r"\b(?:another|(?:the )?(?:other|second|third|remaining)) ((?:\w+ )?\w+)\b(?! *\{seg\})")

#: Two-word classes whose second word alone is another thing.
_WHOLE_NAMES_ONLY = frozenset({"hot dog", "teddy bear", "sports ball", "stop sign", "cell phone", "fire hydrant"})

_STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an the and or of on in at to by with from near next beside behind under over above below between into onto "
        "as is are was it its his her their your my our this that these those then also while before after for up down "
        "out off left right middle top bottom upper lower front back side one two some other another",
    )
)


@lru_cache(maxsize=4096)
def _name_pattern(name: str) -> re.Pattern[str]:
    """Finds a class by its name or its last word, in singular or plural."""
    forms = {name.lower(), plural(name.lower())}
    if " " in name and name.lower() not in _WHOLE_NAMES_ONLY:
        forms |= {_last_word(name), plural(_last_word(name))}
    return _any_of(forms)


@lru_cache(maxsize=4096)
def _full_pattern(name: str) -> re.Pattern[str]:
    """Finds a class by its whole name, in singular or plural."""
    return _any_of({name.lower(), plural(name.lower())})


def _any_of(forms: set[str]) -> re.Pattern[str]:
    longest_first = sorted(forms, key=lambda form: (-len(form), form))
    return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, longest_first))})(?![\w-])")


def _last_word(name: str) -> str:
    return name.lower().rpartition(" ")[2]


def _names(text: str, name: str) -> bool:
    return _name_pattern(name).search(text.lower()) is not None


def _words_for(text: str, instances: Sequence[Instance]) -> list[str]:
    """The different words by which a text names classes: "the circles" is one, whatever their colours are."""
    lowered = text.lower()
    found = [_name_pattern(name).search(lowered) for name in dict.fromkeys(instance.name for instance in instances)]
    return list(dict.fromkeys(match.group(0) for match in found if match))


def _content_words(text: str) -> set[str]:
    return {word for word in re.findall(r"[^\W_]+", text.lower()) if word not in _STOP_WORDS}
