"""A trained model as a registered version that answers by itself, and the registry's commands."""

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from pixellm.jobs import models
from pixellm.platform import registry
from pixellm.platform.registry import ModelVersion
from pixellm.platform.settings import Settings, TrackingSettings
from pixellm.platform.tracking import start_run


def picture(seed: int) -> bytes:
    encoded = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 36, 3), np.uint8)
    Image.fromarray(pixels).resize((60, 40)).save(encoded, format="PNG")
    return encoded.getvalue()


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> TrackingSettings:
    return TrackingSettings(root=str(tmp_path_factory.mktemp("registry")))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained model, as training saves it."""
    from pixellm import PixelLMConfig, PixelLMForConditionalGeneration, PixelLMProcessor

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("trained")
    PixelLMForConditionalGeneration(PixelLMConfig.from_preset("tiny")).save_pretrained(folder)
    PixelLMProcessor.for_preset("tiny").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def version(model_dir: Path, tracking: TrackingSettings) -> ModelVersion:
    with start_run(Settings(tracking=tracking)) as run:
        return models.register_model(model_dir, run, {"giou": 0.625}, tags={"licence": "CC BY 4.0"})


@pytest.fixture(scope="module")
def loaded(version: ModelVersion, tracking: TrackingSettings) -> Any:
    import mlflow.pyfunc

    folder = Path(version.source.removeprefix("file://"))
    return mlflow.pyfunc.load_model(str(folder))


def in_registered_form(result: Any) -> dict[str, Any]:
    return {
        "text": result.text,
        "targets": [
            {
                "index": target.index,
                "phrase": target.phrase,
                "score": pytest.approx(target.score, abs=1e-6),
                "box": list(target.box_xyxy or ()),
                "area": target.area_px,
                "rle": target.rle,
            }
            for target in result.targets
        ],
    }


def test_a_registered_version_answers_as_the_engine_does_on_its_folder(loaded: Any, model_dir: Path) -> None:
    from pixellm import PixelLMEngine

    images = [picture(1), picture(2)]
    table = pd.DataFrame({"image": images, "prompt": ["Segment the cat.", "Where is the dog?"]})
    answers = loaded.predict(table, params={"threshold": 0.25, "max_new_tokens": 24})
    with PixelLMEngine.from_pretrained(model_dir) as engine:
        wanted = [
            engine.segment(image, prompt, threshold=0.25, max_new_tokens=24)
            for image, prompt in zip(images, table["prompt"], strict=True)
        ]
    assert answers == [in_registered_form(result) for result in wanted]


def test_base64_text_and_bytes_mean_the_same_picture(loaded: Any) -> None:
    image = picture(3)
    text = base64.b64encode(image).decode()
    table = pd.DataFrame({"image": [image, text, f"data:image/png;base64,{text}"], "prompt": ["Segment the cat."] * 3})
    first, second, third = loaded.predict(table, params={"max_new_tokens": 12})
    assert first == second == third


@pytest.mark.parametrize("image", ["not base64!", b"no picture"])
def test_what_is_no_picture_is_refused_with_a_reason(image: bytes | str, loaded: Any) -> None:
    with pytest.raises(Exception, match=r"picture|image"):
        loaded.predict(pd.DataFrame({"image": [image], "prompt": ["x"]}))


def test_the_masks_in_an_answer_are_cocos_run_lengths_of_the_pictures_size(model_dir: Path) -> None:
    """The shape of the registered form, on an answer that has targets whatever the untrained model says."""
    from pixellm.jobs.registered_model import _answer
    from pixellm.model.engine import SegmentationResult, TargetMask, Usage

    mask = np.zeros((40, 60), bool)
    mask[5:9, 10:30] = True
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    target = TargetMask(0, "cat", mask, 0.75, (10, 5, 30, 9), 80, {"size": [40, 60], "counts": rle["counts"].decode()})
    empty = TargetMask(1, "", np.zeros_like(mask), 0.0, None, 0, target.rle)
    answer = _answer(SegmentationResult("A cat [1] [2].", (target, empty), Usage(1, 2, 3), {}, None))
    assert json.loads(json.dumps(answer)) == answer
    first, second = answer["targets"]
    np.testing.assert_array_equal(coco_mask.decode(first["rle"]).astype(bool), mask)
    assert (first["box"], first["area"], first["score"]) == ([10.0, 5.0, 30.0, 9.0], 80, 0.75)
    assert second["box"] == []


def test_the_version_states_its_signature_and_carries_an_example_that_it_accepts(
    loaded: Any, version: ModelVersion
) -> None:
    signature = loaded.metadata.signature
    assert [(column.name, str(column.type)) for column in signature.inputs] == [
        ("image", "DataType.binary"),
        ("prompt", "DataType.string"),
    ]
    assert {parameter.name: parameter.default for parameter in signature.params} == {
        "threshold": 0.5,
        "max_new_tokens": 256,
    }
    example = loaded.metadata.load_input_example(version.source.removeprefix("file://"))
    [answer] = loaded.predict(example, params={"max_new_tokens": 4})
    assert set(answer) == {"text", "targets"}


_PLAIN_PROCESS = """
import sys
import mlflow.pyfunc
model = mlflow.pyfunc.load_model(sys.argv[1])
rows = {"image": [open(sys.argv[2], "rb").read()], "prompt": ["Segment it."]}
print(model.predict(rows, params={"max_new_tokens": 4}))
assert "ray" not in sys.modules
"""


def test_it_loads_by_its_reference_in_a_plain_process_without_ray(
    version: ModelVersion, tracking: TrackingSettings, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(picture(4))
    done = subprocess.run(
        [sys.executable, "-c", _PLAIN_PROCESS, "models:/pixellm@candidate", str(tmp_path / "a.png")],
        cwd=tmp_path,
        env=os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{tracking.root}/mlflow.db"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "'targets'" in done.stdout


def test_the_engine_reads_the_resolved_folder(
    version: ModelVersion, tracking: TrackingSettings, model_dir: Path
) -> None:
    folder = registry.resolve(version.reference, tracking)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in model_dir.iterdir())
    for path in model_dir.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_list_show_promote_and_rollback_say_what_happened(version: ModelVersion, tracking: TrackingSettings) -> None:
    refused = models.promote("models:/pixellm@candidate", floor=0.9, tracking=tracking)
    assert not refused.passed
    assert refused.to_text() == (
        "models:/pixellm/1 was not promoted: giou 0.625 is below the floor 0.9; the champion stays none"
    )
    passed = models.promote("models:/pixellm@candidate", floor=0.5, tracking=tracking)
    assert passed.to_json_dict()["champion_now"] == 1
    assert passed.to_text().startswith("models:/pixellm/1 is champion")
    listed = models.list_versions("pixellm", tracking)
    assert listed.to_text().splitlines()[0] == "pixellm: 1 version"
    assert "giou 0.625 @candidate @champion" in listed.to_text()
    shown = models.show_version("models:/pixellm@champion", tracking)
    assert shown.to_json_dict() == listed.to_json_dict()["versions"][0]
    assert version.run_id is not None
    assert version.run_id in shown.to_text()
    registry.set_alias("pixellm", "previous", 1, tracking)
    assert models.rollback("pixellm", tracking).version.aliases == ("candidate", "champion")
