"""The generated set: masks equal what is painted, answers equal what the words mean, splits keep their promises."""

import io
import itertools
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixellm.errors import ConfigError
from pixellm.jobs.prepare import prepare
from pixellm.platform.data.schema import Row
from pixellm.platform.data.sources.shapes import ShapesSource
from pixellm.platform.masks import rle_decode

PALETTE = {"red": (214, 32, 32), "green": (24, 150, 48), "blue": (36, 64, 220)}
PALETTE |= {"orange": (250, 150, 20), "white": (248, 248, 248), "black": (12, 12, 12)}
UNSEEN = {"red star", "green ball", "blue kite", "white box"}


def rows(count: int, **options: object) -> list[Row]:
    source = ShapesSource(**options)  # type: ignore[arg-type]
    return [source.row_at(index) for index in range(count)]


def test_masks_cover_what_a_reading_of_the_decoded_picture_finds() -> None:
    for row in rows(40):
        pixels = np.asarray(Image.open(io.BytesIO(row.image))).astype(int)
        assert pixels.shape == (192, 192, 3)
        for target in row.targets:
            distance = np.abs(pixels - PALETTE[target.phrase.split()[0]]).max(axis=2)
            x0, y0, x1, y1 = (int(value) for value in target.box)
            found = np.zeros((192, 192), dtype=bool)
            found[y0:y1, x0:x1] = distance[y0:y1, x0:x1] < 45
            mask = rle_decode(target.mask)
            assert (found & mask).sum() / (found | mask).sum() > 0.93, (row.image_id, target.phrase)
            assert target.area == mask.sum()


def test_areas_are_those_of_geometry() -> None:
    star = 5 * 0.5 * math.sin(math.pi / 5)
    of_unit_half_extent = {"ball": math.pi, "box": 4.0, "kite": 2.0, "star": star}
    for target in (target for row in rows(60) for target in row.targets):
        # A star's topmost point is its full reach from the centre, its lowest two are cos 36° below.
        height = target.box[3] - target.box[1]
        half = height / (1 + math.cos(math.pi / 5)) if target.category == "star" else height / 2
        assert target.area == pytest.approx(of_unit_half_extent[target.category] * half**2, rel=0.08)
        assert 29 <= target.box[2] - target.box[0] <= 68


def expected_answer(row: Row, question: str) -> set[str]:
    """What a question means, read from its words and the boxes."""
    boxes = {target.phrase: target.box for target in row.targets}
    centre = {name: ((x0 + x1) / 2, (y0 + y1) / 2) for name, (x0, y0, x1, y1) in boxes.items()}
    words = re.sub(r"^(Please segment|Can you segment|Segment|Mark|Show me) |( in this picture)?[.?]$", "", question)

    def those(word: str) -> set[str]:
        singular = re.sub(r"^boxes$", "box", word).removesuffix("s") if word not in boxes else word
        return {name for name in boxes if singular in name.split() or singular in ("object", name)}

    if match := re.fullmatch(r"the objects (left of|right of|above|below) the (\w+ \w+)", words):
        axis = 0 if match[1] in ("left of", "right of") else 1
        sign = 1 if match[1] in ("right of", "below") else -1
        anchor = centre[match[2]][axis]
        return {name for name, place in centre.items() if name != match[2] and sign * (place[axis] - anchor) > 6}
    if match := re.fullmatch(r"the objects with the same color as the (\w+)", words):
        (anchor_name,) = those(match[1])
        return those(anchor_name.split()[0]) - {anchor_name}
    if match := re.fullmatch(r"the objects with the same shape as the (\w+) one", words):
        (anchor_name,) = those(match[1])
        return those(anchor_name.split()[1]) - {anchor_name}
    if match := re.fullmatch(r"the (largest|smallest) (\w+)( object)?", words):
        width = {name: boxes[name][2] - boxes[name][0] for name in those(match[2])}
        return {(max if match[1] == "largest" else min)(width, key=lambda name: width[name])}
    if match := re.fullmatch(r"the (\w+) objects|the (balls|boxes|kites|stars)", words):
        return those(match[1] or match[2])
    return {name.removeprefix("the ") for name in re.split(r", | and ", words)}


def test_every_answer_is_what_the_words_mean() -> None:
    kinds: Counter[int] = Counter()
    for row in (*rows(150), *rows(50, split="val_unseen")):
        for dialogue in row.dialogues:
            names = [row.targets[index].phrase for index in dialogue.target_ids]
            assert set(names) == expected_answer(row, dialogue.question), (row.image_id, dialogue.question)
            assert dialogue.answer == ", ".join(f"{name} {{seg}}" for name in names) + "."
            assert dialogue.phrases == tuple(names)
            lefts = [row.targets[index].box[0] + row.targets[index].box[2] for index in dialogue.target_ids]
            assert all(after - before >= -2 for before, after in itertools.pairwise(lefts))
            kinds[len(names)] += 1
    assert set(kinds) == {1, 2, 3, 4, 5, 6}
    assert sum(count for number, count in kinds.items() if number > 1) > 0.5 * kinds.total()


def test_the_same_picture_is_asked_different_things_with_different_answers() -> None:
    pictures = rows(100)
    assert all(len({dialogue.question for dialogue in row.dialogues}) == len(row.dialogues) for row in pictures)
    different = [len({dialogue.target_ids for dialogue in row.dialogues}) for row in pictures]
    assert np.mean(different) > 3


def test_a_row_is_a_pure_function_of_seed_split_and_index() -> None:
    source = ShapesSource(samples=5, seed=3)
    assert source.row_at(1_000_000) == ShapesSource(samples=5, seed=3).row_at(1_000_000)
    alone = source.row_at(4)
    assert [source.row_at(index) for index in (3, 4)][1] == alone
    assert alone.image != ShapesSource(seed=4).row_at(4).image


def test_held_out_pictures_and_combinations_stay_held_out() -> None:
    train, val, unseen = (rows(120, split=split) for split in ("train", "val", "val_unseen"))
    pictures = [row.image for row in (*train, *val, *unseen)]
    assert len(set(pictures)) == len(pictures)
    assert not UNSEEN & {target.phrase for row in (*train, *val) for target in row.targets}
    assert {target.phrase for row in unseen for target in row.targets} > UNSEEN
    every = {f"{color} {kind}" for color in PALETTE for kind in ("ball", "box", "kite", "star")}
    assert {target.phrase for row in train for target in row.targets} == every - UNSEEN
    for row in unseen:
        assert row.dialogues
        assert sum(target.phrase in UNSEEN for target in row.targets) == 1


def test_objects_never_touch() -> None:
    for row in rows(60):
        covered = np.sum([rle_decode(target.mask) for target in row.targets], axis=0)
        assert covered.max() == 1


def test_shuffled_questions_keep_pictures_and_answers_and_lose_the_meaning() -> None:
    plain, shuffled = rows(80), rows(80, shuffle_questions=True)
    agree = 0
    for own, other in zip(plain, shuffled, strict=True):
        assert (own.image, own.targets) == (other.image, other.targets)
        assert [d.answer for d in own.dialogues] == [d.answer for d in other.dialogues]
        agree += sum(a.question == b.question for a, b in zip(own.dialogues, other.dialogues, strict=True))
    assert agree < 0.05 * sum(len(row.dialogues) for row in plain)


def test_preparing_twice_gives_byte_identical_shards_without_any_input(tmp_path: Path) -> None:
    options = {"samples": 20, "seed": 1, "split": "val"}
    first = prepare("shapes", None, tmp_path / "first", options=options)
    again = prepare("shapes", None, tmp_path / "again", options=options)

    assert (first.rows, first.digest) == (20, again.digest)
    names = sorted(path.name for path in (tmp_path / "first").iterdir() if path.suffix == ".parquet")
    assert names
    assert all((tmp_path / "first" / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in names)


def test_wrong_options_are_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="no split 'test'; wanted one of train, val, val_unseen"):
        prepare("shapes", None, "unused", options={"split": "test"})
    with pytest.raises(ConfigError, match="--samples does not belong to coco, which takes no option"):
        prepare("coco", "somewhere", "unused", options={"samples": 3})
    with pytest.raises(ConfigError, match="give --in with images/ and instances"):
        prepare("coco", None, "unused")
