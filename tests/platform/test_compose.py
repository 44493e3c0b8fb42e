"""Composition: questions name exactly the targets their answers mark, within the limits, fixed by the generator."""

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixellm.errors import DataError
from pixellm.platform.data.askable import askable_units
from pixellm.platform.data.compose import ComposeLimits, QuestionSource, can_compose, compose
from pixellm.platform.data.order import MixtureOrder
from pixellm.platform.data.phrases import plural, position_phrases
from pixellm.platform.data.schema import Row, RowDialogue
from pixellm.platform.data.shards import open_shards, write_shards
from pixellm.platform.data.sources import get_source
from pixellm.platform.data.sources.base import Ledger
from pixellm.platform.data.templates import MULTI_ANSWERS, MULTI_QUESTIONS, SINGLE_ANSWERS, SINGLE_QUESTIONS
from tests.platform.data_builders import row, target, vqa


@pytest.fixture(scope="module")
def demo_rows(demo_data: Path) -> list[Row]:
    return list(get_source("coco").rows(str(demo_data), Ledger(strict=True)))


@given(seed=st.integers(0, 2**32), limits=st.tuples(st.integers(1, 6), st.integers(1, 3), st.sampled_from([0.0, 0.01])))
@settings(max_examples=60, deadline=None)
def test_composed_questions_hold_their_limits_and_mark_each_target_once(
    demo_rows: list[Row], seed: int, limits: tuple[int, int, float]
) -> None:
    bounds = ComposeLimits(*limits)
    sample = demo_rows[seed % len(demo_rows)]
    dialogue = compose(sample, "segmentation", np.random.default_rng(seed), bounds)

    assert 1 <= len(dialogue.turns) <= bounds.max_questions
    assert len(set(dialogue.target_indices)) == len(dialogue.target_indices)
    for turn in dialogue.turns:
        assert 1 <= len(turn.target_indices) <= bounds.max_targets
        assert turn.answer.count("{seg}") == len(turn.target_indices)
        assert not re.findall(r"\{(?!seg\})", turn.question + turn.answer)
        for index in turn.target_indices:
            asked = sample.targets[index]
            assert asked.area >= bounds.min_target_share * sample.height * sample.width
            assert asked.phrase in turn.question or plural(asked.category) in turn.question


def test_a_picture_gets_as_many_questions_as_it_must_where_it_has_so_many_things(demo_rows: list[Row]) -> None:
    few = ComposeLimits(max_targets=3, max_questions=3)
    least = ComposeLimits(max_targets=3, max_questions=3, min_questions=3)
    counts = {few: [], least: []}
    for limits, found in counts.items():
        for seed, sample in enumerate(demo_rows * 4):
            units = askable_units(sample, "segmentation", limits)
            if sum(len(unit.target_indices) == 1 for unit in units) >= 3:
                found.append(len(compose(sample, "segmentation", np.random.default_rng(seed), limits).turns))
    assert set(counts[least]) == {3}
    assert {1, 2} <= set(counts[few])


def test_a_name_in_a_question_means_one_thing_in_the_picture(demo_rows: list[Row]) -> None:
    for seed, sample in enumerate(demo_rows * 4):
        dialogue = compose(sample, "segmentation", np.random.default_rng(seed), ComposeLimits(3, 2))
        for turn in dialogue.turns:
            for index in turn.target_indices:
                asked = sample.targets[index]
                namesakes = [i for i, other in enumerate(sample.targets) if other.phrase == asked.phrase]
                everyone = [i for i, other in enumerate(sample.targets) if other.category == asked.category]
                assert namesakes == [index] or set(everyone) <= set(turn.target_indices)


def test_the_kth_marker_follows_the_name_of_the_kth_target(demo_rows: list[Row]) -> None:
    for seed, sample in enumerate(demo_rows):
        dialogue = compose(sample, "segmentation", np.random.default_rng(seed), ComposeLimits(4))
        for turn in dialogue.turns:
            before_marker = turn.answer.lower().split("{seg}")
            for position, index in enumerate(turn.target_indices):
                assert sample.targets[index].category.lower() in before_marker[position]


def test_the_generator_alone_decides_the_text(demo_rows: list[Row]) -> None:
    def texts(seed: int) -> list:
        rng = np.random.default_rng(seed)
        return [compose(sample, "segmentation", rng, ComposeLimits(4, 2)) for sample in demo_rows]

    assert texts(3) == texts(3)
    assert sum(a != b for a, b in zip(texts(3), texts(4), strict=True)) > len(demo_rows) / 2


def test_every_template_is_reached_and_there_are_enough_of_them() -> None:
    pets = row("pets", [target("cat", (0, 0, 20, 20)), target("dog", (30, 0, 50, 20))])
    said = set()
    for seed in range(400):
        (turn,) = compose(pets, "segmentation", np.random.default_rng(seed), ComposeLimits(2)).turns
        said.add((turn.question.replace("dog", "cat"), turn.answer.replace("dog", "cat")))
    singles = [(q, a) for q, a in said if a.count("{seg}") == 1]

    assert len({q for q, _ in singles}) == len(SINGLE_QUESTIONS) >= 8
    assert len({a for _, a in singles}) == len(SINGLE_ANSWERS) >= 5
    assert len({q for q, a in said if a.count("{seg}") == 2}) == len(MULTI_QUESTIONS) >= 8
    assert len({a for _, a in said if a.count("{seg}") == 2}) == len(MULTI_ANSWERS) >= 5


def test_a_category_that_occurs_several_times_is_asked_for_as_a_whole() -> None:
    birds = row("birds", [target("bird", (x, 0, x + 5, 20)) for x in (0, 1, 2)])
    dialogue = compose(birds, "segmentation", np.random.default_rng(0), ComposeLimits(3))

    assert "all the birds" in dialogue.turns[0].question
    assert dialogue.target_indices == (0, 1, 2)
    assert not can_compose(birds, "segmentation", ComposeLimits(2))


def test_a_description_keeps_its_own_article_and_is_no_complete_category() -> None:
    described = [target("cat", (x, 0, x + 9, 20), phrase=f"the cat at {x}") for x in (0, 30)]
    for seed in range(20):
        (turn,) = compose(row("a", described), "segmentation", np.random.default_rng(seed), ComposeLimits(2)).turns
        assert "the the" not in (turn.question + turn.answer).lower()
        assert "all the cats" not in turn.question


def test_crowds_and_small_targets_are_never_asked_for() -> None:
    crowd = row("crowd", [target("person", (0, 0, 9, 9)), target("person", (20, 0, 60, 40), is_ignore=True)])
    small = row("small", [target("cup", (0, 0, 3, 3)), target("cat", (20, 0, 60, 40))])

    assert not can_compose(crowd, "segmentation", ComposeLimits())
    for seed in range(20):
        dialogue = compose(small, "segmentation", np.random.default_rng(seed), ComposeLimits(min_target_share=0.01))
        assert dialogue.target_indices == (1,)
    with pytest.raises(DataError, match="test crowd cannot give a segmentation question"):
        compose(crowd, "segmentation", np.random.default_rng(0), ComposeLimits())


def test_written_dialogues_come_word_for_word_and_only_within_the_limits() -> None:
    two = RowDialogue("muse", "Which?", "The cat {seg} and the cup {seg}.", (0, 1), ("the cat", "the cup"))
    one = RowDialogue("muse", "Who?", "The cat {seg}.", (0,), ("the cat",))
    sample = row("a", [target("cat", (0, 0, 30, 30)), target("cup", (40, 0, 42, 2))], [two, one, vqa("A cat.")])

    def muse(limits: ComposeLimits) -> set:
        rngs = [np.random.default_rng(seed) for seed in range(12)]
        return {turn for rng in rngs for turn in compose(sample, "muse", rng, limits).turns}

    assert muse(ComposeLimits(3)) == {(d.question, d.answer, d.target_ids) for d in (one, two)}
    assert muse(ComposeLimits(1)) == muse(ComposeLimits(3, 1, 0.01)) == {("Who?", "The cat {seg}.", (0,))}
    assert compose(sample, "vqa", np.random.default_rng(0), ComposeLimits()).turns[0].answer == "A cat."


def test_a_source_counts_only_rows_that_can_give_its_question(tmp_path: Path) -> None:
    rows = [
        row("only text", [], [vqa("Nothing here.")]),
        row("only masks", [target("cat", (0, 0, 30, 30))]),
        row("both", [target("dog", (0, 0, 30, 30))], [vqa("A dog.")]),
    ]
    write_shards(rows, tmp_path / "set", name="set")
    segmentation = QuestionSource.open(tmp_path / "set", "segmentation", ComposeLimits())
    written = pickle.loads(pickle.dumps(QuestionSource.open(tmp_path / "set", "vqa", ComposeLimits())))

    assert (segmentation.rows.tolist(), written.rows.tolist()) == ([1, 2], [0, 2])
    order = MixtureOrder([len(segmentation), len(written)], [1, 1], 0)
    drawn = [(segmentation, written)[draw.source].sample(draw) for draw in order.draws(0, 8)]
    assert sorted(sample.image_id for sample, _ in drawn) == ["both"] * 4 + ["only masks"] * 2 + ["only text"] * 2
    with pytest.raises(DataError, match=r"none of the 3 rows .* muse question"):
        QuestionSource.open(tmp_path / "set", "muse", ComposeLimits())
    assert len(open_shards(tmp_path / "set")) == 3


@pytest.mark.parametrize(
    ("boxes", "phrases"),
    [
        ([(0, 0, 10, 10)], ["cat"]),
        ([(50, 0, 60, 10), (0, 0, 10, 10)], ["right cat", "left cat"]),
        ([(0, 30, 10, 40), (0, 0, 10, 10)], ["lower cat", "upper cat"]),
        ([(0, 0, 10, 10), (1, 0, 11, 10)], ["cat", "cat"]),
        ([(25, 0, 35, 9), (50, 0, 60, 9), (0, 0, 10, 9)], ["middle cat", "right cat", "left cat"]),
        (
            [(0, 0, 8, 9), (18, 0, 26, 9), (36, 0, 44, 9), (50, 0, 60, 9)],
            ["leftmost cat", "cat", "cat", "rightmost cat"],
        ),
    ],
)
def test_positions_are_named_only_where_they_are_clear(boxes: list, phrases: list[str]) -> None:
    assert position_phrases("cat", boxes, 40, 60) == phrases


@pytest.mark.parametrize(
    ("one", "many"),
    [("cat", "cats"), ("wine glass", "wine glasses"), ("person", "people"), ("knife", "knives"), ("couch", "couches"),
     ("berry", "berries"), ("toy", "toys"), ("skis", "skis"), ("sheep", "sheep")],
)  # fmt: skip
def test_plurals_read_as_english(one: str, many: str) -> None:
    assert plural(one) == many


@given(seed=st.integers(0, 2**32), max_questions=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_a_later_turn_is_only_asked_right_after_the_turns_before_it(seed: int, max_questions: int) -> None:
    lengths = {"a": 3, "b": 1, "c": 2}
    dialogues = [RowDialogue("vqa", f"{name}{k}?", "yes", turn=k) for name, n in lengths.items() for k in range(n)]
    sample = row("1", dialogues=dialogues)

    turns = compose(sample, "vqa", np.random.default_rng(seed), ComposeLimits(1, max_questions)).turns

    asked = [turn.question for turn in turns]
    assert len(set(asked)) == len(asked) <= max_questions
    for place, question in enumerate(asked):
        name, k = question[0], int(question[1])
        assert asked[place - k : place] == [f"{name}{before}?" for before in range(k)]
        assert k + 1 == lengths[name] or place + 1 == len(asked) or asked[place + 1] == f"{name}{k + 1}?"


def test_a_conversation_ends_before_a_turn_that_is_not_usable() -> None:
    sizes = (0, 2, 0)
    said = [RowDialogue("muse", f"{k}?", "{seg} " * n, tuple(range(n)), ("it",) * n, k) for k, n in enumerate(sizes)]
    targets = [target("cat", (0, 0, 9, 9)), target("dog", (20, 0, 29, 9))]
    turns = compose(row("1", targets, said), "muse", np.random.default_rng(0), ComposeLimits(1, 3)).turns

    assert {turn.question for turn in turns} == {"0?"}
