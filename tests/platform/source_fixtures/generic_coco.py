"""generic_coco: packaged photographs in a folder as people export it, with questions; and genuine crowd regions."""

import json
import shutil
from pathlib import Path

from tests.platform.data_builders import jpeg
from tests.platform.source_fixtures import SourceFixture
from tests.platform.source_fixtures.coco import DEMO

CROWDS = Path(__file__).resolve().parents[2] / "data" / "coco_crowds.json"


def build_with_questions(folder: Path) -> None:
    content = json.loads((DEMO / "instances.json").read_text())
    (folder / "_annotations.coco.json").write_text(json.dumps(content))
    for image in content["images"]:
        shutil.copy(DEMO / "images" / image["file_name"], folder)
    first = content["annotations"][0]
    (name,) = (image["file_name"] for image in content["images"] if image["id"] == first["image_id"])
    questions = [
        {"image": name, "question": "Where is it?", "answer": "Here {seg}.", "targets": [first["id"]]},
        {"image": name, "question": "What is it?", "answer": "A photograph."},
        {"image": name, "question": "Where is it?", "answer": "Here {seg}.", "targets": [-1]},
        {"image": name, "question": "Where is it?", "answer": "Here {seg}.", "targets": []},
        {"image": "absent.jpg", "question": "What is it?", "answer": "A photograph."},
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))


def build_crowds(folder: Path) -> None:
    content = json.loads(CROWDS.read_text())
    (folder / "annotations.json").write_text(json.dumps(content))
    (folder / "images").mkdir()
    for image in content["images"]:
        path = folder / "images" / image["file_name"]
        path.write_bytes(jpeg(image["height"], image["width"], image["id"] % 1000))


FIXTURES = (
    SourceFixture(
        "generic_coco",
        build_with_questions,
        rows=32,
        targets=202,
        skipped={
            "question about an unlisted picture": 1,
            "question needs a target that the picture does not have": 1,
            "answer's markers do not match its targets": 1,
        },
    ),
    SourceFixture("generic_coco", build_crowds, rows=5, targets=110, variant="crowds"),
)
