"""shapes: generated, so that there is nothing to read."""

from pathlib import Path

from pixellm.platform.data.sources.shapes import ShapesSource
from tests.platform.source_fixtures import SourceFixture


def build(folder: Path) -> None:
    del folder


_SAMPLES = 12

FIXTURES = (
    SourceFixture(
        "shapes",
        build,
        rows=_SAMPLES,
        targets=sum(len(ShapesSource().row_at(index).targets) for index in range(_SAMPLES)),
        options={"samples": _SAMPLES},
    ),
)
