"""One sample at rest: a picture in its original encoding, its targets and its dialogues (dataclasses ⇄ Arrow).

The Arrow schema is the contract of the shards; the dataclasses are what the rest of the code sees.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from pixellm.platform.masks import Box, Rle

#: Raised when a reader of the older form could misread the newer one.
SCHEMA_VERSION = 1

#: The place in an answer where a target's group of codebook tokens goes.
SEG_MARKER = "{seg}"

DialogueKind = Literal["muse", "vqa", "referring", "absent"]


@dataclass(frozen=True, slots=True)
class Target:
    """One thing in the picture.

    `box` is (x0, y0, x1, y1) in pixels, `area` the mask's pixel count. `phrase` names it in words, unique within the
    row where position or wording tell it apart, otherwise equal to `category`. An `is_ignore` target (a crowd region)
    is never asked for and counts neither for nor against a prediction.
    """

    target_id: str
    category: str
    phrase: str
    box: Box
    mask: Rle
    area: int
    is_ignore: bool = False


@dataclass(frozen=True, slots=True)
class RowDialogue:
    """One question with its answer, as the source gives them.

    "muse" and "vqa" are complete; from the others, questions and answers are composed while streaming: "referring" has
    in `question` a bare expression ("the man on the left") for the targets `target_ids` (none: nothing in the picture
    fits it) and an empty answer, "absent" in `question` the name of a category that the picture is known to lack.

    The k-th `{seg}` in `answer` stands for `Row.targets[target_ids[k]]`, described by `phrases[k]`.

    `turn` is its place in a conversation: 0 starts one (most have no more), k > 0 goes on from the dialogue before it
    in the row and makes sense only after it.
    """

    kind: DialogueKind
    question: str
    answer: str
    target_ids: tuple[int, ...] = ()
    phrases: tuple[str, ...] = ()
    turn: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One picture with everything known about it. `image` holds the encoded file, `height` and `width` are pixels."""

    image_id: str
    source: str
    image: bytes
    height: int
    width: int
    license: str
    targets: tuple[Target, ...] = ()
    dialogues: tuple[RowDialogue, ...] = ()


MASK_TYPE = pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.binary())])

TARGET_TYPE = pa.struct(
    [
        ("target_id", pa.string()),
        ("category", pa.string()),
        ("phrase", pa.string()),
        ("box", pa.list_(pa.float32())),
        ("mask", MASK_TYPE),
        ("area", pa.int64()),
        ("is_ignore", pa.bool_()),
    ]
)

DIALOGUE_TYPE = pa.struct(
    [
        ("kind", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("target_ids", pa.list_(pa.int32())),
        ("phrases", pa.list_(pa.string())),
        ("turn", pa.int32()),
    ]
)

SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("source", pa.string()),
        ("image", pa.binary()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("license", pa.string()),
        ("targets", pa.list_(TARGET_TYPE)),
        ("dialogues", pa.list_(DIALOGUE_TYPE)),
    ]
)


def rows_to_table(rows: Iterable[Row]) -> pa.Table:
    """Rows as an Arrow table of `SCHEMA`."""
    return pa.Table.from_pylist([_row_to_dict(row) for row in rows], schema=SCHEMA)


def row_from_dict(record: Mapping[str, Any]) -> Row:
    """A row from one record of a shard; a column that was not read (as `image`) becomes empty."""
    return Row(
        image_id=record["image_id"],
        source=record["source"],
        image=record.get("image", b""),
        height=record["height"],
        width=record["width"],
        license=record["license"],
        targets=tuple(_target_from_dict(target) for target in record["targets"]),
        dialogues=tuple(_dialogue_from_dict(dialogue) for dialogue in record["dialogues"]),
    )


def _row_to_dict(row: Row) -> dict[str, Any]:
    return {
        "image_id": row.image_id,
        "source": row.source,
        "image": row.image,
        "height": row.height,
        "width": row.width,
        "license": row.license,
        "targets": [{name: getattr(target, name) for name in Target.__slots__} for target in row.targets],
        "dialogues": [{name: getattr(turn, name) for name in RowDialogue.__slots__} for turn in row.dialogues],
    }


def _target_from_dict(record: Mapping[str, Any]) -> Target:
    x0, y0, x1, y1 = record["box"]
    mask: Rle = {"size": list(record["mask"]["size"]), "counts": record["mask"]["counts"]}
    return Target(
        target_id=record["target_id"],
        category=record["category"],
        phrase=record["phrase"],
        box=(x0, y0, x1, y1),
        mask=mask,
        area=record["area"],
        is_ignore=record["is_ignore"],
    )


def _dialogue_from_dict(record: Mapping[str, Any]) -> RowDialogue:
    return RowDialogue(
        kind=record["kind"],
        question=record["question"],
        answer=record["answer"],
        target_ids=tuple(record["target_ids"]),
        phrases=tuple(record["phrases"]),
        turn=record.get("turn") or 0,
    )
