"""Feedback becomes data: what is sent is read back by the COCO source, masks equal."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fake_backend import FixedModels, ScriptedBackend
from pictures import data_url, picture_bytes

from pixellm.platform.data.sources.base import Ledger
from pixellm.platform.data.sources.coco import CocoSource
from pixellm.platform.masks import rle_decode, rle_encode
from pixellm.platform.settings import ServeSettings
from pixellm.serve.ingress import build_api
from pixellm.serve.mask_formats import mask_to_png_url
from pixellm.serve.metrics import ServiceMetrics

LYING = picture_bytes(
    12,
    8,
    "JPEG",
    exif=bytes.fromhex("457869660000") + b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0",
)
MASK = np.zeros((12, 8), dtype=bool)  # as a person sees the picture
MASK[2:7, 3:6] = True


def body(**fields: Any) -> dict[str, Any]:
    rle = rle_encode(MASK)
    mask = {"size": rle["size"], "counts": rle["counts"].decode()}
    targets = [
        {"index": 0, "verdict": "right", "phrase": "the cat", "mask": mask},
        {"index": 1, "verdict": "corrected", "phrase": "a bird", "mask": mask_to_png_url(~MASK)},
        {"index": 2, "verdict": "wrong", "phrase": "a bowl"},
    ]
    whole = {"answer_id": f"seg-{'0' * 32}", "model_version": "7", "image": data_url(LYING, "image/jpeg")}
    return whole | {"prompt": "Segment all.", "text": "the cat [1]", "targets": targets} | fields


def send(folder: Path | None, *bodies: dict[str, Any]) -> list[httpx.Response]:
    settings = ServeSettings(feedback_dir=None if folder is None else str(folder))
    app = build_api(FixedModels(ScriptedBackend()), settings, ServiceMetrics())

    async def exchange() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return [await client.post("/v1/feedback", json=body) for body in bodies]

    return asyncio.run(exchange())


def test_what_was_right_or_corrected_can_be_prepared_as_training_data(tmp_path: Path) -> None:
    first, second = send(tmp_path, body(), body(prompt="Once more."))
    assert (first.status_code, first.json()["kept_masks"], second.status_code) == (201, 2, 201)
    (part,) = tmp_path.iterdir()
    rows = list(CocoSource().rows(str(part), Ledger(strict=True)))
    assert len(rows) == 2
    assert (rows[0].height, rows[0].width, rows[0].image) == (12, 8, LYING)
    for target, (name, wanted) in zip(rows[0].targets, (("the cat", MASK), ("a bird", ~MASK)), strict=True):
        assert target.category == name
        np.testing.assert_array_equal(rle_decode(target.mask), wanted)
    records = [json.loads(line) for line in (part / "feedback.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in records] == ["Segment all.", "Once more."]
    assert records[0]["model_version"] == "7"
    assert records[0]["targets"][2]["verdict"] == "wrong"


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"answer_id": "../../x"}, 422),
        ({"image": data_url(b"no picture")}, 415),
        ({"image": "http://127.0.0.1/x"}, 400),
        ({"targets": [{"index": 0, "verdict": "right"}]}, 422),
        ({"targets": [{"index": 0, "verdict": "right", "mask": {"size": [3, 3], "counts": "05"}}]}, 422),
        ({"targets": [{"index": 0, "verdict": "right", "mask": {"size": [12, 8], "counts": "\x7f" * 9}}]}, 422),
        ({"targets": [{"index": 0, "verdict": "right", "mask": data_url(picture_bytes(3, 3))}]}, 422),
        ({"targets": [{"index": 0, "verdict": "corrected", "mask": [[0, 0, 900, 900, 1, 1]]}]}, 422),
        ({"targets": [{"index": 0, "verdict": "perhaps"}]}, 422),
        ({"secret": 1}, 422),
    ],
)
def test_feedback_that_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path, fields: Any, status: int) -> None:
    (response,) = send(tmp_path, body(**fields))
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert not list(tmp_path.iterdir())


def test_feedback_is_not_kept_unless_the_operator_says_where() -> None:
    (response,) = send(None, body())
    assert (response.status_code, response.json()["error"]["code"]) == (404, "feedback_off")
