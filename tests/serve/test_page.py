"""The page in a real browser, against the real routes with a scripted backend that has genuine masks."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_backend import ScriptedBackend, ServedApi, target_part
from pictures import picture_bytes
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from pixellm.errors import OverloadedError
from pixellm.platform.masks import rle_decode
from pixellm.platform.settings import ServeSettings
from pixellm.serve.auth import new_key, read_keys
from tests.waiting import wait_until

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ANSWER = ("The picture shows ", "a ", "white ", "cat ", "[1]", ", ", "a bird ", "[2]", " it ", "watches, ", "and ")
ANSWER += ("a bowl ", "[3]", ".")


@pytest.fixture(scope="module")
def browser(chromium_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def backend(photo_masks: dict[str, np.ndarray]) -> ScriptedBackend:
    parts = [("a white cat", "cat"), ("a bird", "bird"), ("a bowl", "bowl")]
    targets = [target_part(index, phrase, photo_masks[name]) for index, (phrase, name) in enumerate(parts)]
    errors: dict[str, Exception] = {"busy": OverloadedError("the queue is full; try again later", retry_after_s=2)}
    return ScriptedBackend(words=ANSWER, targets=targets, errors=errors)


@pytest.fixture
def api(backend: ScriptedBackend) -> Iterator[ServedApi]:
    with ServedApi(backend) as served:
        yield served


def open_page(browser: Browser, api: ServedApi, *, width: int = 1280, height: int = 860, scheme: str = "light") -> Page:
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
    page.problems = []  # type: ignore[attr-defined]
    page.on("pageerror", lambda error: page.problems.append(str(error)))  # type: ignore[attr-defined]
    page.on("console", lambda message: message.type == "error" and page.problems.append(message.text))  # type: ignore
    page.goto(api.url)
    return page


def ask(page: Page, photo: Path, question: str = "Segment the cat, the bird and the bowl.") -> None:
    page.set_input_files("#file", photo)
    expect(page.locator("#prompt")).to_be_enabled()
    page.fill("#prompt", question)
    page.keyboard.press("Enter")


def keep_screenshot(page: Page, name: str) -> None:
    """Writes a picture of the page where CI keeps artefacts (PIXELLM_SCREENSHOTS names the folder)."""
    if folder := os.environ.get("PIXELLM_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png")


def overlay_pixel(page: Page, x: int, y: int) -> list[int]:
    script = "([x, y]) => [...document.getElementById('overlay').getContext('2d').getImageData(x, y, 1, 1).data]"
    pixel: list[int] = page.evaluate(script, [x, y])
    return pixel


def inside_point(mask_HW: np.ndarray) -> tuple[int, int]:
    """(x, y) of the pixel deepest inside a mask."""
    import cv2

    y, x = np.unravel_index(cv2.distanceTransform(mask_HW.astype(np.uint8), cv2.DIST_L2, 5).argmax(), mask_HW.shape)
    return int(x), int(y)


def test_an_answer_streams_in_and_each_mask_is_tied_to_its_words(
    browser: Browser, api: ServedApi, photo_path: Path, photo_masks: dict[str, np.ndarray]
) -> None:
    page = open_page(browser, api)
    expect(page.locator("#model-name")).to_have_text("scripted · version 7")
    keep_screenshot(page, "empty-1280")
    ask(page, photo_path)
    expect(page.locator(".word")).to_have_count(3)
    expect(page.locator(".words")).to_have_text("The picture shows a white cat1, a bird2 it watches, and a bowl3.")
    expect(page.locator("#legend button")).to_have_count(3)
    # every mask is drawn where it belongs, and nothing where none is
    for mask in photo_masks.values():
        x, y = inside_point(mask)
        assert overlay_pixel(page, x, y)[3] > 0
    nothing = ~np.any(list(photo_masks.values()), axis=0)
    assert overlay_pixel(page, *inside_point(nothing))[3] == 0
    keep_screenshot(page, "answer-1280")
    # word → mask: the others step back while it is hovered
    cat, bird = inside_point(photo_masks["cat"]), inside_point(photo_masks["bird"])
    before = overlay_pixel(page, *bird)[3]
    page.hover(".word[data-target='0']")
    assert overlay_pixel(page, *bird)[3] < before
    assert overlay_pixel(page, *cat)[3] > before
    # mask → word
    box = page.locator("#overlay").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + bird[0] / 640 * box["width"], box["y"] + bird[1] / 480 * box["height"])
    expect(page.locator(".word[data-target='1']")).to_have_class("word is-lit")
    expect(page.locator("#tip")).to_have_text("a bird")
    keep_screenshot(page, "hover-1280")
    assert page.problems == []  # type: ignore[attr-defined]
    page.close()


def test_masks_can_be_hidden_made_fainter_and_saved(
    browser: Browser, api: ServedApi, photo_path: Path, photo_masks: dict[str, np.ndarray], tmp_path: Path
) -> None:
    page = open_page(browser, api)
    ask(page, photo_path)
    expect(page.locator(".word")).to_have_count(3)
    cat, bird = inside_point(photo_masks["cat"]), inside_point(photo_masks["bird"])
    page.click(".word[data-target='0']")
    page.mouse.move(5, 5)
    page.evaluate("document.activeElement.blur()")
    assert overlay_pixel(page, *cat)[3] == 0
    assert overlay_pixel(page, *bird)[3] > 0
    page.click("#legend [data-target='0']")
    page.mouse.move(5, 5)
    page.evaluate("document.activeElement.blur()")
    strong = overlay_pixel(page, *cat)[3]
    page.locator("#opacity").fill("20")
    assert 0 < overlay_pixel(page, *cat)[3] < strong
    page.click("#toggle-all")
    assert overlay_pixel(page, *cat)[3] == 0
    page.click("#toggle-all")
    with page.expect_download() as png:
        page.click("#save-png")
    png.value.save_as(tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as saved:
        assert saved.size == (640, 480)
    with page.expect_download() as record:
        page.click("#save-json")
    record.value.save_as(tmp_path / "out.json")
    saved_json = json.loads((tmp_path / "out.json").read_text())
    assert [target["phrase"] for target in saved_json["targets"]] == ["a white cat", "a bird", "a bowl"]
    np.testing.assert_array_equal(rle_decode(saved_json["targets"][1]["mask"]), photo_masks["bird"])
    assert page.problems == []  # type: ignore[attr-defined]
    page.close()


def test_errors_are_said_and_the_question_can_be_asked_again(
    browser: Browser, api: ServedApi, backend: ScriptedBackend, photo_path: Path, tmp_path: Path
) -> None:
    page = open_page(browser, api)
    page.set_input_files("#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no picture"})
    expect(page.get_by_role("alert")).to_contain_text("is not a picture")
    ask(page, photo_path, "Are you busy?")
    expect(page.get_by_role("alert")).to_contain_text("the queue is full")
    keep_screenshot(page, "error-1280")
    backend.errors.clear()
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".word")).to_have_count(3)
    expect(page.get_by_role("alert")).to_have_count(0)
    page.close()


def test_a_conversation_goes_on_and_an_answer_can_be_stopped(
    browser: Browser, api: ServedApi, backend: ScriptedBackend, photo_path: Path
) -> None:
    page = open_page(browser, api)
    ask(page, photo_path, "What is here?")
    expect(page.locator(".word")).to_have_count(3)
    backend.pause_s = 0.4
    page.fill("#prompt", "And what else?")
    page.keyboard.press("Enter")
    expect(page.locator(".is-coming .words")).to_contain_text("The picture")
    page.keyboard.press("Escape")
    expect(page.locator(".note")).to_have_text("Stopped.")
    assert backend.questions[1].history == (("What is here?", "".join(ANSWER)),)
    page.close()
    wait_until(lambda: backend.num_abandoned == 1, "the end of an answer that was stopped")


def test_the_page_fits_a_phone_and_works_in_the_dark(browser: Browser, api: ServedApi, photo_path: Path) -> None:
    page = open_page(browser, api, width=400, height=820, scheme="dark")
    keep_screenshot(page, "empty-400-dark")
    ask(page, photo_path)
    expect(page.locator(".word")).to_have_count(3)
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow == 0
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(int(part) for part in background.strip("rgb()").split(",")[:3]) < 150
    keep_screenshot(page, "answer-400-dark")
    page.close()


def test_an_example_is_asked_cut_out_judged_and_found_again_in_the_history(
    browser: Browser, backend: ScriptedBackend, photo_path: Path, photo_masks: dict[str, np.ndarray], tmp_path: Path
) -> None:
    with ServedApi(backend, ServeSettings(feedback_dir=str(tmp_path / "feedback"))) as api:
        page = open_page(browser, api)
        page.get_by_role("button", name="A white cat beside a bird and a bowl").click()
        expect(page.locator("#prompt")).to_have_value("Segment the cat, the bird and the bowl.")
        page.press("#prompt", "Enter")
        expect(page.locator(".word")).to_have_count(3)
        # keys: 2 hides the bird, / goes to the question
        page.locator("#legend button").first.focus()
        page.keyboard.press("2")
        expect(page.locator("#legend [data-target='1']")).to_have_attribute("aria-pressed", "false")
        page.keyboard.press("/")
        expect(page.locator("#prompt")).to_be_focused()
        with page.expect_download() as cutout:
            page.click("#save-cutout")
        cutout.value.save_as(tmp_path / "cutout.png")
        with Image.open(tmp_path / "cutout.png") as saved, Image.open(photo_path) as photo:
            alpha = np.asarray(saved)[..., 3] > 0
            shown = photo_masks["cat"] | photo_masks["bowl"]
            assert np.count_nonzero(alpha ^ shown) < 0.01 * alpha.size
            inside = inside_point(photo_masks["cat"])
            assert saved.getpixel(inside)[:3] == pytest.approx(photo.getpixel(inside), abs=3)
        page.get_by_role("button", name="Hidden ones are wrong").click()
        expect(page.locator(".feedback")).to_have_text("Thank you, noted.")
        (part,) = (tmp_path / "feedback").iterdir()
        kept = json.loads((part / "instances.json").read_text())
        assert [category["name"] for category in kept["categories"]] == ["a white cat", "a bowl"]
        # another picture, and back
        page.set_input_files("#file", {"name": "b.png", "mimeType": "image/png", "buffer": picture_bytes(31, 23)})
        expect(page.locator("#history button")).to_have_count(2)
        expect(page.locator(".word")).to_have_count(0)
        keep_screenshot(page, "history-1280")
        page.get_by_role("button", name="cat, 1 question").click()
        expect(page.locator(".word")).to_have_count(3)
        expect(page.locator("#legend button")).to_have_count(3)
        keep_screenshot(page, "history-back-1280")
        assert page.problems == []  # type: ignore[attr-defined]
        page.close()


def test_a_service_with_keys_lets_the_page_in_once_it_has_one(browser: Browser, backend: ScriptedBackend) -> None:
    secret, line = new_key("ann")
    with ServedApi(backend, keys=read_keys(ServeSettings(), {"PIXELLM_API_KEYS": line})) as api:
        page = open_page(browser, api)
        expect(page.get_by_role("dialog")).to_be_visible()
        keep_screenshot(page, "key-1280")
        page.fill("#key", secret)
        page.get_by_role("button", name="Use it").click()
        expect(page.locator("#model-name")).to_have_text("scripted · version 7")
        page.close()


def test_a_picture_can_be_pasted_and_dropped(browser: Browser, api: ServedApi) -> None:
    page = open_page(browser, api)
    give = """([kind, bytes]) => {
      const transfer = new DataTransfer();
      transfer.items.add(new File([new Uint8Array(bytes)], "given.png", {type: "image/png"}));
      const event = kind === "paste"
        ? new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true, cancelable: true})
        : new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true});
      document.body.dispatchEvent(event);
    }"""
    for kind, width in (("paste", 31), ("drop", 47)):
        page.evaluate(give, [kind, list(picture_bytes(width, 23))])
        page.wait_for_function("width => document.getElementById('picture').naturalWidth === width", arg=width)
    assert page.problems == []  # type: ignore[attr-defined]
    page.close()
