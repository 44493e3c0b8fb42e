"""Groups of composed questions: classes and parts, referring expressions, negatives, varied wording; usable rows."""

import difflib
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pixellm.platform.data import templates
from pixellm.platform.data.askable import usable_dialogues
from pixellm.platform.data.compose import ComposeLimits, Dialogue, QuestionSource, can_compose, compose
from pixellm.platform.data.dialogue import Group
from pixellm.platform.data.order import MixtureOrder
from pixellm.platform.data.schema import Row, RowDialogue
from pixellm.platform.data.shards import write_shards
from pixellm.platform.data.sources.base import Ledger
from pixellm.platform.data.sources.shapes import ShapesSource
from pixellm.platform.data.usable import find_usable_rows
from pixellm.platform.data.variation import vary
from tests.platform.data_builders import row, target, vqa

GROUPS: tuple[Group, ...] = ("segmentation", "semantic", "referring", "vqa", "muse")


def dialogues(sample: Row, group: Group, limits: ComposeLimits, count: int, vocabulary: tuple = ()) -> list[Dialogue]:
    return [compose(sample, group, np.random.default_rng(seed), limits, vocabulary) for seed in range(count)]


def expression(text: str, *targets: int) -> RowDialogue:
    return RowDialogue("referring", text, "", targets)


def test_referring_questions_ask_by_expression_for_one_to_six_targets_each_once() -> None:
    things = [target("man", (10 * n, 0, 10 * n + 8, 30)) for n in range(6)]
    said = [expression(f"man number {n}", n) for n in range(6)] + [
        expression(f"the {n}th from the left", n) for n in range(6)
    ]
    sample = row("men", things, said)
    numbers = set()
    for dialogue in dialogues(sample, "referring", ComposeLimits(6, 2), 200):
        assert len(set(dialogue.target_indices)) == len(dialogue.target_indices)
        for turn in dialogue.turns:
            numbers.add(len(turn.target_indices))
            for index in turn.target_indices:
                names = (f"the man number {index}", f"the {index}th from the left")
                assert sum(name in turn.question for name in names) == 1
                (name,) = (name for name in names if name in turn.question)
                assert name.lower() in turn.answer.lower()
            assert "the the" not in turn.question
    assert numbers == {1, 2, 3, 4, 5, 6}


def test_an_expression_for_several_targets_marks_them_all() -> None:
    sample = row("a", [target("cup", (0, 0, 20, 20)), target("cup", (30, 0, 50, 20))], [expression("two cups", 0, 1)])
    for dialogue in dialogues(sample, "referring", ComposeLimits(3), 10):
        assert dialogue.target_indices == (0, 1)
        assert dialogue.turns[0].answer.count("{seg}") == 2
    assert not can_compose(sample, "referring", ComposeLimits(1))


def test_classes_are_asked_for_as_wholes_and_parts_by_what_they_belong_to() -> None:
    sample = row("a", [target("sky", (0, 0, 60, 20)), target("mug:handle", (0, 25, 30, 40))])
    questions = {turn.question for d in dialogues(sample, "semantic", ComposeLimits(2), 300) for turn in d.turns}
    of_handle = {question for question in questions if "sky" not in question}
    assert all("the handle of the mug" in question for question in of_handle)
    assert len(of_handle) == len(templates.CLASS_QUESTIONS)
    of_both = {question for question in questions if "sky" in question and "handle" in question}
    assert len(of_both) == 2 * len(templates.CLASSES_QUESTIONS)  # both begin at the left edge, so either is first
    pieces = [target("mug:handle", (0, 0, 20, 20)), target("mug:handle", (30, 0, 50, 20))]
    (turn,) = dialogues(row("b", pieces), "semantic", ComposeLimits(2), 1)[0].turns
    assert "all the handles of the mugs" in turn.question


def test_negative_questions_name_what_is_absent_at_the_asked_rate_and_mark_nothing() -> None:
    sample = row("a", [target("cat", (0, 0, 20, 20)), target("dog", (30, 0, 50, 20))])
    limits = ComposeLimits(2, 1, negative_share=0.3)
    negative = [
        d for d in dialogues(sample, "segmentation", limits, 1000, ("cat", "cup", "dog")) if not d.target_indices
    ]
    assert 250 < len(negative) < 350
    for dialogue in negative:
        assert "the cup" in dialogue.turns[0].question
        assert "the cup" in dialogue.turns[0].answer.lower()
        assert "{" not in dialogue.turns[0].answer
    assert all(d.target_indices for d in dialogues(sample, "segmentation", limits, 50))  # nothing known to be absent


def test_absent_things_come_from_the_row_before_the_vocabulary() -> None:
    own = [RowDialogue("absent", "zebra", ""), expression("nobody there"), expression("my cat", 0)]
    sample = row("a", [target("cat", (0, 0, 20, 20))], own)
    limits = ComposeLimits(1, 1, negative_share=0.9)
    for group in ("segmentation", "referring"):
        absent = [d.turns[0].question for d in dialogues(sample, group, limits, 60, ("cup",)) if not d.target_indices]
        assert absent
        assert all("zebra" in question or "nobody there" in question for question in absent)


def test_varied_questions_stay_close_and_answers_stay_as_they_are() -> None:
    question = "Can you segment the yellow umbrella in this image?"
    varied = [vary(question, np.random.default_rng(seed)) for seed in range(200)]
    assert len(set(varied)) > 60
    for text in varied:
        assert difflib.SequenceMatcher(None, question.lower(), text.lower()).ratio() > 0.7
    assert [vary(question, np.random.default_rng(seed)) for seed in range(20)] == varied[:20]

    sample = row("a", [target("umbrella", (0, 0, 20, 20))])
    plain = dialogues(sample, "segmentation", ComposeLimits(1), 300)
    changed = dialogues(sample, "segmentation", ComposeLimits(1, variation=0.5), 300)
    assert [d.turns[0].answer for d in plain] == [d.turns[0].answer for d in changed]
    share = np.mean([a.turns[0].question != b.turns[0].question for a, b in zip(plain, changed, strict=True)])
    assert 0.35 < share < 0.55


def test_no_template_leaves_a_gap_unfilled_and_none_stands_twice() -> None:
    sets = {name: value for name, value in vars(templates).items() if name.isupper()}
    for name, lines in sets.items():
        assert len(set(lines)) == len(lines) >= 5, name
        for line in lines:
            assert set(re.findall(r"\{(\w+)\}", line)) <= {"objects", "named", "Named", "listed", "Listed", "seg"}
            assert ("{objects}" in line) == name.endswith("QUESTIONS")


NAMES = st.sampled_from(["cat", "dog", "the old cup", "a hat"])


@st.composite
def random_rows(draw: st.DrawFn) -> list[Row]:
    def some_target(number: int) -> object:
        x = draw(st.integers(0, 40))
        category = draw(NAMES)
        phrase = draw(st.sampled_from([category, f"left {category}", "the one here"]))
        size = draw(st.integers(2, 18))
        return target(category, (x, 0, x + size, size), phrase=phrase, is_ignore=draw(st.integers(0, 6)) == 0)

    made = []
    for number in range(draw(st.integers(1, 6))):
        targets = [some_target(n) for n in range(draw(st.integers(0, 4)))]
        real = [n for n, one in enumerate(targets) if not one.is_ignore]
        said: list[RowDialogue] = [vqa("Pets.")] * draw(st.integers(0, 1))
        for _ in range(draw(st.integers(0, 2)) if real else 0):
            ids = tuple(draw(st.lists(st.sampled_from(real), min_size=0, max_size=3, unique=True)))
            said.append(expression("my pet", *ids))
            for turn in range(draw(st.integers(1, 3))):
                ids = tuple(draw(st.lists(st.sampled_from(real), min_size=0, max_size=3, unique=True)))
                answer = "It is {seg}" * len(ids)
                said.append(RowDialogue("muse", f"Which {turn}?", answer, ids, ("it",) * len(ids), turn))
        made.append(row(str(number), targets, said))
    return made


@given(random_rows(), st.integers(1, 3), st.sampled_from([0.0, 0.02]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_scan_of_columns_finds_the_rows_that_row_by_row_composing_accepts(
    tmp_path: Path, rows: list[Row], max_targets: int, min_share: float
) -> None:
    from pixellm.platform.data.shards import open_shards

    write_shards(rows, tmp_path / "set", name="set", rows_per_part=4)
    dataset, limits = open_shards(tmp_path / "set"), ComposeLimits(max_targets, 1, min_share)
    for group in GROUPS:
        expected = [number for number, one in enumerate(rows) if can_compose(one, group, limits)]
        found = find_usable_rows(dataset, group, limits)
        assert found.rows.tolist() == expected
        if group in ("muse", "vqa"):
            turns = [[said.turn for said in usable_dialogues(rows[number], group, limits)] for number in expected]
            assert [found.written_turns(index).tolist() for index in range(len(found))] == turns


@pytest.fixture(scope="module")
def shapes_uri(tmp_path_factory: pytest.TempPathFactory) -> Path:
    uri = tmp_path_factory.mktemp("shapes") / "train"
    write_shards(ShapesSource(samples=60).rows("", Ledger()), uri, name="shapes", rows_per_part=25)
    return uri


@pytest.mark.parametrize("group", ["muse", "segmentation"])
def test_a_text_length_foretold_without_the_row_follows_the_real_one(shapes_uri: Path, group: Group) -> None:
    source = QuestionSource.open(shapes_uri, group, ComposeLimits(4, 2))
    foretold, real = [], []
    for draw in MixtureOrder([len(source)], [1], seed=1).draws(0, 200):
        _, dialogue = source.sample(draw)
        foretold.append(source.text_length(draw))
        real.append(sum(len(turn.question + turn.answer) + 13 * len(turn.target_indices) for turn in dialogue.turns))
    assert np.corrcoef(foretold, real)[0, 1] > (0.99 if group == "muse" else 0.9)
    assert np.mean(foretold) == pytest.approx(np.mean(real), rel=0.15)


def test_shards_of_exhaustively_annotated_sources_know_their_vocabulary(shapes_uri: Path) -> None:
    source = QuestionSource.open(shapes_uri, "segmentation", ComposeLimits(2, negative_share=0.5))
    assert source.usable.vocabulary == ("ball", "box", "kite", "star")
    for draw in MixtureOrder([len(source)], [1], seed=1).draws(0, 60):
        sample, dialogue = source.sample(draw)
        if not dialogue.target_indices:
            present = {one.category for one in sample.targets}
            (named,) = {
                kind for kind in source.usable.vocabulary if re.search(rf"the {kind}\b", dialogue.turns[0].question)
            }
            assert named not in present
