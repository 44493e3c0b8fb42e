"""`pixellm data stats` and `data show`: numbers equal to a count of the raw files, masks in their colours, pages
that need nothing from elsewhere."""

import base64
import io
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from typer.testing import CliRunner

from pixellm.cli import app
from pixellm.jobs.data_show import show, write_samples_page
from pixellm.jobs.data_stats import histograms_of, stats, stats_table, write_stats_page
from pixellm.platform.data.compose import Dialogue, Turn
from pixellm.platform.data.contact_sheet import MARKER_WORD, coloured_turns, paint_masks, palette
from pixellm.platform.data.schema import RowDialogue
from pixellm.platform.data.shards import write_shards
from tests.platform.data_builders import row, target, vqa


def test_statistics_equal_a_count_of_the_raw_annotations(demo_data: Path, demo_shards: dict[str, str]) -> None:
    content = json.loads((demo_data / "instances.json").read_text())
    captions = json.loads((demo_data / "captions.json").read_text())
    muse = json.loads((demo_data / "muse.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    shares = []
    for annotation in content["annotations"]:
        polygons = coco_mask.frPyObjects(annotation["segmentation"], *sizes[annotation["image_id"]])
        shares.append(coco_mask.area(coco_mask.merge(polygons)) / np.prod(sizes[annotation["image_id"]]))
    per_image = Counter(Counter(annotation["image_id"] for annotation in content["annotations"]).values())

    coco = stats(demo_shards["segmentation"])
    written = stats(demo_shards["muse"])

    assert (coco.targets, coco.rows_by_source, coco.dialogues) == (len(shares), {"coco": 32}, {"vqa": len(captions)})
    assert coco.targets_per_row == dict(per_image)
    edges = [0, 0.001, 0.01, 0.05, 0.2, 1.01]
    assert list(coco.area_share.values()) == np.histogram(shares, edges)[0].tolist()
    assert written.targets_per_question == dict(Counter(len(a) for item in muse for a in item["answers"]))
    answers = [len(text.split()) for item in muse for text in item["text_answers"]]
    assert written.answer_words == (min(answers), np.median(answers), max(answers))
    assert written.answer_lengths == dict(sorted(Counter(answers).items()))
    assert sum(coco.licenses.values()) == 32
    assert "vqa: 90" in coco.to_text()
    json.dumps(written.to_json_dict())


def test_a_contact_sheet_shows_the_samples_with_their_masks_in_colour(
    demo_shards: dict[str, str], tmp_path: Path
) -> None:
    path = show([demo_shards["segmentation"], demo_shards["muse"]], tmp_path / "deep" / "sheet.png", n=5)
    again = show([demo_shards["segmentation"], demo_shards["muse"]], tmp_path / "again.png", n=5)
    sheet = np.asarray(Image.open(path))

    assert path.read_bytes() == again.read_bytes()
    assert sheet.shape[1] > 1500
    assert sheet.shape[0] > 800
    red = np.asarray(palette(1)[0])
    assert (sheet == red).all(axis=2).sum() > 500


def test_painting_tints_the_mask_outlines_it_and_leaves_the_rest() -> None:
    picture = np.full((12, 14, 3), 100, dtype=np.uint8)
    mask = np.zeros((12, 14), dtype=bool)
    mask[2:10, 3:12] = True

    painted = paint_masks(picture, [mask], [(200, 0, 0)])

    assert (painted[~mask] == 100).all()
    assert painted[5, 7].tolist() == [150, 50, 50]
    assert painted[2, 3].tolist() == painted[9, 11].tolist() == [200, 0, 0]
    assert (picture == 100).all()


def test_histograms_put_every_count_into_one_bin(tmp_path: Path) -> None:
    sizes = [0, 1, 1, 6, 7, 10, 11, 20, 21, 60]
    rows = [row(str(n), [target("cat", (0, 0, 1 + k, 1)) for k in range(size)]) for n, size in enumerate(sizes)]
    conversation = [vqa("word " * 90), RowDialogue("vqa", "one two three", "yes", turn=1), vqa("no")]
    write_shards([*rows, row("c", dialogues=conversation)], tmp_path / "some", name="some")
    found = stats(tmp_path / "some")

    per_picture, per_question, shares, questions, answers, categories = histograms_of(found)
    assert {bar.label: bar.count for bar in per_picture.bars if bar.count} == {
        "0": 2, "1": 2, "6": 1, "7–10": 2, "11–20": 2, "≥ 21": 2}  # fmt: skip
    assert [(bar.label, bar.count) for bar in per_question.bars] == [("0", 3)]
    assert sum(bar.count for bar in shares.bars) == sum(sizes) == found.targets == categories.bars[0].count
    assert [(bar.label, bar.count) for bar in questions.bars] == [("0–5", 3)]
    assert {bar.label: bar.count for bar in answers.bars if bar.count} == {"0–5": 2, "≥ 81": 1}
    assert found.turns_per_conversation == {1: 1, 2: 1}
    assert stats_table([found]).splitlines()[1].split() == ["some", "11", str(sum(sizes)), "0", "3", "0.00", "1"]


class _Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.images: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.images += [values["src"]] if tag == "img" else []
        self.links += [values[key] for key in ("href", "src") if key in values]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_pages_hold_their_pictures_and_words_and_reach_for_nothing_else(
    demo_shards: dict[str, str], tmp_path: Path
) -> None:
    uris = [demo_shards["segmentation"], demo_shards["muse"]]
    samples = _Page(write_samples_page(uris, tmp_path / "deep" / "samples.html", n=3))
    numbers = _Page(write_stats_page([stats(uri) for uri in uris], tmp_path / "stats.html"))

    assert len(samples.images) == 6
    for url in samples.images:
        picture = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))
        assert max(picture.size) <= 640
    for page in (samples, numbers):
        assert all(link.startswith("data:") for link in page.links)
    muse = json.loads((Path(__file__).parents[2] / "platform" / "data" / "demo" / "muse.json").read_text())
    assert muse[0]["questions"][0] in samples.text
    written = " ".join(re.sub(r"\s*\{seg\}", "", muse[0]["text_answers"][0]).split())
    assert written in re.sub(r"\s+([.,;:!?])", r"\1", " ".join(samples.text.split()))
    assert "202" in numbers.text
    assert "Attribution License" in numbers.text


def test_markup_in_the_data_stays_text(tmp_path: Path) -> None:
    write_shards([row("1", dialogues=[vqa("<script>alert(1)</script>")])], tmp_path / "x", name="<b>x</b>")
    page = write_samples_page(tmp_path / "x", tmp_path / "page.html").read_text()

    assert "<script>" not in page
    assert "<b>x" not in page


def test_the_command_line_writes_table_plot_and_pages(demo_shards: dict[str, str], tmp_path: Path) -> None:
    uris = [demo_shards["segmentation"], demo_shards["muse"]]
    plot, page, sheet, html = (tmp_path / name for name in ("plot.png", "stats.html", "sheet.png", "samples.html"))
    runner = CliRunner()
    told = runner.invoke(app, ["data", "stats", *uris, "--plot", str(plot), "--html", str(page)])
    shown = runner.invoke(app, ["data", "show", *uris, "--out", str(sheet), "--html", str(html), "--count", "2"])
    as_json = runner.invoke(app, ["data", "stats", *uris, "--json"])

    assert told.exit_code == shown.exit_code == as_json.exit_code == 0, told.output + shown.output
    assert told.stdout.splitlines()[1].split()[:3] == ["coco", "32", "202"]
    assert [one["targets"] for one in json.loads(as_json.stdout)["datasets"]] == [202, stats(uris[1]).targets]
    pixels = np.asarray(Image.open(plot).convert("RGB"))
    assert min(pixels.shape[:2]) > 600
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    assert page.stat().st_size > 5_000
    assert html.stat().st_size > 50_000
    assert Image.open(sheet).width > 800


def test_an_answer_is_coloured_by_the_longest_name_of_its_target_and_one_target_has_one_colour() -> None:
    names = ("left cat", "the cat on the left")
    known = RowDialogue("referring", names[1], "", (0,), (names[1],))
    sample = row("1", [target("cat", (0, 0, 9, 9), phrase=names[0]), target("bird", (9, 9, 19, 19))], [known])
    answer = "Here is the cat on the left {seg}, not the birds {seg}."
    turns = (Turn("Who?", answer, (0, 1)), Turn("Again?", "It {seg}.", (0,)))
    red, blue = palette(2)

    first, second = coloured_turns(sample, Dialogue("muse", turns))

    assert " ".join(word for word, color in first[1] if color == red) == f"the cat on the left {MARKER_WORD}"
    assert [word for word, color in first[1] if color == blue] == [MARKER_WORD], "a bird is not its plural"
    assert [word for word, color in second[1] if color] == [MARKER_WORD]
    assert (MARKER_WORD, red) in second[1]
