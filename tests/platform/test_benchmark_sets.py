"""Benchmark sets: questions with as many targets as asked, no picture in two splits, the same seed the same set."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixellm.errors import ConfigError
from pixellm.platform.data.benchmark_sets import assign_splits, keep_questions, multi_referring_row, pack_sizes
from pixellm.platform.data.schema import Row, RowDialogue
from tests.platform.data_builders import row, target


@given(count=st.integers(0, 200), smallest=st.integers(1, 8), extra=st.integers(0, 8))
def test_groups_hold_as_many_as_asked_and_leave_out_no_more_than_they_must(
    count: int, smallest: int, extra: int
) -> None:
    largest = smallest + extra
    sizes = pack_sizes(count, smallest, largest)

    most = [0] * (count + 1)
    for number in range(1, count + 1):
        most[number] = max(
            [most[number - 1], *(most[number - k] + k for k in range(smallest, largest + 1) if k <= number)]
        )
    assert all(smallest <= size <= largest for size in sizes)
    assert sum(sizes) == most[count]
    assert not sizes or max(sizes) - min(sizes) <= 1


def referring_row(image_id: str, num_expressions: list[int]) -> Row:
    targets = [target("cat", (4 * place, 0, 4 * place + 3, 9)) for place in range(len(num_expressions))]
    dialogues = [
        RowDialogue("referring", f"cat {place} way {number}", "", (place,), (f"cat {place} way {number}",))
        for place, count in enumerate(num_expressions)
        for number in range(count)
    ]
    return row(image_id, targets, dialogues, source="refcoco")


@given(
    counts=st.lists(st.integers(0, 4), max_size=14),
    seed=st.integers(0, 1000),
    bounds=st.sampled_from([(3, 6), (1, 1), (2, 4), (5, 6)]),
)
@settings(max_examples=80, deadline=None)
def test_multi_referring_questions_ask_for_different_targets_each_by_its_own_unused_words(
    counts: list[int], seed: int, bounds: tuple[int, int]
) -> None:
    single = referring_row("7", counts)
    made = multi_referring_row(single, seed=seed, min_targets=bounds[0], max_targets=bounds[1])

    enough = sum(count > 0 for count in counts) >= bounds[0]
    assert (made is not None) == enough
    if made is None:
        return
    owner = {dialogue.question: dialogue.target_ids[0] for dialogue in single.dialogues}
    used = Counter(phrase for dialogue in made.dialogues for phrase in dialogue.phrases)
    assert max(used.values()) == 1
    for dialogue in made.dialogues:
        assert bounds[0] <= len(dialogue.target_ids) <= bounds[1]
        assert len(set(dialogue.target_ids)) == len(dialogue.target_ids)
        assert [owner[phrase] for phrase in dialogue.phrases] == list(dialogue.target_ids)
        listed = ", ".join(f"the {phrase}" for phrase in dialogue.phrases)
        assert dialogue.question == f"Please segment {listed}."
        assert dialogue.answer.lower() == ", ".join(f"the {phrase} {{seg}}" for phrase in dialogue.phrases) + "."
    assert made == multi_referring_row(single, seed=seed, min_targets=bounds[0], max_targets=bounds[1])


def test_another_seed_or_picture_gives_another_choice() -> None:
    asked = {
        multi_referring_row(referring_row(image_id, [2] * 6), seed=seed).dialogues
        for seed in range(3)
        for image_id in ("1", "2")
    }  # type: ignore[union-attr]
    assert len(asked) == 6


def test_words_that_mean_two_things_several_targets_or_none_are_not_asked() -> None:
    plain = referring_row("1", [1, 1, 1])
    others = [
        RowDialogue("referring", "Cat 0 way 0", "", (1,)),
        RowDialogue("referring", "all of them", "", (0, 1, 2)),
        RowDialogue("referring", "the dog", "", ()),
    ]
    mixed = row("1", plain.targets, (*plain.dialogues, *others), source="refcoco")

    assert multi_referring_row(mixed, seed=0) is None
    made = multi_referring_row(mixed, seed=0, min_targets=2)
    assert made is not None
    assert [sorted(dialogue.phrases) for dialogue in made.dialogues] == [["cat 1 way 0", "cat 2 way 0"]]


@given(
    ids=st.lists(st.integers(0, 10**6).map(str), min_size=40, max_size=120, unique=True),
    seed=st.integers(0, 1000),
    shares=st.tuples(st.floats(0.05, 0.4), st.floats(0.05, 0.4)),
)
@settings(max_examples=50, deadline=None)
def test_each_picture_is_in_one_split_of_the_asked_size_whatever_the_order(
    ids: list[str], seed: int, shares: tuple[float, float]
) -> None:
    asked = dict(zip(("val", "test"), shares, strict=True))
    split_of = assign_splits(ids, asked, seed)

    assert split_of.keys() == set(ids)
    counts = Counter(split_of.values())
    assert all(abs(counts[split] - share * len(set(ids))) <= 0.5 for split, share in asked.items())
    assert split_of == assign_splits(reversed([*ids, ids[0]]), asked, seed)


def test_a_new_picture_moves_few_others_and_another_seed_moves_many() -> None:
    ids = [str(number) for number in range(1000)]
    before = assign_splits(ids, {"val": 0.1, "test": 0.1}, 0)
    after = assign_splits([*ids, "new"], {"val": 0.1, "test": 0.1}, 0)
    other = assign_splits(ids, {"val": 0.1, "test": 0.1}, 1)

    assert sum(before[image_id] != after[image_id] for image_id in ids) <= 2
    assert sum(before[image_id] != other[image_id] for image_id in ids) > 200


def test_shares_that_leave_a_split_empty_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"0\.01 of 10 pictures leaves the split val empty"):
        assign_splits(map(str, range(10)), {"val": 0.01}, 0)
    with pytest.raises(ConfigError, match="together below 1"):
        assign_splits(map(str, range(10)), {"val": 0.5, "test": 0.5}, 0)


def test_questions_are_told_apart_by_their_targets() -> None:
    numbers = (0, 1, 3, 4)
    dialogues = [RowDialogue("muse", f"{n}?", "{seg} " * n, tuple(range(n))) for n in numbers]
    sample = row("1", [target("cat", (4 * n, 0, 4 * n + 3, 9)) for n in range(4)], dialogues)

    few, many = keep_questions(sample, max_targets=3), keep_questions(sample, min_targets=4)
    assert few is not None
    assert many is not None
    assert [d.question for d in few.dialogues] == ["1?", "3?"]
    assert [d.question for d in many.dialogues] == ["4?"]
    assert keep_questions(sample, min_targets=5) is None
