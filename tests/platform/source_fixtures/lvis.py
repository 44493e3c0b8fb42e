"""lvis: ten genuine pictures' annotations of v0.5, and the same in v1's form; noise in place of the photographs."""

import json
from pathlib import Path
from typing import Any

from tests.platform.data_builders import jpeg
from tests.platform.source_fixtures import SourceFixture

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "lvis_v0.5_sample.json"


def content() -> dict[str, Any]:
    return json.loads(SAMPLE.read_text())


def expected_targets() -> tuple[int, int]:
    """(targets, ignore regions), counted in the JSON."""
    incomplete = {image["id"]: image["not_exhaustive_category_ids"] for image in content()["images"]}
    ignored = sum(entry["category_id"] in incomplete[entry["image_id"]] for entry in content()["annotations"])
    return len(content()["annotations"]) - ignored, ignored


def build_v05(folder: Path) -> None:
    (folder / "lvis_v0.5_val.json").write_text(SAMPLE.read_text())
    _pictures(folder)


def build_v1(folder: Path) -> None:
    sample = content()
    for image in sample["images"]:
        del image["file_name"]
    (folder / "annotations").mkdir()
    (folder / "annotations" / "lvis_v1_val.json").write_text(json.dumps(sample))
    _pictures(folder)


def _pictures(folder: Path) -> None:
    (folder / "val2017").mkdir()
    for image in content()["images"]:
        path = folder / "val2017" / f"{image['id']:012d}.jpg"
        path.write_bytes(jpeg(image["height"], image["width"], image["id"] % 1000))


FIXTURES = (
    SourceFixture("lvis", build_v05, 10, expected_targets()[0], variant="v0.5"),
    SourceFixture("lvis", build_v1, 10, expected_targets()[0], variant="v1", options={"split": "val"}),
)
