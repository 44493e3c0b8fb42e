"""`pixellm evaluate` and `pixellm compare`: a model on a benchmark, and two such runs side by side (part of `cli`)."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pixellm.errors import ConfigError
from pixellm.options import AsJson


def evaluate(
    model: Annotated[str, typer.Option("--model", help="a folder, models:/NAME@alias or models:/NAME/VERSION")],
    data: Annotated[str, typer.Option("--data", help="prepared shards of the benchmark's split")],
    out: Annotated[Path, typer.Option("--out", help="folder for metrics.json, samples.parquet and report.html")],
    suite: Annotated[
        str,
        typer.Option("--suite", help="muse, mrefcoco[+|g], refcoco[+|g], grefcoco, reasonseg, shapes, segmentation"),
    ] = "segmentation",
    mode: Annotated[str, typer.Option("--mode", help="generated, or forced: true answers given")] = "generated",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="questions at most")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="questions answered together")] = 8,
    device: Annotated[str, typer.Option("--device", help="where the model runs: cpu, cuda")] = "cpu",
    actors: Annotated[int, typer.Option("--actors", min=0, help="most Ray actors; 0: in this process")] = 0,
    judge: Annotated[
        str, typer.Option("--judge", help="none, or an OpenAI-compatible address; key: OPENAI_API_KEY")
    ] = "none",
    judge_model: Annotated[str, typer.Option("--judge-model")] = "gpt-3.5-turbo",
    judge_revision: Annotated[str, typer.Option("--judge-revision", help="part of the cache's key")] = "",
    judge_repeat: Annotated[int, typer.Option("--judge-repeat", min=1, help="verdicts per answer; median")] = 1,
    judge_offline: Annotated[bool, typer.Option("--judge-offline", help="fail where the cache has no verdict")] = False,
    judge_cache: Annotated[Path | None, typer.Option("--judge-cache", help="file; else OUT/judge.sqlite")] = None,
    judge_budget_usd: Annotated[float | None, typer.Option("--judge-budget-usd", min=0)] = None,
    judge_prices: Annotated[
        tuple[float, float], typer.Option("--judge-prices", help="USD per million tokens: request, answer")
    ] = (0.5, 1.5),
    judge_rpm: Annotated[float | None, typer.Option("--judge-requests-per-minute", min=0.1)] = None,
    judge_concurrency: Annotated[int, typer.Option("--judge-concurrency", min=1)] = 16,
    record: Annotated[bool, typer.Option("--record/--no-record", help="results as a run in MLflow")] = True,
    as_json: AsJson = False,
) -> None:
    """gIoU, cIoU and more of a benchmark, with intervals. The same command goes on where one stopped."""
    from pixellm.jobs.evaluate.job import EvaluationOptions, evaluate_suite
    from pixellm.jobs.evaluate.judge import JudgeSettings
    from pixellm.platform import cluster
    from pixellm.platform.llm_client import Spending
    from pixellm.platform.llm_service import ServiceSettings
    from pixellm.platform.observability import ProgressLine
    from pixellm.platform.settings import Settings, from_environment

    if mode not in ("generated", "forced"):
        raise ConfigError(f"--mode is {mode!r}; wanted generated or forced")
    if judge != "none" and not judge.startswith(("http://", "https://")):
        raise ConfigError(f"--judge is {judge!r}; wanted none, or an address such as https://api.openai.com/v1")
    key = from_environment().get("OPENAI_API_KEY")
    judging = None
    if judge != "none":
        judging = JudgeSettings(
            service=ServiceSettings(judge, key, requests_per_minute=judge_rpm),
            model=judge_model,
            cache_file=judge_cache or out / "judge.sqlite",
            revision=judge_revision,
            spending=Spending(judge_budget_usd, *judge_prices),
            concurrency=judge_concurrency,
            repeat=judge_repeat,
            is_offline=judge_offline,
        )
    options = EvaluationOptions(
        mode="forced" if mode == "forced" else "generated",
        limit=limit,
        batch_size=batch_size,
        device=device,
        actors=actors,
        actor_gpus=1.0 if device.startswith("cuda") else 0.0,
        judge=judging,
    )
    line: ProgressLine | None = None

    def show(done: int, total: int) -> None:
        nonlocal line
        line = line or ProgressLine(total)
        line.update(done, {})

    if actors:
        cluster.connect()
    try:
        settings = Settings(name=f"evaluate-{suite.replace('+', '-plus')}") if record else None
        result = evaluate_suite(model, data, out, suite, options, settings=settings, on_progress=show)
    finally:
        if actors:
            cluster.disconnect()
    typer.echo(json.dumps(result.to_json_dict()) if as_json else result.to_text())


def compare(
    first: Annotated[Path, typer.Argument(metavar="DIR_A", help="what `evaluate` wrote")],
    second: Annotated[Path, typer.Argument(metavar="DIR_B", help="what `evaluate` wrote for another model")],
    html: Annotated[Path | None, typer.Option("--html", help="page with the samples that changed most")] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="samples shown")] = 12,
    record: Annotated[bool, typer.Option("--record/--no-record", help="results as a run in MLflow")] = True,
    as_json: AsJson = False,
) -> None:
    """Two evaluations of the same questions: paired differences with intervals, samples that changed most."""
    from pixellm.jobs.evaluate.compare import compare as run_comparison
    from pixellm.platform.settings import Settings

    settings = Settings(name="compare") if record else None
    result = run_comparison(first, second, page=html, num_changed=count, settings=settings)
    typer.echo(json.dumps(result.to_json_dict()) if as_json else result.to_text())
