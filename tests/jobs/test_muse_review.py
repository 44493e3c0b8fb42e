"""The review page and its API on real data: decisions carry a name and a time, are on disk, and change the data."""

import json
import shutil
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import uvicorn
from fastapi.testclient import TestClient
from playwright.sync_api import expect, sync_playwright

from pixellm.errors import DataError
from pixellm.jobs.muse.assemble import muse_row
from pixellm.jobs.muse.outcomes import Pair
from pixellm.jobs.muse.released import write_released
from pixellm.jobs.muse.review import build_review_app
from pixellm.jobs.muse.review_data import ReviewFolder, apply_review
from pixellm.platform.data.shards import open_shards, write_shards
from tests.waiting import wait_until


@pytest.fixture
def dataset(tmp_path: Path, demo_shards: dict[str, str]) -> Path:
    """Six of the demo's hand-written questions as a `train` split, in both forms."""
    rows = list(open_shards(demo_shards["muse"]).scan(with_images=True))[:6]
    pairs = [[Pair(one.question, one.answer, one.target_ids, one.phrases) for one in row.dialogues] for row in rows]
    kept = [muse_row(row, mine) for row, mine in zip(rows, pairs, strict=True)]
    write_shards(kept, tmp_path / "set" / "train", name="muse-train", notes={"source": "by hand"})
    write_released(kept, tmp_path / "set" / "released" / "train")
    return tmp_path / "set"


@pytest.fixture
def client(dataset: Path) -> TestClient:
    return TestClient(build_review_app(ReviewFolder(str(dataset)), "Ada"))


def questions(dataset: Path) -> list[str]:
    return [turn.question for row in open_shards(dataset / "train").scan() for turn in row.dialogues]


def test_decisions_are_files_with_who_and_when_and_writing_back_changes_both_forms(
    dataset: Path, client: TestClient
) -> None:
    before = questions(dataset)
    first, second, third = (client.get(f"/api/items/train/{number}").json() for number in range(3))
    body = {"split": "train", "who": " Grace  Hopper "}
    accept = body | {"position": 0, "pair": first["pairs"][0]["id"], "verdict": "accept"}
    reject = body | {"position": 1, "pair": second["pairs"][0]["id"], "verdict": "reject"}
    edit = body | {
        "position": 2,
        "pair": third["pairs"][0]["id"],
        "verdict": "edit",
        "question": "Where do I find something sweet and something to drink?",
        "answer": "Take the stack of cakes {seg} and the green drink {seg}.",
        "kept_targets": [2, 1],
        "phrases": ["the stack of cakes", "the green drink"],
    }
    for decision in (accept, reject, edit):
        assert client.post("/api/decisions", json=decision).status_code == 200
    files = sorted((dataset / "review").glob("*.json"))
    stored = [json.loads(path.read_text()) for path in files]
    assert [one["verdict"] for one in stored] == ["accept", "reject", "edit"]
    assert {one["who"] for one in stored} == {"Grace Hopper"}
    now = datetime.now(UTC)
    assert all(now - timedelta(minutes=1) < datetime.fromisoformat(one["when"]) <= now for one in stored)
    assert questions(dataset) == before  # nothing but the decisions is touched until they are written back
    assert client.get("/api/summary").json()["splits"]["train"] == {"pictures": 6, "pairs": 6, "decided": 3}

    assert client.post("/api/apply", json={}).json() == {
        "pairs": {"train": 5},
        "decisions": {"accept": 1, "edit": 1, "reject": 1},
    }
    after = questions(dataset)
    assert after == [before[0], edit["question"], *before[3:]]
    entries = json.loads((dataset / "released" / "train" / "muse.json").read_text())
    assert [entry["questions"] for entry in entries] == [[question] for question in after]
    edited = third["pairs"][0]["targets"]
    names = [part["category_name"] for part in entries[1]["answers"][0]]
    assert names == [edited[2]["category"], edited[1]["category"]]
    assert open_shards(dataset / "train").info.notes["review"] == {"accept": 1, "edit": 1, "reject": 1}
    again = client.get("/api/items/train/1").json()["pairs"][0]
    assert again["decision"]["verdict"] == "edit"
    assert again["decision"]["is_applied"]
    apply_review(str(dataset))  # a second time changes nothing more
    assert questions(dataset) == after


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"who": "  "}, "say who decides"),
        ({"pair": "0123456789abcdef"}, "has no pair"),
        ({"position": 99}, "there is no picture 99"),
        (
            {"verdict": "edit", "question": "What?", "answer": "No marker.", "kept_targets": [0], "phrases": ["it"]},
            "mark",
        ),
    ],
)
def test_a_decision_that_cannot_be_used_is_refused_and_leaves_no_file(
    dataset: Path, client: TestClient, change: dict[str, object], message: str
) -> None:
    pair = client.get("/api/items/train/0").json()["pairs"][0]["id"]
    body = {"split": "train", "position": 0, "pair": pair, "verdict": "accept", "who": "Ada"}
    response = client.post("/api/decisions", json=body | change)
    assert response.status_code == 400
    assert message in response.json()["error"]
    assert not (dataset / "review").exists()


def test_another_site_may_not_decide_and_plain_shards_can_be_reviewed(
    dataset: Path, client: TestClient, demo_shards: dict[str, str]
) -> None:
    assert client.post("/api/apply", json={}, headers={"Origin": "https://evil.example"}).status_code == 403
    shards = dataset.parent / "plain"
    shutil.copytree(demo_shards["muse"], shards)
    folder = ReviewFolder(str(shards))
    name = next(iter(folder.splits))
    folder.decide(name, 0, folder.item(name, 0)["pairs"][0]["id"], "reject", "Ada")
    assert folder.apply().pairs == {name: 31}
    with pytest.raises(DataError, match="no reasoning question"):
        ReviewFolder(demo_shards["segmentation"])


@pytest.fixture
def url(dataset: Path) -> Iterator[str]:
    app = build_review_app(ReviewFolder(str(dataset)), "Ada")
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started, "the start of the server")
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


def test_the_page_draws_masks_and_saves_an_edit_in_a_real_browser(dataset: Path, url: str, chromium_path: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium_path, headless=True, args=["--no-sandbox", "--disable-gpu", "--no-first-run"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto(url)
        expect(page.locator(".pair .word")).to_have_count(3)
        painted = "() => document.getElementById('overlay').getContext('2d').getImageData(0, 0, 640, 449).data"
        covered = page.evaluate(f"({painted})().filter((value, at) => at % 4 === 3 && value).length")
        row = next(iter(open_shards(dataset / "train").scan()))
        assert covered == pytest.approx(sum(target.area for target in row.targets), rel=0.02)
        page.keyboard.press("e")
        page.locator(".editor textarea").first.fill("How could biscuits be made in here?")
        page.locator(".editor .save").click()
        expect(page.locator(".pair.is-edit .question")).to_have_text("How could biscuits be made in here?")
        expect(page.locator(".verdict")).to_contain_text("edited by Ada")
        page.keyboard.press("ArrowRight")
        expect(page.locator("#place")).to_have_text("2 / 6")
        page.keyboard.press("r")
        expect(page.locator(".pair.is-reject")).to_have_count(1)
        page.set_viewport_size({"width": 400, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") == 400
        browser.close()
    assert problems == []
    assert len(list((dataset / "review").glob("*.json"))) == 2
