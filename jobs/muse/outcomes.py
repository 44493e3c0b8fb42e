"""What became of one picture: a kept pair or a reason for each pair that was asked for, as it is stored."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from pixellm.jobs.muse.drafts import Draft, Fault, Reason


@dataclass(frozen=True, slots=True)
class Pair:
    """A question and its answer: the k-th `{seg}` of `answer` is the row's target `targets[k]`, called `phrases[k]`."""

    question: str
    answer: str
    targets: tuple[int, ...]
    phrases: tuple[str, ...]

    @staticmethod
    def of(draft: Draft) -> "Pair":
        """The pair of a draft."""
        targets = tuple(instance.target_index for instance in draft.instances)
        return Pair(draft.question, draft.answer, targets, draft.descriptions)


@dataclass(frozen=True, slots=True)
class Outcome:
    """All pairs that were asked for about one picture, in order.

    Attributes:
        image_id: of the picture.
        slots: a pair that passed every check of its own, or the reason against it.
        repaired: pairs that are here because the generator corrected them.
    """

    image_id: str
    slots: tuple[Pair | Fault, ...]
    repaired: int = 0

    @property
    def is_final(self) -> bool:
        """Whether asking again would change nothing: neither the service nor the money failed."""
        return not any(isinstance(slot, Fault) and slot.reason in _NOT_FINAL for slot in self.slots)

    def to_json(self) -> str:
        """As one line of text."""
        slots = [_slot_to_list(slot) for slot in self.slots]
        content = {"image_id": self.image_id, "slots": slots, "repaired": self.repaired}
        return json.dumps(content, ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> "Outcome":
        """Back from text."""
        content = json.loads(text)
        slots = tuple(_slot_from_list(slot) for slot in content["slots"])
        return Outcome(content["image_id"], slots, content["repaired"])


_NOT_FINAL = frozenset({Reason.NO_ANSWER, Reason.BUDGET})


def _slot_to_list(slot: Pair | Fault) -> list[object]:
    if isinstance(slot, Fault):
        return [slot.reason.value, slot.detail]
    return [slot.question, slot.answer, slot.targets, slot.phrases]


def _slot_from_list(content: Sequence[object]) -> Pair | Fault:
    if len(content) == 2:
        return Fault(Reason(str(content[0])), str(content[1]))
    question, answer, targets, phrases = content
    assert isinstance(targets, list)
    assert isinstance(phrases, list)
    return Pair(str(question), str(answer), tuple(targets), tuple(phrases))
