"""All requests about one picture, in order: caption, pairs, one repair, second opinions. Pure but for its one `ask`.

`ask` gives the answer to a request whether it was paid just now or in an earlier run, so going through a picture again
with the answers on disk comes to the same outcome and costs nothing.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pixellm.jobs.muse import prompts
from pixellm.jobs.muse.drafts import REPAIRABLE, Draft, Fault, Reason, read_drafts, read_text_field, read_verdict
from pixellm.jobs.muse.filters import FilterLimits, find_fault
from pixellm.jobs.muse.ledger import Answer, Kind
from pixellm.jobs.muse.outcomes import Outcome, Pair
from pixellm.jobs.muse.pictures import SentPicture, scale_box
from pixellm.jobs.muse.selection import Instance, SelectionPolicy, offered_instances
from pixellm.platform.data.schema import SEG_MARKER, Row
from pixellm.platform.llm_client import NoAnswerError, OutOfBudgetError

Generator = Literal["vision", "text"]


@dataclass(frozen=True, slots=True)
class AskOptions:
    """What decides, beside the pictures, which requests are sent and which pairs are kept.

    Attributes:
        model: name of the generator's model.
        generator: "vision" sends the picture; "text" sends a caption instead (Table 4d's other row).
        pairs_per_picture: asked for in one request.
        judge_model: model for second opinions; None: none are asked for.
        longest_side: a larger picture is made smaller before it is sent, pixels.
        answer_tokens: limit of an answer for one pair.
        policy: which instances are offered.
        limits: what a pair may hold.
    """

    model: str
    generator: Generator = "vision"
    pairs_per_picture: int = 2
    judge_model: str | None = None
    longest_side: int = 1024
    answer_tokens: int = 400
    policy: SelectionPolicy = field(default_factory=SelectionPolicy)
    limits: FilterLimits = field(default_factory=FilterLimits)


@dataclass(frozen=True, slots=True)
class Request:
    """One request: the body's parts that matter. `schema` is the JSON schema of the answer, by a name."""

    kind: Kind
    model: str
    messages: Sequence[Mapping[str, Any]]
    schema_name: str
    schema: Mapping[str, Any]
    max_tokens: int


#: Raises OutOfBudgetError or NoAnswerError.
Ask = Callable[[Request], Awaitable[Answer]]


async def ask_about(row: Row, picture: SentPicture, options: AskOptions, ask: Ask) -> Outcome:
    """Everything about one picture.

    Args:
        row: its instances and captions.
        picture: as it is sent.
        options: what is asked.
        ask: answers a request.

    Raises:
        OutOfBudgetError: not even the first request could be paid.
    """
    offered = offered_instances(row, options.policy)
    count = options.pairs_per_picture
    try:
        caption = await _caption(row, picture, options, ask) if options.generator == "text" else ""
    except NoAnswerError as error:
        return Outcome(row.image_id, (Fault(Reason.NO_ANSWER, str(error)),) * count)
    if caption is None:
        return Outcome(row.image_id, (Fault(Reason.REFUSED, "no caption"),) * count)
    request = _first_request(row, offered, picture, caption, options)
    try:
        answer = await ask(request)
    except NoAnswerError as error:
        return Outcome(row.image_id, (Fault(Reason.NO_ANSWER, str(error)),) * count)
    slots = _slots(answer, offered, count)
    slots, repaired = await _repair(slots, request, answer, offered, ask)
    checked = [_checked(slot, offered, options.limits) for slot in slots]
    judged = [await _judged(slot, row, picture, options, ask) for slot in checked]
    return Outcome(row.image_id, tuple(Pair.of(slot) if isinstance(slot, Draft) else slot for slot in judged), repaired)


async def _caption(row: Row, picture: SentPicture, options: AskOptions, ask: Ask) -> str | None:
    """The picture's own captions, or one that is generated; None where the model gives none."""
    given = [dialogue.answer for dialogue in row.dialogues if dialogue.kind == "vqa" and dialogue.answer.strip()]
    if given:
        return " ".join(dict.fromkeys(given))
    messages = prompts.caption_messages(picture.url)
    answer = await ask(Request("caption", options.model, messages, "caption", prompts.CAPTION_SCHEMA, 300))
    return None if answer.is_refused else read_text_field(answer.text, "caption")


def _first_request(
    row: Row, offered: Sequence[Instance], picture: SentPicture, caption: str, options: AskOptions
) -> Request:
    size = (row.height, row.width)
    scaled = [replace(instance, box=scale_box(instance.box, size, picture.size)) for instance in offered]
    messages = prompts.ask_messages(
        scaled,
        picture.size,
        options.pairs_per_picture,
        options.limits.max_targets,
        image_url=picture.url if options.generator == "vision" else None,
        caption=caption,
    )
    tokens = options.answer_tokens * options.pairs_per_picture
    return Request("ask", options.model, messages, "muse_pairs", prompts.PAIRS_SCHEMA, tokens)


def _slots(answer: Answer, offered: Sequence[Instance], count: int) -> list[Draft | Fault]:
    if answer.is_refused:
        return [Fault(Reason.REFUSED)] * count
    slots = read_drafts(answer.text, offered, count)
    if not answer.is_cut:
        return slots
    cut = Fault(Reason.SCHEMA, "the answer was cut off at the token limit; write shorter pairs")
    return [cut if isinstance(slot, Fault) and slot.reason is Reason.SCHEMA else slot for slot in slots]


async def _repair(
    slots: list[Draft | Fault],
    first: Request,
    answer: Answer,
    offered: Sequence[Instance],
    ask: Ask,
) -> tuple[list[Draft | Fault], int]:
    """Asks once for a correction of what can be corrected; returns the slots and how many of them it mended."""
    faults = [
        (place, slot) for place, slot in enumerate(slots) if isinstance(slot, Fault) and slot.reason in REPAIRABLE
    ]
    if not faults:
        return slots, 0
    told = [(place, f"{fault.reason}: {fault.detail}" if fault.detail else fault.reason) for place, fault in faults]
    messages = prompts.repair_messages(first.messages, answer.text, told)
    try:
        corrected = await ask(replace(first, kind="repair", messages=messages))
    except OutOfBudgetError:
        return _with_faults(slots, [place for place, _ in faults], Fault(Reason.BUDGET, "before its repair")), 0
    except NoAnswerError as error:
        return _with_faults(
            slots, [place for place, _ in faults], Fault(Reason.NO_ANSWER, f"to its repair: {error}")
        ), 0
    again = _slots(corrected, offered, len(slots))
    mended = list(slots)
    for place, _ in faults:
        mended[place] = again[place]
    return mended, sum(isinstance(mended[place], Draft) for place, _ in faults)


def _checked(slot: Draft | Fault, offered: Sequence[Instance], limits: FilterLimits) -> Draft | Fault:
    return slot if isinstance(slot, Fault) else find_fault(slot, offered, limits) or slot


async def _judged(slot: Draft | Fault, row: Row, picture: SentPicture, options: AskOptions, ask: Ask) -> Draft | Fault:
    if isinstance(slot, Fault) or options.judge_model is None:
        return slot
    request = Request(
        "judge",
        options.judge_model,
        prompts.judge_messages(slot.question, _numbered(slot.answer), _shown(slot, row, picture), picture.url),
        "verdict",
        prompts.VERDICT_SCHEMA,
        200,
    )
    try:
        answer = await ask(request)
    except OutOfBudgetError:
        return Fault(Reason.BUDGET, "before its second opinion")
    except NoAnswerError as error:
        return Fault(Reason.NO_ANSWER, f"to its second opinion: {error}")
    verdict = None if answer.is_refused else read_verdict(answer.text)
    if verdict is None:
        return Fault(Reason.JUDGE, "it gave no verdict")
    return slot if verdict[0] else Fault(Reason.JUDGE, verdict[1])


def _numbered(answer: str) -> str:
    """The answer with [1], [2], … in the place of the markers."""
    first, *rest = answer.split(SEG_MARKER)
    return first + "".join(f"[{number}]{text}" for number, text in enumerate(rest, start=1))


def _shown(draft: Draft, row: Row, picture: SentPicture) -> list[dict[str, Any]]:
    size = (row.height, row.width)
    return [
        {
            "id": number,
            "class": instance.name,
            "box": [round(value) for value in scale_box(instance.box, size, picture.size)],
            "description": description,
        }
        for number, (instance, description) in enumerate(zip(draft.instances, draft.descriptions, strict=True), start=1)
    ]


def _with_faults(slots: Sequence[Draft | Fault], places: Sequence[int], fault: Fault) -> list[Draft | Fault]:
    return [fault if place in places else slot for place, slot in enumerate(slots)]
