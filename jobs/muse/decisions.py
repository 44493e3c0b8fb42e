"""What people decided about pairs: accepted, rejected or edited, by whom and when; one small file for each decision.

A decision names a pair by its picture and text, so it holds for the same pair wherever it stands: in the shards that
were reviewed, and in those that a later `muse generate` assembles again.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pixellm.errors import DataError
from pixellm.jobs.muse.drafts import Fault, Reason
from pixellm.jobs.muse.outcomes import Pair
from pixellm.platform import storage
from pixellm.platform.data.schema import SEG_MARKER

REVIEW_FOLDER = "review"
Verdict = Literal["accept", "reject", "edit"]
VERDICTS: tuple[Verdict, ...] = ("accept", "reject", "edit")


@dataclass(frozen=True, slots=True)
class Decision:
    """One person's word about one pair.

    Attributes:
        pair_id: see `pair_id`.
        image_id: of the picture, for a reader of the file.
        verdict: "edit" replaces the texts by those below.
        who: the person's name.
        when: UTC, ISO 8601.
        question: as edited.
        answer: as edited, a `{seg}` for each kept target.
        kept_targets: places in the pair's targets, in the edited answer's order.
        phrases: one for each kept target.
    """

    pair_id: str
    image_id: str
    verdict: Verdict
    who: str
    when: str
    question: str = ""
    answer: str = ""
    kept_targets: tuple[int, ...] = ()
    phrases: tuple[str, ...] = ()

    def edited(self, pair: Pair) -> Pair:
        """The pair as edited.

        Raises:
            DataError: the edit does not fit the pair: markers and targets disagree, or a text is empty.
        """
        texts = (self.question, self.answer, *self.phrases)
        if not all(text.strip() for text in texts) or SEG_MARKER in self.question:
            raise DataError(f"an edit needs a question without {SEG_MARKER}, an answer and a phrase for each target")
        markers, kept = self.answer.count(SEG_MARKER), self.kept_targets
        if not (markers == len(kept) == len(self.phrases) >= 1) or len(set(kept)) != len(kept):
            raise DataError(
                f"the edited answer has {markers} markers for {len(kept)} targets and {len(self.phrases)} phrases; "
                f"wanted one {SEG_MARKER} for each target that is kept"
            )
        if not set(kept) <= set(range(len(pair.targets))):
            raise DataError(f"the edit keeps targets {list(kept)}, the pair has {len(pair.targets)}")
        targets = tuple(pair.targets[place] for place in kept)
        tidy = [_tidy(text) for text in texts]
        return Pair(tidy[0], tidy[1], targets, tuple(tidy[2:]))


class Decisions:
    """The newest decision about each pair."""

    def __init__(self, decisions: Iterable[Decision] = ()) -> None:
        self._newest: dict[str, Decision] = {}
        for decision in sorted(decisions, key=lambda decision: decision.when):
            self._newest[decision.pair_id] = decision
        edits = [decision for decision in self._newest.values() if decision.verdict == "edit"]
        self._by_result = {pair_id(one.image_id, _tidy(one.question), _tidy(one.answer)): one for one in edits}

    @property
    def counts(self) -> dict[str, int]:
        """Decisions by verdict."""
        return dict(sorted(Counter(decision.verdict for decision in self._newest.values()).items()))

    def about(self, pair: str) -> Decision | None:
        """The newest decision about the pair of this id, or the edit that it came from; None without either."""
        return self._newest.get(pair) or self._by_result.get(pair)

    def revise(self, image_id: str, pair: Pair) -> Pair | Fault:
        """The pair as people left it, or the fault that it was rejected. An edited pair may be decided about again."""
        seen: set[str] = set()
        while (name := pair_id(image_id, pair.question, pair.answer)) in self._newest and name not in seen:
            seen.add(name)
            decision = self._newest[name]
            if decision.verdict == "reject":
                return Fault(Reason.REVIEW, f"by {decision.who}, {decision.when}")
            if decision.verdict == "edit":
                pair = decision.edited(pair)
        return pair


def _tidy(text: str) -> str:
    return " ".join(text.split())


def pair_id(image_id: str, question: str, answer: str) -> str:
    """Names a pair by its picture and text (16 hex digits)."""
    return hashlib.sha256("\0".join((image_id, question, answer)).encode()).hexdigest()[:16]


def write_decision(uri: str, decision: Decision) -> None:
    """Adds a decision to those at `uri`, a dataset's folder; nothing that is there is touched."""
    stamp = decision.when.replace(":", "").replace("+0000", "Z")
    content = json.dumps(asdict(decision), ensure_ascii=False, indent=1) + "\n"
    storage.write_bytes(storage.join(uri, REVIEW_FOLDER, f"{stamp}-{decision.pair_id}.json"), content.encode())


def read_decisions(uri: str) -> Decisions:
    """All decisions at `uri`.

    Raises:
        DataError: a file there is no decision; it is named.
    """
    folder = storage.join(uri, REVIEW_FOLDER)
    names = [name for name in storage.list_names(folder) if name.endswith(".json")]
    return Decisions(_decision(storage.join(folder, name)) for name in names)


def _decision(uri: str) -> Decision:
    content: Any = storage.read_json(uri)
    try:
        content["kept_targets"], content["phrases"] = tuple(content["kept_targets"]), tuple(content["phrases"])
        decision = Decision(**content)
    except (TypeError, KeyError) as error:
        raise DataError(f"{uri} is no review decision ({error}); mend or remove it") from None
    if decision.verdict not in VERDICTS:
        raise DataError(f"{uri} has the verdict {decision.verdict!r}; wanted one of {', '.join(VERDICTS)}")
    return decision
