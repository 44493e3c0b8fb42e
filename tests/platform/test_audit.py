"""The audit: each kind of fault is found where it was planted and nowhere else, and the cleaned row is without it."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pixellm.platform.data.audit import BenchmarkPictures, Check, SeenQuestions, audit_row, hidden_targets
from pixellm.platform.data.picture_hash import has_detail, hash_distances, picture_hash
from pixellm.platform.data.schema import Row, RowDialogue
from pixellm.platform.masks import rle_decode
from tests.platform.data_builders import row, target, vqa

ALL = frozenset(Check)


def saved_again(encoded: bytes, quality: int, scale: float) -> bytes:
    picture = Image.open(io.BytesIO(encoded)).convert("RGB")
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photographs(demo_data: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((demo_data / "images").iterdir())]


def audited(sample: Row, benchmarks: BenchmarkPictures | None = None, checks: frozenset[Check] = ALL):
    return audit_row(sample, checks, benchmarks=benchmarks, seen=SeenQuestions())


def test_a_photograph_is_known_again_after_saving_it_smaller_or_worse_and_no_other_is_taken_for_it(
    photographs: list[bytes],
) -> None:
    hashes = np.stack([picture_hash(encoded) for encoded in photographs])
    for number, encoded in enumerate(photographs):
        distances = hash_distances(picture_hash(saved_again(encoded, 40, 0.5)), hashes)
        assert distances[number] <= 6
        assert np.delete(distances, number).min() > 20


def test_a_picture_turned_by_exif_has_the_hash_of_what_is_seen(photographs: list[bytes]) -> None:
    seen = Image.open(io.BytesIO(photographs[0]))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    seen.rotate(90, expand=True).save(buffer, "JPEG", exif=exif, quality=95)
    assert hash_distances(picture_hash(buffer.getvalue()), picture_hash(photographs[0])[None])[0] <= 6


def test_leaks_are_found_by_content_by_looks_and_by_id_with_looks(photographs: list[bytes]) -> None:
    bench = [("val", row(str(number), image=encoded)) for number, encoded in enumerate(photographs[:5])]
    benchmarks = BenchmarkPictures(bench)
    again = saved_again(photographs[1], 40, 0.5)
    cropped = Image.open(io.BytesIO(photographs[2])).convert("RGB")
    margin = cropped.width // 30, cropped.height // 30
    cropped = cropped.crop((*margin, cropped.width - margin[0], cropped.height - margin[1]))
    buffer = io.BytesIO()
    cropped.save(buffer, "JPEG", quality=95)

    found = {
        "other name": audited(row("x", image=photographs[0]), benchmarks),
        "saved again": audited(row("y", image=again), benchmarks),
        "id and a crop": audited(row("2", image=buffer.getvalue()), benchmarks),
    }
    for name, words in (
        ("other name", "is picture 0 of val, byte for byte"),
        ("saved again", "looks like picture 1 of val"),
        ("id and a crop", "has the id and the looks of picture 2 of val"),
    ):
        findings, cleaned = found[name]
        assert cleaned is None
        assert [finding.check for finding in findings] == [Check.LEAK]
        assert findings[0].detail.startswith(words)
    for number, encoded in enumerate(photographs[5:]):
        assert audited(row(str(number), image=encoded), benchmarks)[0] == [], "the id alone says nothing"
    assert audited(row("x", image=photographs[0]), benchmarks, ALL - {Check.LEAK})[0] == []
    assert audited(row("x", image=photographs[0]), BenchmarkPictures([]))[0] == []


def test_pictures_of_one_colour_are_not_taken_for_each_other() -> None:
    def plain(value: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (60, 40), (value, value, value)).save(buffer, "PNG")
        return buffer.getvalue()

    assert not has_detail(picture_hash(plain(20)))
    assert audited(row("a", image=plain(20)), BenchmarkPictures([("val", row("b", image=plain(90)))]))[0] == []


boxes = st.tuples(st.integers(0, 50), st.integers(0, 30), st.integers(1, 20), st.integers(1, 15)).map(
    lambda b: (b[0], b[1], min(60, b[0] + b[2]), min(40, b[1] + b[3]))
)


@given(corners=st.lists(boxes, max_size=7), share=st.sampled_from([0.3, 0.6, 0.95, 1.0]))
@settings(max_examples=80, deadline=None)
def test_hidden_targets_are_those_of_a_brute_force_over_pixels(
    corners: list[tuple[int, int, int, int]], share: float
) -> None:
    targets = tuple(target("cat", box, is_ignore=number == 3) for number, box in enumerate(corners))
    masks = [rle_decode(one.mask) for one in targets]
    expected = {}
    for index, mask in enumerate(masks):
        over = np.zeros_like(mask)
        for place, other in enumerate(masks):
            if (other.sum(), place) < (mask.sum(), index) and place != 3:
                over |= other
        if index != 3 and (mask & over).sum() / mask.sum() >= share:
            expected[index] = (mask & over).sum() / mask.sum()
    assert hidden_targets(targets, share) == pytest.approx(expected)


def test_a_hidden_target_becomes_an_ignore_region_and_its_questions_go() -> None:
    targets = [target("table", (0, 0, 20, 20)), target("cloth", (0, 0, 20, 19)), target("car", (30, 0, 50, 20))]
    targets += [target("car:wheel", (30, 0, 50, 19))]
    dialogues = [RowDialogue("muse", f"{n}?", "{seg}", (n,), ("x",)) for n in range(4)]
    findings, cleaned = audited(row("1", targets, dialogues))

    assert [(finding.check, finding.detail) for finding in findings] == [
        (Check.HIDDEN, "table (table-0-0): 95% of it lies under others")
    ]
    assert cleaned is not None
    assert cleaned.targets[0].is_ignore
    assert not cleaned.targets[1].is_ignore
    assert not cleaned.targets[2].is_ignore, "a part does not hide its whole"
    assert [dialogue.question for dialogue in cleaned.dialogues] == ["1?", "2?", "3?"]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (RowDialogue("vqa", "Why?", "  "), "there is no answer"),
        (RowDialogue("vqa", "Why?", " ."), "there is no answer"),
        (RowDialogue("vqa", " ", "Yes"), "there is no question"),
        (RowDialogue("muse", "Why?", "It is {seg} and {seg}.", (0,)), "2 markers for 1 targets"),
        (RowDialogue("muse", "Why?", "It is here.", (0,)), "0 markers for 1 targets"),
        (RowDialogue("referring", " ", "", (0,)), "there is no question"),
    ],
)
def test_an_empty_answer_is_found_and_the_conversation_ends_before_it(fault: RowDialogue, words: str) -> None:
    sound = [vqa("A cat."), RowDialogue("referring", "the cat", "", (0,)), RowDialogue("absent", "dog", "")]
    follow_up = RowDialogue("vqa", "And then?", "Nothing.", turn=1)
    findings, cleaned = audited(row("1", [target("cat", (1, 1, 9, 9))], [*sound, fault, follow_up]))

    assert [finding.check for finding in findings] == [Check.EMPTY]
    assert findings[0].detail.endswith(words)
    assert cleaned is not None
    assert list(cleaned.dialogues) == sound


def test_a_question_asked_twice_of_one_picture_is_found_over_rows_and_case() -> None:
    seen = SeenQuestions()
    one = row("1", dialogues=[RowDialogue("vqa", "Who  sleeps?", "A cat."), RowDialogue("vqa", "Who runs?", "A dog.")])
    two = row("1", dialogues=[RowDialogue("vqa", "who sleeps?", "It."), RowDialogue("vqa", "And?", "Yes.", turn=1)])
    other = row("2", dialogues=[RowDialogue("vqa", "Who sleeps?", "A cat.")])
    results = [audit_row(sample, ALL, benchmarks=None, seen=seen) for sample in (one, two, other)]

    assert [[finding.check for finding in findings] for findings, _ in results] == [[], [Check.REPEATED], []]
    assert results[0][1] is one
    assert results[1][1] is None, "nothing is left of it"
