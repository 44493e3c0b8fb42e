"""The judge of MUSE: the worked example by hand, and an endpoint that misbehaves on purpose."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from evaluate_case import KnownAnswers, write_case

from pixellm.errors import JudgeError, LanguageModelError
from pixellm.jobs.evaluate.compare import compare
from pixellm.jobs.evaluate.job import EvaluationOptions, evaluate_suite, read_samples
from pixellm.jobs.evaluate.judge import Judge, JudgeSettings, MalformedError, Verdict, read_scores
from pixellm.jobs.evaluate.samples import sample_row, text_for_judge
from pixellm.jobs.evaluate.suites import Asked, find_suite
from pixellm.jobs.evaluate.summary import summarize
from pixellm.jobs.evaluate.types import Answer
from pixellm.platform import registry
from pixellm.platform.llm_client import Spending
from pixellm.platform.llm_service import ServiceSettings
from pixellm.platform.masks import rle_encode
from pixellm.platform.settings import Settings, TrackingSettings
from pixellm.platform.tracking import connect_store, start_run, store_address

Reply = tuple[int, dict[str, str], bytes] | str
Behaviour = Callable[[int, dict[str, Any]], Reply]


def completion(content: str | None, **message: Any) -> Reply:
    """A chat completion with this content."""
    choice = {"message": {"content": content, **message}, "finish_reason": "stop"}
    body = {"choices": [choice], "usage": {"prompt_tokens": 1000, "completion_tokens": 100}}
    return 200, {}, json.dumps(body).encode()


def scores_for(request: dict[str, Any], score: int = 8) -> Reply:
    """One score for every number asked about."""
    numbers = json.loads(request["messages"][1]["content"])["numbers"]
    return completion(json.dumps({"scores": [{"number": n, "score": score, "reason": "fits"} for n in numbers]}))


class Endpoint(ThreadingHTTPServer):
    """Answers the n-th request (from 0) as `behaviour` says: status, headers and body, or "cut" or "hang"."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, behaviour: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behaviour, self.requests, self.lock = behaviour, list[dict[str, Any]](), threading.Lock()
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        """One request."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append(request)
        reply = self.server.behaviour(number, request)
        if reply == "hang":
            self.server.released.wait(5)
            return
        if isinstance(reply, str):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.close_connection = True
            return
        status, headers, body = reply
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextmanager
def endpoint(behaviour: Behaviour) -> Iterator[Endpoint]:
    """A server in a thread."""
    server = Endpoint(behaviour)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


def settings_for(url: str, cache: Path, **more: Any) -> JudgeSettings:
    """Quick retries."""
    service = ServiceSettings(url, timeout_s=0.3, attempts=4, back_off_s=0.01)
    return JudgeSettings(service, "judge-1", cache, **more)


def strip(start: int, length: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """`length` pixels in a row of a picture of 1 × 100."""
    mask = np.zeros((1, 100), dtype=bool)
    mask[0, start : start + length] = True
    return mask


def example() -> list[dict[str, Any]]:
    """The two questions of docs/evaluation.md."""
    suite = find_suite("muse")
    truths = (strip(0, 20), strip(50, 10))
    first = Asked(
        "a#0", 0, "a", "reasoning: how", "How do I cross?", "Sit in {seg}, use {seg}.",
        ("a red kayak", "a double-bladed paddle"), tuple(map(rle_encode, truths)), (), (1, 100),
    )  # fmt: skip
    text = "Sit in the boat [1] with a stick [2] and a hat [3]."
    answer = Answer(text, ("boat", "stick", "hat"), (strip(5, 25), strip(70, 5), strip(80, 4)), is_ordered=False)
    whole = replace(first, sample_id="b#0", image_id="b", phrases=("a hat",), masks=(rle_encode(strip(0, 30)),))
    right = Answer("The hat [1].", ("hat",), (strip(0, 30),), is_ordered=False)
    return [sample_row(first, answer, suite), sample_row(whole, right, suite)]


def judged(settings: JudgeSettings, samples: list[dict[str, Any]]) -> tuple[list[Verdict], dict[str, Any]]:
    """Verdicts and the judge's report."""

    async def run() -> tuple[list[Verdict], dict[str, Any]]:
        async with Judge(settings) as judge:
            return await judge.judge_all(samples), judge.report()

    return asyncio.run(run())


def test_the_worked_example_of_the_documentation(tmp_path: Path) -> None:
    samples = example()
    written = "Sit in the boat [1] (a red kayak) with a stick [2] (no such object) and a hat [3] (no such object)."
    assert text_for_judge(samples[0]) == written

    def behave(number: int, request: dict[str, Any]) -> Reply:
        material = json.loads(request["messages"][1]["content"])
        assert request["temperature"] == 0
        return scores_for(request, 8 if material["answer"] == written else 10)

    with endpoint(behave) as server:
        verdicts, report = judged(settings_for(server.url, tmp_path / "cache"), samples)
    assert verdicts[0].scores == (8.0, 0.0, 0.0)
    assert report["samples"]["judged"] == 2
    figures = summarize([s | v.columns() for s, v in zip(samples, verdicts, strict=True)]).figures()
    assert figures["judged_giou"].value == pytest.approx((0.4 + 0 + 0 + 1) / 4)
    assert figures["judged_ciou"].value == pytest.approx(42 / 79)
    assert figures["giou"].value == pytest.approx(1.5 / 4)
    assert figures["ciou"].value == pytest.approx(45 / 79)
    assert figures["judge_score"].value == 9
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    for value in (written, "35.0 %", "53.16 %", "37.5 %", "56.96 %"):
        assert value in page


@pytest.mark.parametrize(
    "fault",
    [
        (429, {"Retry-After": "0.05"}, b'{"error": {"message": "slow down"}}'),
        (500, {}, b"oops"),
        "cut",
        "hang",
        (200, {}, b"<html>gateway</html>"),
    ],
    ids=["429", "500", "cut", "hang", "garbage"],
)
def test_a_failed_attempt_is_repeated_until_it_succeeds(tmp_path: Path, fault: Reply) -> None:
    with endpoint(lambda number, request: fault if number < 2 else scores_for(request)) as server:
        verdicts, report = judged(settings_for(server.url, tmp_path / "cache"), example()[1:])
        assert verdicts[0].scores == (8.0,)
        assert len(server.requests) == 3
        assert report["requests"] == {"asked": 1, "attempts_failed": 2}


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        '{"scores": []}',
        '{"scores": [{"number": 1, "score": 11, "reason": ""}]}',
        '{"scores": [{"number": 1, "score": 0, "reason": ""}]}',
        '{"scores": [{"number": 2, "score": 5, "reason": ""}]}',
        '{"scores": [{"number": 1, "score": true, "reason": ""}]}',
        '{"scores": [{"number": 1, "score": 5}, {"number": 1, "score": 6}]}',
        '{"scores": 7}',
        "[" * 100_000,
    ],
)
def test_a_malformed_verdict_is_asked_for_once_more_then_counted(tmp_path: Path, content: str) -> None:
    with pytest.raises(MalformedError):
        read_scores(content, [1])
    with endpoint(lambda number, request: completion(content) if number < 1 else scores_for(request)) as server:
        verdicts, report = judged(settings_for(server.url, tmp_path / "mended"), example()[1:])
    assert verdicts[0].scores == (8.0,)
    assert report["samples"] == {"judged": 1, "repaired": 1}
    with endpoint(lambda *_: completion(content)) as server:
        verdicts, report = judged(settings_for(server.url, tmp_path / "never"), example()[1:])
        assert len(server.requests) == 2
    assert verdicts[0].scores is None
    assert report["samples"] == {"malformed": 1}


def test_a_refusal_and_an_empty_purse_leave_the_question_out(tmp_path: Path) -> None:
    with endpoint(lambda *_: completion(None, refusal="I cannot")) as server:
        verdicts, _ = judged(settings_for(server.url, tmp_path / "refused"), example()[1:])
    assert verdicts[0].status == "refused"
    sample = example()[1] | verdicts[0].columns()
    assert "judged_giou" not in summarize([sample]).figures()
    with endpoint(lambda _, request: scores_for(request)) as server:
        # about 0.0015 USD for each answer, as the server counts its tokens; a request may cost up to 0.003
        purse = Spending(0.004, prompt_usd=1.0, completion_usd=5.0)
        many = [example()[1] | {"question": f"Where is it? {number}"} for number in range(9)]
        settings = settings_for(server.url, tmp_path / "poor", spending=purse, concurrency=1)
        verdicts, report = judged(settings, many)
        assert report["spent_usd"] <= 0.004
        assert {verdict.status for verdict in verdicts} == {"judged", "out of budget"}
        assert len(server.requests) == report["samples"]["judged"]


def test_a_registered_version_gets_what_it_was_evaluated_to(tmp_path: Path) -> None:
    settings = Settings(name="e", tracking=TrackingSettings(root=str(tmp_path / "store")))
    with start_run(settings, kind="train"):
        pass
    client = connect_store(store_address(settings.tracking))
    client.create_registered_model("pixellm")
    client.create_model_version("pixellm", "file:///nowhere", tags={"metric.giou": "0.5"})
    shards = write_case(tmp_path / "shards")

    def evaluate(out: str, **options: Any) -> dict[str, float]:
        evaluate_suite(
            "models:/pixellm/1", shards, tmp_path / out, "muse", EvaluationOptions(with_report=False, **options),
            tracking=settings.tracking, settings=settings, open_answerer=KnownAnswers(),
        )  # fmt: skip
        return registry.look_up("models:/pixellm/1", settings.tracking).metrics

    assert evaluate("part", limit=1) == {"giou": 0.5}  # a part of the questions says nothing of the suite
    metrics = evaluate("whole")
    assert metrics["giou"] == 0.5
    read = json.loads((tmp_path / "whole" / "metrics.json").read_text())["metrics"]
    assert metrics["muse.giou"] == read["giou"] > 0


def test_a_repeated_evaluation_costs_nothing_and_offline_fails_on_a_miss(tmp_path: Path) -> None:
    shards, cache = write_case(tmp_path / "shards"), tmp_path / "cache"
    with endpoint(lambda _, request: scores_for(request)) as server:
        options = EvaluationOptions(judge=settings_for(server.url, cache), with_report=False)
        first = evaluate_suite("k", shards, tmp_path / "a", "muse", options, open_answerer=KnownAnswers())
        count = len(server.requests)
        # pictures 0 and 4, and 1 and 5, are asked the same: what is under way or known is not sent again
        assert count == 4
        assert first.metrics["judged_giou"] == pytest.approx(0.8)
        assert "judged figures by judge-1" in first.to_text()
        again = evaluate_suite("k", shards, tmp_path / "b", "muse", options, open_answerer=KnownAnswers())
        assert len(server.requests) == count
        assert again.metrics == first.metrics
        offline = replace(options, judge=replace(options.judge, is_offline=True))
        evaluate_suite("k", shards, tmp_path / "c", "muse", offline, open_answerer=KnownAnswers())
        other = replace(options, judge=replace(options.judge, is_offline=True, revision="2"))
        with pytest.raises(JudgeError, match="run once without --judge-offline"):
            evaluate_suite("k", shards, tmp_path / "d", "muse", other, open_answerer=KnownAnswers())
        assert len(server.requests) == count
    masks_only = EvaluationOptions(with_report=False)
    evaluate_suite("k", shards, tmp_path / "e", "muse", masks_only, open_answerer=KnownAnswers())
    judges = [pq.read_schema(tmp_path / name / "samples.parquet").metadata[b"judge"] for name in "ae"]
    assert judges == [b"judge-1", b"none: mask-only"]
    compared = [[d.name for d in compare(tmp_path / "a", tmp_path / other).differences] for other in "be"]
    assert ["judged_giou" in names for names in compared] == [True, False]
    words = next(read_samples(tmp_path / "a"))
    assert words["judge_words"] == ["fits", "fits"]
    assert words["judge_status"] == "judged"


def test_repeated_verdicts_give_the_median_and_their_agreement(tmp_path: Path) -> None:
    with endpoint(lambda _, request: scores_for(request, (4, 9, 7)[request["seed"]])) as server:
        verdicts, report = judged(settings_for(server.url, tmp_path / "cache", repeat=3), example()[1:])
    assert verdicts[0].scores == (7.0,)
    assert report["agreement"] == {"repeats": 3, "share_equal": 0.0, "mean_spread": 5.0}


def test_a_wrong_key_ends_the_evaluation_with_what_to_check(tmp_path: Path) -> None:
    with (
        endpoint(lambda *_: (401, {}, b'{"error": {"message": "bad key"}}')) as server,
        pytest.raises(LanguageModelError, match="OPENAI_API_KEY"),
    ):
        judged(settings_for(server.url, tmp_path / "cache"), example()[1:])
