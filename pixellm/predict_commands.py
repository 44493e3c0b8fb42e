"""`pixellm predict`: one question about a few pictures, or about millions of them (part of `cli`)."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pixellm.errors import ConfigError
from pixellm.options import AsJson


def predict(
    words: Annotated[list[str], typer.Argument(metavar="[IMAGE…] QUESTION")],
    model: Annotated[str, typer.Option("--model", help="a folder, models:/NAME@alias or models:/NAME/VERSION")],
    out: Annotated[str, typer.Option("--out", help="folder for what comes out; with --in it may be a URI")] = (
        "predictions"
    ),
    inputs: Annotated[
        str | None, typer.Option("--in", help="batch: shards, or a folder of pictures at any depth (or URI)")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="where the model runs: cpu, cuda")] = "cpu",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="longest answer")] = 256,
    threshold: Annotated[
        float, typer.Option("--threshold", min=0, max=1, help="probability of a target's pixel")
    ] = 0.5,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="pictures answered together")] = 8,
    actors: Annotated[
        int, typer.Option("--actors", min=0, help="batch: most Ray actors; 0: in this process, without Ray")
    ] = 1,
    block_size: Annotated[int, typer.Option("--block-size", min=1, help="batch: pictures of a Parquet part")] = 64,
    retry_quarantined: Annotated[
        bool, typer.Option("--retry-quarantined", help="batch: do blocks with quarantined pictures again")
    ] = False,
    usd_per_hour: Annotated[
        float | None, typer.Option("--usd-per-hour", min=0, help="batch: price of one actor, for the cost line")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Answers one question about each picture: overlays and a JSON, or with --in Parquet parts with RLE masks.

    The same command goes on where a batch stopped; what cannot be answered is in OUT/quarantine with its reason.
    """
    if inputs is None:
        result = _predict_few(words, model, out, device, max_new_tokens, threshold, batch_size)
        typer.echo(json.dumps(result.to_json_dict()) if as_json else result.to_text())
        return
    if len(words) != 1:
        raise ConfigError(f'got {len(words)} words beside --in; wanted one, in quotes: --in URI --out URI "QUESTION"')
    from pixellm.jobs.batch.run import predict_batch
    from pixellm.jobs.batch.worker import BatchPlan
    from pixellm.jobs.block_pool import Pool
    from pixellm.platform import cluster
    from pixellm.platform.settings import ClusterSettings

    plan = BatchPlan(inputs, words[0], model, out, block_size, batch_size, max_new_tokens, threshold, device)
    pool = Pool(actors, num_gpus=1.0 if device.startswith("cuda") else 0.0)
    if actors:
        cluster.connect(ClusterSettings())
    try:
        with _CostLine(max(actors, 1), usd_per_hour) as line:
            done = predict_batch(plan, pool, retry_quarantined=retry_quarantined, on_progress=line.show)
    finally:
        if actors:
            cluster.disconnect()
    typer.echo(json.dumps(done.to_json_dict()) if as_json else done.to_text())


def _predict_few(
    words: list[str], model: str, out: str, device: str, max_new_tokens: int, threshold: float, batch_size: int
) -> Any:
    from pixellm.jobs.predict import predict as run_prediction

    if len(words) < 2:
        raise ConfigError('got no question; wanted pixellm predict IMAGE… "QUESTION" --model REF')
    *images, question = words
    return run_prediction(
        [Path(image) for image in images],
        question,
        model,
        out,
        max_new_tokens=max_new_tokens,
        threshold=threshold,
        batch_size=batch_size,
        device=device,
    )


class _CostLine:
    """`pictures 640/2000 · quarantined 5 · actor hours 0.02 · in all 0.06 · 12.3 samples/s · 1:51 left`."""

    def __init__(self, actors: int, usd_per_hour: float | None) -> None:
        self._unit = "actor hours" if usd_per_hour is None else "USD"
        self._per_hour = actors * (1.0 if usd_per_hour is None else usd_per_hour)
        self._line: Any = None

    def __enter__(self) -> "_CostLine":
        return self

    def __exit__(self, *_error: object) -> None:
        if self._line is not None:
            self._line.close()

    def show(self, progress: Any) -> None:
        """Draws how far it is."""
        from pixellm.platform.observability import ProgressLine

        self._line = self._line or ProgressLine(progress.total, unit="pictures")
        values = {"quarantined": float(progress.quarantined)}
        if progress.done_here:
            so_far, in_all = progress.cost(self._per_hour)
            values |= {self._unit: so_far, "in all": in_all}
        rate = progress.done_here / progress.elapsed_s if progress.elapsed_s else None
        self._line.update(progress.done, values, rate)
