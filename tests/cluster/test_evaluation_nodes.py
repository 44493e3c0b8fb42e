"""An evaluation on one, two and four raylets, and with one of four lost on the way, comes to what one process finds."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2]))  # for `from benchmarks import …`

from benchmarks.cluster_work import LOGICAL_CPUS, raylets
from benchmarks.untrained import write_untrained
from pixellm.jobs.evaluate.job import EvaluationOptions, evaluate_suite, read_samples
from pixellm.jobs.prepare import prepare_demo

pytestmark = [pytest.mark.drill, pytest.mark.timeout(900)]

_BATCH = 4
_SAME_IOU = 1e-3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers nothing but masks."""
    return write_untrained("tiny", tmp_path_factory.mktemp("model"), answers_with_masks=True)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's photographs with their MUSE questions."""
    folder = tmp_path_factory.mktemp("shards")
    prepare_demo(folder)
    return folder / "muse"


@pytest.fixture(scope="module")
def alone(model: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The samples of an evaluation in this process."""
    return _samples(model, shards, tmp_path_factory.mktemp("alone"), actors=0)


@pytest.mark.parametrize(("count", "is_one_lost"), [(1, False), (2, False), (4, False), (4, True)])
def test_it_finds_what_one_process_finds(
    count: int, is_one_lost: bool, model: Path, shards: Path, tmp_path: Path, alone: list[dict[str, Any]]
) -> None:
    size = LOGICAL_CPUS // count
    with raylets(count) as (cluster, nodes):

        def look(done: int, total: int) -> None:
            if is_one_lost and len(nodes) == count and 3 * done > total:
                cluster.remove_node(nodes.pop(), allow_graceful=False)  # each raylet has an actor of its size

        found = _samples(model, shards, tmp_path, actors=count, actor_cpus=size, on_progress=look)
    assert len(nodes) == count - is_one_lost
    assert [_words(sample) for sample in found] == [_words(sample) for sample in alone]
    assert [sample["giou"] for sample in found] == pytest.approx([sample["giou"] for sample in alone], abs=_SAME_IOU)


def _samples(model: Path, shards: Path, out: Path, *, on_progress: Any = None, **options: Any) -> list[dict[str, Any]]:
    chosen = EvaluationOptions(batch_size=_BATCH, with_report=False, **options)
    evaluate_suite(model, str(shards), out, "muse", chosen, on_progress=on_progress)
    return list(read_samples(out))


def _words(sample: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(sample[name] for name in ("sample_id", "question", "answer"))
