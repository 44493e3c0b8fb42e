"""The command line: `pixellm COMMAND`. Each calls one function of jobs, serve or the demo and prints its result.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 130 interrupted. Anything that a user or a file can cause
ends in one line on standard error, never in a traceback. Slow imports happen inside the commands, so `--help` is quick.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from pixellm import __version__
from pixellm.errors import ConfigError, PixelLMError
from pixellm.evaluate_commands import compare, evaluate
from pixellm.muse_commands import muse_app
from pixellm.options import AsJson, overrides
from pixellm.predict_commands import predict
from pixellm.up_commands import down, status, up

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__.split("\n")[0]
)
data_app = typer.Typer(no_args_is_help=True, help="Prepare datasets as shards, and look at them.")
models_app = typer.Typer(no_args_is_help=True, help="The model registry: list, show, promote, rollback.")
jobs_app = typer.Typer(no_args_is_help=True, help="Jobs on a cluster: list, status, logs, stop.")
convert_app = typer.Typer(no_args_is_help=True, help="Turn other checkpoints into pixellm model folders.")
app.add_typer(data_app, name="data")
app.add_typer(muse_app, name="muse")
app.add_typer(models_app, name="models")
app.add_typer(jobs_app, name="jobs")
app.add_typer(convert_app, name="convert")
app.command()(evaluate)
app.command()(compare)
app.command()(predict)
app.command()(status)
app.command()(down)

_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(context_settings=_OVERRIDES)(up)

Config = Annotated[Path | None, typer.Option("--config", help="YAML recipe; dotted overrides follow: --train.lr=1e-4")]
Address = Annotated[
    str | None,
    typer.Option(
        "--address", help="the cluster's dashboard, http://HEAD:8265 [default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS]"
    ),
]


def main() -> None:
    """Entry point of the `pixellm` script: runs a command and turns our errors into one line and an exit code."""
    from pixellm.platform.observability import configure_logging
    from pixellm.platform.settings import check_secrets

    try:
        configure_logging()
        check_secrets()
        app()
    except PixelLMError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:  # a file or folder that a command was given: it names it
        typer.echo(f"error: {error}; check the path, its permissions and the space on the disk", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        typer.echo(f"pixellm {__version__}")
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="the folder everything is written to")] = Path("demo"),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="where the service listens")] = 8000,
    steps: Annotated[int | None, typer.Option("--steps", help="training steps; the recipe's when not given")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="leave the service up and print how to query it")] = False,
) -> None:
    """Real photographs → shards → training on 2 workers → registry → serving → pictures, on this machine."""
    from pixellm.demo import run_demo

    run_demo(out, port=port, steps=steps, keep=keep)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Checks this machine: versions, devices, Ray, MLflow, compiler, disk; says what to do."""
    from pixellm.jobs.doctor import diagnose

    report = diagnose()
    _print(report.to_json_dict(), report.to_text(), as_json)
    raise typer.Exit(0 if report.is_healthy else 1)


@data_app.command("prepare")
def data_prepare(
    source: Annotated[str, typer.Argument(help="coco, muse, shapes, …")],
    out: Annotated[str, typer.Option("--out", help="where the shards go (folder or URI)")],
    input_dir: Annotated[
        str | None,
        typer.Option("--in", help="the dataset's folder (or URI), laid out as its publisher does; not for shapes"),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="stop at the first bad record instead of skipping it")
    ] = False,
    skip_bad_masks: Annotated[
        bool, typer.Option("--skip-bad-masks", help="leave out masks outside their picture")
    ] = False,
    samples: Annotated[int | None, typer.Option("--samples", help="shapes: pictures to generate")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="shapes: another seed gives other pictures")] = None,
    split: Annotated[str | None, typer.Option("--split", help="train, val, …: as the source names its splits")] = None,
    split_by: Annotated[str | None, typer.Option("--split-by", help="refcoco…: unc, umd or google")] = None,
    shuffle_questions: Annotated[
        bool, typer.Option("--shuffle-questions", help="shapes: every answer under another picture's question")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Public dataset → Parquet shards, on the cluster (RAY_ADDRESS, else a local one).

    Ends with counts of what was kept and skipped, and a digest. The same command goes on where one was interrupted.
    """
    from pixellm.jobs.prepare import open_source, prepare
    from pixellm.platform import cluster

    given = {"samples": samples, "seed": seed, "split": split, "split_by": split_by}
    given |= {"shuffle_questions": shuffle_questions or None}
    options = {name: value for name, value in given.items() if value is not None}
    open_source(source, input_dir, options)  # what is wrong with the command is said before Ray starts
    cluster.connect()
    try:
        with _picture_bar() as progress:
            report = prepare(
                source,
                input_dir,
                out,
                strict=strict,
                skip_bad_masks=skip_bad_masks,
                options=options,
                progress=progress,
                on_ray=True,
            )
    finally:
        cluster.disconnect()
    _print(report.to_json_dict(), report.to_text(), as_json)


@data_app.command("split")
def data_split(
    uri: Annotated[str, typer.Argument(help="shards with written questions, e.g. of MUSE")],
    out: Annotated[str, typer.Option("--out", help="folder (or URI) for train/ val/ test/ test_few/ test_many/")],
    val: Annotated[float, typer.Option("--val", min=0, max=1, help="share of the pictures")] = 0.02,
    test: Annotated[float, typer.Option("--test", min=0, max=1, help="share of the pictures")] = 0.03,
    few: Annotated[int, typer.Option("--few", min=1, help="targets of a question that still are few")] = 3,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Train, val and test with no picture in two of them; test also by few and many targets."""
    from pixellm.jobs.benchmark_sets import make_splits

    report = make_splits(uri, out, val=val, test=test, few=few, seed=seed)
    _print(report.to_json_dict(), report.to_text(), as_json)


@data_app.command("multi-referring")
def data_multi_referring(
    uri: Annotated[str, typer.Argument(help="shards of a refcoco… split")],
    out: Annotated[str, typer.Option("--out", help="where the shards go (folder or URI)")],
    min_targets: Annotated[int, typer.Option("--min-targets", min=1, help="of a question")] = 3,
    max_targets: Annotated[int, typer.Option("--max-targets", min=1, help="of a question")] = 6,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Single expressions → questions for several targets: the benchmark of the paper's Table 2."""
    from pixellm.jobs.benchmark_sets import make_multi_referring

    report = make_multi_referring(uri, out, min_targets=min_targets, max_targets=max_targets, seed=seed)
    _print(report.to_json_dict(), report.to_text(), as_json)


@data_app.command("audit")
def data_audit(
    uris: Annotated[list[str], typer.Argument(metavar="URI…", help="shards to look at")],
    against: Annotated[
        list[str] | None, typer.Option("--against", help="benchmark shards whose pictures they must not hold")
    ] = None,
    check: Annotated[
        list[str] | None,
        typer.Option("--check", help="leak, hidden-target, empty-answer, repeated-question; all when not given"),
    ] = None,
    drop: Annotated[str | None, typer.Option("--drop", help="write DROP/NAME without what was found")] = None,
    hidden_share: Annotated[
        float, typer.Option("--hidden-share", min=0, max=1, help="of a target's pixels under others")
    ] = 0.95,
    as_json: AsJson = False,
) -> None:
    """Pictures that are in a benchmark too, hidden targets, empty answers, repeated questions; --drop cleans."""
    from pixellm.jobs.audit import audit, named_checks

    with _picture_bar() as progress:
        report = audit(
            uris,
            against=against or [],
            checks=named_checks(check or []),
            drop=drop,
            hidden_share=hidden_share,
            progress=progress,
        )
    _print(report.to_json_dict(), report.to_text(), as_json)


@data_app.command("stats")
def data_stats(
    uris: Annotated[list[str], typer.Argument(metavar="URI…", help="shards")],
    plot: Annotated[Path | None, typer.Option("--plot", help="PNG to write the histograms to")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="self-contained page to write")] = None,
    as_json: AsJson = False,
) -> None:
    """Counts per source, targets per question, mask areas, text lengths, licences."""
    from pixellm.jobs.data_stats import plot_stats, stats, stats_table, write_stats_page

    reports = [stats(uri) for uri in uris]
    written = [str(plot_stats(reports, plot))] if plot is not None else []
    written += [str(write_stats_page(reports, html))] if html is not None else []
    as_dicts = [report.to_json_dict() for report in reports]
    texts = [stats_table(reports), *(report.to_text() for report in reports), *written]
    _print(as_dicts[0] if len(as_dicts) == 1 else {"datasets": as_dicts}, "\n\n".join(texts), as_json)


@data_app.command("show")
def data_show(
    uris: Annotated[list[str], typer.Argument(metavar="URI…", help="shards")],
    out: Annotated[Path | None, typer.Option("--out", help="PNG to write [default: contact_sheet.png]")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="self-contained page to write")] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="samples drawn")] = 12,
    as_json: AsJson = False,
) -> None:
    """A contact sheet: samples with their masks, questions and answers."""
    from pixellm.jobs.data_show import show, write_samples_page

    written = [str(write_samples_page(uris, html, n=count))] if html is not None else []
    if out is not None or html is None:
        written.append(str(show(uris, out or Path("contact_sheet.png"), n=count)))
    _print({"written": written}, "\n".join(written), as_json)


@app.command(context_settings=_OVERRIDES)
def train(
    context: typer.Context,
    config: Config = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="start anew instead of resuming the run of this name")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print parameters, memory, steps and time; start nothing")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="print the resolved settings as a recipe; start nothing")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Trains as a recipe says. Ctrl-C leaves a checkpoint; the same command goes on from it."""
    if print_config:
        settings = _settings(config, context)
        _print(settings.model_dump(mode="json"), settings.to_yaml().rstrip(), as_json)
        return
    if dry_run:
        from pixellm.jobs.train.plan import plan_training

        plan = plan_training(_settings(config, context))
        _print(plan.to_json_dict(), plan.to_text(), as_json)
        return
    from pixellm.jobs.train.run import train as run_training

    result = run_training(_settings(config, context), fresh=fresh)
    _print(result.to_json_dict(), result.to_text(), as_json)
    if result.interrupted:
        raise typer.Exit(130)


@models_app.command("list")
def models_list(name: Annotated[str, typer.Option("--name")] = "pixellm", as_json: AsJson = False) -> None:
    """The registered versions with their aliases and metrics."""
    from pixellm.jobs import models

    report = models.list_versions(name)
    _print(report.to_json_dict(), report.to_text(), as_json)


@models_app.command("show")
def models_show(reference: str, as_json: AsJson = False) -> None:
    """One version: aliases, metrics, run, where its files are."""
    from pixellm.jobs import models

    report = models.show_version(reference)
    _print(report.to_json_dict(), report.to_text(), as_json)


@models_app.command("promote")
def models_promote(
    reference: Annotated[
        str, typer.Argument(help="models:/NAME@candidate or models:/NAME/VERSION")
    ] = "models:/pixellm@candidate",
    to: Annotated[str, typer.Option("--to", help="the alias; champion is the only one that is asked for")] = "champion",
    require: Annotated[
        list[str] | None, typer.Option("--require", help="METRIC>=VALUE, e.g. 'muse.giou>=0.40'; may be repeated")
    ] = None,
    no_regression: Annotated[
        list[str] | None,
        typer.Option(
            "--no-regression", help="METRIC[:POINTS], e.g. mrefcoco.ciou:0.5: percentage points; may be repeated"
        ),
    ] = None,
    metric: Annotated[str | None, typer.Option("--metric", help="of --floor and --max-regression [giou]")] = None,
    floor: Annotated[float | None, typer.Option("--floor", min=0, max=1, help="least value that passes [0]")] = None,
    max_regression: Annotated[
        float | None, typer.Option("--max-regression", min=0, help="how far below the champion's value [0.02]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Moves `champion` to a version if it passes every gate, or says why not (exit 1).

    With --require or --no-regression alone, these are the gates; else one on --metric. `pixellm evaluate --model
    models:/…` gives a version the metrics of a suite, as SUITE.METRIC.
    """
    from pixellm.jobs import models
    from pixellm.platform.gate import Gate, parse_no_regression, parse_requirement

    if to != "champion":
        raise ConfigError(f"--to is {to!r}; wanted champion, which services follow")
    gates = [*map(parse_requirement, require or []), *map(parse_no_regression, no_regression or [])]
    if not gates or (metric, floor, max_regression) != (None, None, None):
        given: dict[str, Any] = {"metric": metric, "floor": floor, "max_regression": max_regression}
        gates.append(Gate(**{name: value for name, value in given.items() if value is not None}))
    report = models.promote(reference, gates=gates)
    _print(report.to_json_dict(), report.to_text(), as_json)
    raise typer.Exit(0 if report.passed else 1)


@models_app.command("rollback")
def models_rollback(name: Annotated[str, typer.Option("--name")] = "pixellm", as_json: AsJson = False) -> None:
    """Gives `champion` back to the version that held it before."""
    from pixellm.jobs import models

    report = models.rollback(name)
    _print(report.to_json_dict(), report.to_text(), as_json)


@app.command(context_settings=_OVERRIDES)
def serve(
    context: typer.Context,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="models:/pixellm@champion when not given; several are served by their names"),
    ] = None,
    canary: Annotated[
        list[str] | None, typer.Option("--canary", help="a share of the traffic: models:/pixellm@candidate=10%")
    ] = None,
    host: Annotated[str | None, typer.Option("--host")] = None,
    port: Annotated[int | None, typer.Option("--port", min=0, max=65535)] = None,
    config: Config = None,
) -> None:
    """The HTTP API and the page, on autoscaled engine replicas; aliases are followed. Ctrl-C stops it."""
    from pixellm.serve.app import serve_forever

    models = model or ["models:/pixellm@champion"]
    serve_forever(_settings(config, context), models, canaries=canary or [], host=host, port=port)


@app.command()
def query(
    image: Path,
    question: str,
    url: Annotated[str, typer.Option("--url", help="a running service")] = "http://127.0.0.1:8000",
    out: Annotated[Path | None, typer.Option("--out", help="folder for an overlay and a PNG per mask")] = None,
    api_key: Annotated[str | None, typer.Option("--api-key", help="or the variable PIXELLM_API_KEY")] = None,
    as_json: AsJson = False,
) -> None:
    """Asks a running service one question about a picture."""
    from pixellm.serve.query import query as ask

    report = ask(image, question, url=url, out_dir=out, api_key=api_key)
    _print(report.to_json_dict(), report.to_text(), as_json)


@app.command()
def key(name: Annotated[str, typer.Argument(help="who it is for")], as_json: AsJson = False) -> None:
    """Makes an API key for a service, and the line with its hash for serve.api_keys_file."""
    from pixellm.serve.auth import new_key

    secret, line = new_key(name)
    text = f"key, shown this once:       {secret}\nline for the key file:      {line}"
    _print({"key": secret, "line": line}, text, as_json)


@app.command(
    context_settings=_OVERRIDES | {"allow_interspersed_args": False},
    options_metavar="COMMAND… [--wait] [--secret NAME]…",
)
def submit(context: typer.Context, address: Address = None) -> None:
    """Runs a pixellm command on a cluster: pixellm submit train --config X --address URL [--wait].

    COMMAND… are the words behind `pixellm`: train, evaluate, predict, data, … with their options. --wait prints what
    the job prints and ends with its exit code. --secret NAME hands it a variable that the cluster holds, e.g.
    OPENAI_API_KEY; it may be given several times.
    """
    from pixellm.jobs.submit import submit_from_command_line

    raise typer.Exit(submit_from_command_line(context.args, address=address))


@jobs_app.command("list")
def jobs_list(address: Address = None, as_json: AsJson = False) -> None:
    """The cluster's jobs and their states."""
    from pixellm.jobs import submit as submission

    report = submission.list_jobs(address)
    _print(report.to_json_dict(), report.to_text(), as_json)


@jobs_app.command("status")
def jobs_status(job_id: str, address: Address = None, as_json: AsJson = False) -> None:
    """A job's state."""
    from pixellm.jobs import submit as submission

    state = submission.job_status(job_id, address)
    _print({"job_id": job_id, "status": state}, state, as_json)


@jobs_app.command("logs")
def jobs_logs(
    job_id: str,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="until it ends")] = False,
) -> None:
    """What a job printed."""
    from pixellm.jobs import submit as submission

    submission.print_logs(job_id, address, follow=follow)


@jobs_app.command("stop")
def jobs_stop(job_id: str, address: Address = None, as_json: AsJson = False) -> None:
    """Asks a job to stop; training leaves a checkpoint."""
    from pixellm.jobs import submit as submission

    said = submission.stop_job(job_id, address)
    _print({"job_id": job_id, "message": said}, said, as_json)


@convert_app.command("official")
def convert_official(
    src: Annotated[Path, typer.Argument(help="the released checkpoint's folder (sharded .bin or safetensors)")],
    dst: Annotated[Path, typer.Argument(help="the model folder to write")],
    vision: Annotated[str, typer.Option("--vision", help="folder of the CLIP tower")],
    tokens_per_scale: Annotated[int, typer.Option("--tokens-per-scale", min=1, max=4)] = 3,
    num_scales: Annotated[int, typer.Option("--num-scales", min=1, max=3)] = 2,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="its folder, where SRC holds none")] = None,
    as_json: AsJson = False,
) -> None:
    """Released PixelLM weights → a model folder, streaming; every key that does not fit is listed in one error."""
    from pixellm.model.convert import convert_official as convert

    report = convert(src, dst, vision, tokens_per_scale=tokens_per_scale, num_scales=num_scales, tokenizer=tokenizer)
    _print(report.to_json_dict(), report.to_text(), as_json)


@convert_app.command("lisa")
def convert_lisa(
    src: Annotated[str, typer.Argument(help="the released checkpoint's folder or Hugging Face id")],
    dst: Annotated[Path, typer.Argument(help="the model folder to write")],
    vision: Annotated[str, typer.Option("--vision", help="CLIP tower")] = "openai/clip-vit-large-patch14",
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="its folder, where SRC holds none")] = None,
    variant: Annotated[str, typer.Option("--variant", help="lisa (one mask) or lisa_aug (a mask per target)")] = "lisa",
    as_json: AsJson = False,
) -> None:
    """Released LISA weights → a model folder of the baseline, which trains and evaluates as PixelLM does."""
    from pixellm.model.baselines.lisa_convert import convert_lisa as convert

    report = convert(src, dst, vision, tokenizer=tokenizer, variant=variant)
    _print(report.to_json_dict(), report.to_text(), as_json)


@app.command()
def init(
    llm: Annotated[str, typer.Option("--llm", help="folder or Hugging Face id of a Llama or LLaVA-1.5 checkpoint")],
    vision: Annotated[str, typer.Option("--vision", help="folder or Hugging Face id of a CLIP tower")],
    out: Annotated[Path, typer.Option("--out", help="the model folder to write")],
    tokens_per_scale: Annotated[int, typer.Option("--tokens-per-scale", min=1, max=4)] = 3,
    num_scales: Annotated[int, typer.Option("--num-scales", min=1, max=3)] = 2,
    image_size: Annotated[int, typer.Option("--image-size", min=28)] = 448,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    sam: Annotated[str | None, typer.Option("--sam", help="a Segment Anything: starts the baseline LISA")] = None,
    as_json: AsJson = False,
) -> None:
    """How a real run starts: a pretrained language model and CLIP tower plus freshly drawn PixelLM parts."""
    from pixellm.model.baselines.lisa_init import init_lisa
    from pixellm.model.init import init_model

    if sam is not None:
        report = init_lisa(llm, vision, sam, out, seed=seed)
        _print(report.to_json_dict(), report.to_text(), as_json)
        return
    report = init_model(
        llm, vision, out, tokens_per_scale=tokens_per_scale, num_scales=num_scales, image_size=image_size, seed=seed
    )
    _print(report.to_json_dict(), report.to_text(), as_json)


@app.command()
def flops(
    preset: Annotated[str, typer.Option("--preset", help="tiny, small, pixellm-7b, pixellm-13b")] = "pixellm-7b",
    against: Annotated[str, typer.Option("--against", help="lisa-7b, lisa-13b, or another preset")] = "lisa-7b",
    as_json: AsJson = False,
) -> None:
    """TFLOPs per part, counted on meta tensors, beside LISA's and the paper's (Table 1)."""
    from pixellm.model.flops import compare_flops

    comparison = compare_flops(preset, against)
    _print(comparison.to_json_dict(), comparison.to_text(), as_json)


@contextmanager
def _picture_bar() -> Iterator[Callable[[int, int | None], None] | None]:
    """A progress bar on standard error, on a terminal only."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich import console, progress  # slow

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console.Console(stderr=True)) as bar:
        task = bar.add_task("pictures", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _settings(config: Path | None, context: typer.Context) -> Any:
    from pixellm.platform.settings import load_settings

    return load_settings(config, overrides(context.args))


def _print(as_dict: dict[str, Any], as_text: str, as_json: bool) -> None:
    typer.echo(json.dumps(as_dict) if as_json else as_text)


if __name__ == "__main__":
    main()
