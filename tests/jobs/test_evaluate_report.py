"""The report in a real browser: no console error, nothing overflows, galleries and their filter work."""

from pathlib import Path

from evaluate_case import KnownAnswers, write_case

from pixellm.jobs.evaluate.compare import compare
from pixellm.jobs.evaluate.job import EvaluationOptions, evaluate_suite


def test_the_report_is_whole_at_both_widths(tmp_path: Path, chromium_path: str) -> None:
    from playwright.sync_api import sync_playwright

    shards = write_case(tmp_path / "shards")
    options = EvaluationOptions()
    for name, share in (("a", 0.5), ("b", 1.0)):
        evaluate_suite("known", shards, tmp_path / name, "muse", options, open_answerer=KnownAnswers(share))
    compare(tmp_path / "a", tmp_path / "b", page=tmp_path / "compare.html")
    problems: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
        for width in (1280, 400):
            page.set_viewport_size({"width": width, "height": 900})
            for path in (tmp_path / "a" / "report.html", tmp_path / "compare.html"):
                page.goto(path.as_uri())
                assert page.evaluate("document.documentElement.scrollWidth") == width
                assert page.evaluate("[...document.images].every(i => i.naturalWidth > 0 || i.closest('[hidden]'))")
        page.goto((tmp_path / "a" / "report.html").as_uri())
        shown = "[...document.querySelectorAll('.card')].filter(c => !c.hidden).map(c => c.dataset.gallery)"
        assert set(page.evaluate(shown)) == {"worst"}
        page.select_option("#gallery", "best")
        page.select_option("#targets", "2")
        assert page.evaluate(shown) == ["best"] * 3
        text = page.inner_text("main")
        browser.close()
    assert problems == []
    assert "mask-only" in text
    assert "PixelLM-7B†" in text
    assert "gIoU 50.0 · 1 of 2 masks" in text
