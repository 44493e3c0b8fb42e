"""From the generator's text to pairs whose markers, objects and instances agree, or to the reason why they do not.

A draft's answer carries `{seg}` where the model wrote an object's id in brackets: the k-th marker stands for the k-th
object. Nothing that a model may write raises here; it becomes a `Fault`.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pixellm.jobs.muse.selection import Instance
from pixellm.platform.data.schema import SEG_MARKER


class Reason(StrEnum):
    """Why an asked pair is not in the dataset; the value is what the report counts it under."""

    NO_ANSWER = "no answer from the service"
    REFUSED = "the model refused"
    SCHEMA = "not in the asked form"
    MISSING = "fewer pairs than asked for"
    UNKNOWN_ID = "unknown object id"
    MARKERS = "markers and objects disagree"
    FEW_TARGETS = "fewer than two targets"
    LEAK = "question names its targets"
    BROAD = "question too broad"
    LONG = "too long"
    UNSAFE = "unsafe text"
    UNMARKED = "object mentioned and not marked"
    UNMENTIONED = "object marked and not mentioned"
    DUPLICATE = "near-duplicate question"
    JUDGE = "the judge advised against it"
    REVIEW = "rejected in review"
    OTHER_TEST = "target count of the other test split"
    BUDGET = "unfinished when the budget was spent"


#: What the generator may correct once; everything else says that the pair is no good.
REPAIRABLE = frozenset({Reason.SCHEMA, Reason.MISSING, Reason.UNKNOWN_ID, Reason.MARKERS})


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a pair cannot be used; `detail` is written to be read by a model as well as by a person."""

    reason: Reason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Draft:
    """A pair whose parts agree: the k-th `{seg}` of `answer` is `instances[k]`, described by `descriptions[k]`."""

    question: str
    answer: str
    instances: tuple[Instance, ...]
    descriptions: tuple[str, ...]


#: An id in brackets, as asked for or as models like to write it: [3], [[3]], [id 3], [#3].
_MARKER = re.compile(r"\s*\[+\s*(?:id|object|obj)?\s*[:#]?\s*(\d{1,4})\s*\]+", re.IGNORECASE)
_FENCE = re.compile(r"^\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*$", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def read_drafts(text: str, instances: Sequence[Instance], count: int) -> list[Draft | Fault]:
    """Reads an answer of the generator.

    Args:
        text: the message's content, in the best case JSON of `PAIRS_SCHEMA`.
        instances: what it was offered.
        count: pairs it was asked for.

    Returns:
        Exactly `count` drafts or faults; pairs beyond the asked number are ignored.
    """
    records = _records(text)
    if isinstance(records, Fault):
        return [records] * count
    by_number = {instance.number: instance for instance in instances}
    results = [_read_one(record, by_number) for record in records[:count]]
    missing = Fault(Reason.MISSING, f"{count} pairs were asked for, {len(records)} came")
    return results + [missing] * (count - len(results))


def read_text_field(text: str, name: str) -> str | None:
    """The text under one key of a JSON answer; None where the answer is of another form or it is empty."""
    content = _json(text)
    value = content.get(name) if isinstance(content, dict) else None
    return _tidy(value) or None if isinstance(value, str) else None


def read_verdict(text: str) -> tuple[bool, str] | None:
    """The judge's (keep, reason); None where its answer is of another form."""
    content = _json(text)
    if not isinstance(content, dict) or not isinstance(content.get("keep"), bool):
        return None
    return content["keep"], _tidy(str(content.get("reason", "")))[:200]


def _records(text: str) -> list[Any] | Fault:
    content = _json(text)
    if content is None:
        return Fault(Reason.SCHEMA, "the answer is not JSON")
    records = content.get("pairs") if isinstance(content, dict) else None
    if not isinstance(records, list):
        return Fault(Reason.SCHEMA, 'wanted one JSON object with a list "pairs"')
    return records


def _json(text: str) -> Any:
    fenced = _FENCE.match(text)
    try:
        return json.loads(fenced.group(1) if fenced else text)
    except (ValueError, RecursionError):
        return None


def _read_one(record: Any, by_number: Mapping[int, Instance]) -> Draft | Fault:
    fault = _form_fault(record)
    if fault:
        return Fault(Reason.SCHEMA, fault)
    question, answer = _tidy(record["question"]), _tidy(record["answer"])
    if SEG_MARKER in question + answer or _MARKER.search(question):
        return Fault(Reason.MARKERS, f"a question holds no ids, and nothing holds {SEG_MARKER}")
    described = {part["id"]: _tidy(part["description"]) for part in record["objects"]}
    marked = [int(number) for number in _MARKER.findall(answer)]
    unknown = sorted({*described, *marked} - by_number.keys())
    if unknown:
        return Fault(Reason.UNKNOWN_ID, f"there is no object with id {', '.join(map(str, unknown))}")
    fault = _marker_fault(marked, [part["id"] for part in record["objects"]])
    if fault:
        return Fault(Reason.MARKERS, fault)
    return Draft(
        question,
        _MARKER.sub(f" {SEG_MARKER}", answer).strip(),
        tuple(by_number[number] for number in marked),
        tuple(described[number] for number in marked),
    )


def _form_fault(record: Any) -> str:
    if not isinstance(record, dict):
        return f"a pair is a JSON {type(record).__name__}, wanted an object"
    for key in ("question", "answer"):
        if not isinstance(record.get(key), str) or not _tidy(record[key]):
            return f"{key} is missing, empty or no text"
    parts = record.get("objects")
    if not isinstance(parts, list):
        return "objects is no list"
    for part in parts:
        number = part.get("id") if isinstance(part, dict) else None
        if not isinstance(number, int) or isinstance(number, bool):
            return "each of objects needs a whole number as id"
        if not isinstance(part.get("description"), str) or not _tidy(part["description"]):
            return f"object {number} has no description"
    return ""


def _marker_fault(marked: Sequence[int], listed: Sequence[int]) -> str:
    for what, numbers in (("the answer marks", marked), ("objects lists", listed)):
        twice = sorted(number for number, times in Counter(numbers).items() if times > 1)
        if twice:
            return f"{what} id {', '.join(map(str, twice))} more than once"
    if set(marked) != set(listed):
        only_marked, only_listed = sorted(set(marked) - set(listed)), sorted(set(listed) - set(marked))
        return f"marked but not in objects: {only_marked}; in objects but not marked: {only_listed}"
    return ""


def _tidy(text: str) -> str:
    """One line of text with single spaces; characters that no text holds are taken out."""
    printable = text.encode("utf-8", "ignore").decode("utf-8")  # lone surrogates cannot be stored
    return " ".join(_CONTROL.sub(" ", printable).split())
