"""`pixellm demo`: real photographs the whole way, on this machine, in minutes.

photographs → Parquet shards → mixture → two DeepSpeed workers → MLflow registry → Ray Serve → HTTP → pictures. The demo
only strings together what the other commands do; nothing here is special to it but the order and the report. Everything
is written below one folder, and everything that was started is stopped.
"""

import fcntl
import io
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from pixellm.demo_report import Answer, StepRow, color_pieces, data_url, plot_losses, write_report
from pixellm.errors import ConfigError, ModelLoadError, PixelLMError, ServingError
from pixellm.platform.settings import Settings, load_settings

if TYPE_CHECKING:
    from pixellm.jobs.train.run import TrainResult
    from pixellm.serve.app import ServiceHandle
    from pixellm.serve.client import PixelLMClient

_RECIPE = "recipes/demo.yaml"
_SERVED_PICTURES = 12


@dataclass(frozen=True)
class DemoSummary:
    """What `demo/summary.json` holds. gIoU is over the demo's questions of both kinds, composed and MUSE, in [0, 1].

    Attributes:
        giou_before: of the untrained model. Its words are noise, so the true answers are given (teacher-forced) and
            only its masks are judged: the kinder of the two ways.
        giou_after: of the trained model's own generated answers, on the photographs it trained on.
        steps: optimiser steps.
        train_samples_per_s: questions per second over both workers, start-up left out.
        registered_version: the version of the registered model.
        http_requests: requests sent to the service.
        http_failures: those that did not end in an answer.
        targets_returned: masks in all answers.
        metrics_after: all metrics of the evaluation after training.
        run_id: of MLflow.
        seconds: the whole demo, wall clock.
    """

    giou_before: float
    giou_after: float
    steps: int
    train_samples_per_s: float
    registered_version: int
    http_requests: int
    http_failures: int
    targets_returned: int
    metrics_after: dict[str, float]
    run_id: str
    seconds: float


@dataclass(frozen=True)
class _Asked:
    """What came of the HTTP requests; `answers` is ready to show."""

    answers: tuple[Answer, ...]
    requests: int
    failures: int


class _Timeline:
    """Prints each step as it ends and keeps the rows for the table."""

    def __init__(self) -> None:
        self.rows: list[StepRow] = []

    @contextmanager
    def step(self, name: str) -> Iterator[list[str]]:
        """Times a step; the caller appends its key figures to the list."""
        typer.echo(f"• {name} …")
        figures: list[str] = []
        start = time.monotonic()
        yield figures
        self.rows.append(StepRow(name, time.monotonic() - start, "; ".join(figures)))
        typer.echo(f"  {self.rows[-1].seconds:.1f} s · {self.rows[-1].figure}")

    def print_table(self) -> None:
        """The table of what happened."""
        table = Table("step", "seconds", "key figure")
        for row in self.rows:
            table.add_row(row.step, f"{row.seconds:.1f}", row.figure)
        Console(width=118).print(table)


def run_demo(out: Path, *, port: int = 8000, steps: int | None = None, keep: bool = False) -> DemoSummary:
    """Runs the demo.

    Args:
        out: folder for everything it writes; made when absent.
        port: where the service listens while pictures are asked for.
        steps: training steps; None takes the recipe's.
        keep: leave the service up until Ctrl-C at the end.

    Returns:
        The summary, also written to `out/summary.json`.

    Raises:
        ConfigError: another demo runs in this folder.
        ServingError: the port is taken, or a request failed.
    """
    from pixellm.serve.port_check import check_port_is_free

    out, start, timeline = out.resolve(), time.monotonic(), _Timeline()
    with _exclusive(out), ExitStack() as stack:
        check_port_is_free("127.0.0.1", port)
        settings = demo_settings(out, port=port, steps=steps)
        with timeline.step("prepare: photographs → shards") as figures:
            settings = _prepare(settings, out, figures)
        with timeline.step("start Ray on this machine") as figures:
            _start_ray(settings, stack, figures)
        with timeline.step("evaluate the untrained model") as figures:
            before = _evaluate_untrained(settings, out, figures)
        with timeline.step(f"train on {settings.train.num_workers} workers, evaluate, register") as figures:
            trained = _train(settings, figures)
        with timeline.step("serve from the registry") as figures:
            handle = stack.enter_context(_serve(settings, trained, figures))
        with timeline.step("ask over HTTP") as figures:
            asked = _ask(handle.url, settings, out, figures)
        summary = DemoSummary(
            giou_before=round(before, 4),
            giou_after=round(trained.metrics["giou"], 4),
            steps=trained.steps,
            train_samples_per_s=round(trained.samples_per_s, 2),
            registered_version=trained.registered_version or 0,
            http_requests=asked.requests,
            http_failures=asked.failures,
            targets_returned=sum(len(answer.targets) for answer in asked.answers),
            metrics_after=trained.metrics,
            run_id=trained.run_id,
            seconds=round(time.monotonic() - start, 1),
        )
        _write(out / "summary.json", json.dumps(asdict(summary), indent=1) + "\n")
        report = _report(out, summary, timeline, asked, settings, handle.url)
        _say(summary, timeline, report)
        if keep:
            _wait_for_interrupt(handle.url, out)
    return summary


def demo_settings(out: Path, *, port: int, steps: int | None) -> Settings:
    """The demo's recipe with every folder below `out`."""
    overrides = [
        f"train.output_dir={out / 'runs'}",
        f"tracking.root={out / 'mlflow'}",
        f"tracking.uri=sqlite:///{out / 'mlflow' / 'mlflow.db'}",
        f"serve.port={port}",
        "cluster.address=local",
        f"cluster.num_cpus={max(4, os.cpu_count() or 1)}",
    ]
    if steps is not None:
        overrides.append(f"train.steps={steps}")
    return load_settings(_RECIPE, overrides)


@contextmanager
def _exclusive(out: Path) -> Iterator[None]:
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise ConfigError(
                f"another demo (process {holder}) runs in {out}; wait for it, stop it, or give --out another folder"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _prepare(settings: Settings, out: Path, figures: list[str]) -> Settings:
    from pixellm.jobs.data_stats import stats
    from pixellm.jobs.prepare import DEMO_DATA, prepare_demo
    from pixellm.platform.data.contact_sheet import draw_contact_sheet
    from pixellm.platform.data.shards import open_shards

    uris = prepare_demo(out / "shards")
    sources = tuple(source.model_copy(update={"uri": str(uris[source.group])}) for source in settings.data.sources)
    shards = sorted({str(uri) for uri in uris.values()})
    draw_contact_sheet([open_shards(uri) for uri in shards], out / "contact_sheet.png", 12)
    (out / "photos").mkdir(exist_ok=True)
    for name in ("ATTRIBUTION.md", "MUSE_LICENSE.md"):
        shutil.copyfile(DEMO_DATA / name, out / "photos" / name)
    coco = stats(uris["segmentation"])
    figures += [
        f"{sum(coco.rows_by_source.values())} photographs, {coco.targets} masks",
        f"{coco.dialogues.get('vqa', 0)} captions",
        f"{stats(uris['muse']).dialogues.get('muse', 0)} MUSE questions",
    ]
    return settings.model_copy(update={"data": settings.data.model_copy(update={"sources": sources})})


def _start_ray(settings: Settings, stack: ExitStack, figures: list[str]) -> None:
    from pixellm.platform import cluster

    info = cluster.connect(settings.cluster)
    stack.callback(cluster.disconnect)
    figures.append(f"{info.num_cpus:g} logical CPUs on {os.cpu_count()} cores, {info.num_gpus:g} GPUs")


def _evaluate_untrained(settings: Settings, out: Path, figures: list[str]) -> float:
    from pixellm.jobs.evaluate.run import evaluate_after_training
    from pixellm.jobs.train.build import build_model, build_processor

    folder = out / "untrained"
    model, processor = build_model(settings), build_processor(settings)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    result = evaluate_after_training(settings, folder, out / "evaluation_before", mode="forced", num_pictures=0)
    figures.append(f"gIoU {result.metrics['giou']:.3f} with the true answers given")
    return result.metrics["giou"]


def _train(settings: Settings, figures: list[str]) -> "TrainResult":
    from pixellm.jobs.train.run import train

    result = train(settings, fresh=True)
    if result.interrupted or result.registered_version is None:
        raise PixelLMError("the training was stopped before a model was registered; run the demo again")
    metrics = result.metrics
    figures += [
        f"{result.steps} steps at {result.samples_per_s:.1f} samples/s",
        f"gIoU {metrics['giou']:.3f}",
        f"version {result.registered_version}: {result.promotion}",
    ]
    return result


def _serve(settings: Settings, trained: "TrainResult", figures: list[str]) -> "ServiceHandle":
    from pixellm.platform import registry
    from pixellm.serve.app import deploy

    name = settings.registry.model_name
    reference = f"models:/{name}@champion"
    try:
        registry.look_up(reference, settings.tracking)
    except ModelLoadError:  # the gate kept this version out, and there is none before it
        reference = f"models:/{name}/{trained.registered_version}"
    handle = deploy(settings.serve, reference, tracking=settings.tracking)
    figures.append(f"{reference}, version {handle.card.version}, at {handle.url}")
    return handle


def _ask(url: str, settings: Settings, out: Path, figures: list[str]) -> _Asked:
    """Sends one multi-target question for each of a dozen photographs, half of them MUSE, and draws what came back."""
    from pixellm.jobs.evaluate.questions import Question, check_suite, iterate_questions
    from pixellm.platform.data.compose import ComposeLimits
    from pixellm.serve.client import PixelLMClient

    data = settings.data
    questions: list[Question] = []
    for source in settings.data.sources:
        if source.group != "vqa":
            limits = ComposeLimits(source.max_targets or data.max_targets, 1, data.min_target_share)
            found = [q for q in iterate_questions(source.uri, check_suite(source.group), limits) if len(q.masks) > 1]
            start = len(questions)  # other photographs for the second kind
            questions += found[start :: max(1, len(found) // (_SERVED_PICTURES // 2))][: _SERVED_PICTURES // 2]
    pictures = out / "pictures"
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir()
    answers, failures = [], 0
    with PixelLMClient(url) as client:
        client.wait_ready()
        for question in questions:
            try:
                answers.append(
                    _ask_one(
                        client,
                        question.image,
                        question.prompt,
                        pictures / _file_name(question.sample_id, question.suite),
                    )
                )
            except ServingError as error:
                failures += 1
                typer.echo(f"  {question.sample_id}: {error}", err=True)
    asked = _Asked(tuple(answers), len(questions), failures)
    figures.append(
        f"{asked.requests} requests, {failures} failed, {sum(len(a.targets) for a in answers)} masks, "
        f"median {np.median([a.milliseconds for a in answers] or [0]):.0f} ms"
    )
    return asked


def _ask_one(client: "PixelLMClient", image: bytes, prompt: str, path: Path) -> Answer:
    from pixellm.platform.overlay import draw_overlay, overlay_colors

    start = time.monotonic()
    result = client.segment(image, prompt)
    milliseconds = (time.monotonic() - start) * 1000
    photo = Image.open(io.BytesIO(image)).convert("RGB")
    phrases = [target.phrase for target in result.targets]
    masks = [target.mask for target in result.targets]
    draw_overlay(np.asarray(photo), masks, phrases, question=prompt).save(path)
    colors = [f"rgb({red}, {green}, {blue})" for red, green, blue in overlay_colors(len(masks))] or ["#ccc"]
    pieces = color_pieces(result.text, phrases, colors)
    return Answer(prompt, data_url(path, max_side=900), pieces, tuple(phrases), milliseconds)


def _file_name(sample_id: str, suite: str) -> str:
    return f"{sample_id.replace('/', '-').replace('#', '-')}-{suite}.png"


def _report(out: Path, summary: DemoSummary, timeline: _Timeline, asked: _Asked, settings: Settings, url: str) -> Path:
    from pixellm.platform.tracking import connect_store, store_address

    client = connect_store(store_address(settings.tracking))
    history: dict[int, dict[str, float]] = {}
    for key, name in {"loss": "loss", "loss_text": "text", "loss_ref": "ref", "loss_dice": "dice"}.items():
        for metric in client.get_metric_history(summary.run_id, key):
            history.setdefault(metric.step, {"step": metric.step})[name] = metric.value
    plot = plot_losses([history[step] for step in sorted(history)], out / "losses.png")
    return write_report(
        out / "report.html",
        created=datetime.now().strftime("%Y-%m-%d %H:%M"),
        device=f"{os.cpu_count()} CPU cores",
        model_name=settings.registry.model_name,
        summary=summary,
        photos=32,
        answers=asked.answers,
        rows=timeline.rows,
        loss_plot=data_url(plot),
        contact_sheet=data_url(out / "contact_sheet.png", max_side=2000),
        url=url,
        example_prompt=asked.answers[0].question if asked.answers else "Segment the cat and the laptop.",
    )


def _say(summary: DemoSummary, timeline: _Timeline, report: Path) -> None:
    timeline.print_table()
    typer.echo(
        f"gIoU before {summary.giou_before:.3f}, after {summary.giou_after:.3f}: on the photographs it trained on, "
        "which shows that the whole way learns, not that the model generalises."
    )
    typer.echo(f"report: {report}\nsummary: {report.parent / 'summary.json'}")


def _write(path: Path, text: str) -> None:
    writing = path.with_name(f".{path.name}.writing")
    writing.write_text(text, encoding="utf-8")
    writing.rename(path)


def _wait_for_interrupt(url: str, out: Path) -> None:
    typer.echo(
        f"the service stays up: open {url} in a browser, or\n"
        f"  curl -s {url}/v1/segment -F image=@PHOTO.jpg -F prompt='Please segment the cat.'\n"
        f"tracking: mlflow ui --backend-store-uri sqlite:///{out / 'mlflow' / 'mlflow.db'}\nCtrl-C stops it."
    )
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        typer.echo("stopping")
