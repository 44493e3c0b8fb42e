"""`pixellm muse …`: the commands that make a MUSE-style dataset and look it through (part of `cli`)."""

import json
from pathlib import Path
from typing import Annotated

import typer

muse_app = typer.Typer(no_args_is_help=True, help="Make a MUSE-style dataset, and look it through.")


@muse_app.command("generate")
def muse_generate(
    images: Annotated[str, typer.Option("--images", help="prepared shards with instance masks (folder or URI)")],
    out: Annotated[str, typer.Option("--out", help="gets the splits, the released JSON and the report")],
    base_url: Annotated[str, typer.Option("--base-url", help="an OpenAI-compatible endpoint; key: OPENAI_API_KEY")],
    model: Annotated[str, typer.Option("--model", help="the generator's model")],
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="pictures at most")] = None,
    budget_usd: Annotated[
        float | None, typer.Option("--budget-usd", min=0, help="what all runs into --out may cost together")
    ] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="requests under way at a time")] = 64,
    generator: Annotated[str, typer.Option("--generator", help="vision, or text (works from captions)")] = "vision",
    pairs_per_picture: Annotated[int, typer.Option("--pairs-per-picture", min=1, max=10)] = 2,
    judge_model: Annotated[str | None, typer.Option("--judge-model", help="asks it about each pair as well")] = None,
    price_prompt: Annotated[float, typer.Option("--price-prompt", min=0, help="USD per million tokens")] = 2.5,
    price_completion: Annotated[float, typer.Option("--price-completion", min=0, help="USD per million")] = 10.0,
    requests_per_minute: Annotated[float | None, typer.Option("--requests-per-minute", min=0.1)] = None,
    timeout_s: Annotated[float, typer.Option("--timeout-s", min=0.1, help="of one attempt")] = 120.0,
    seed: Annotated[int, typer.Option("--seed", help="decides pictures and splits")] = 0,
    val_share: Annotated[float, typer.Option("--val-share", min=0, max=0.5, help="of the pictures")] = 0.01138,
    test_share: Annotated[float, typer.Option("--test-share", min=0, max=0.5, help="of the pictures")] = 0.01748,
    work: Annotated[Path | None, typer.Option("--work", help="local folder of the answers; needed for s3:// …")] = None,
    actors: Annotated[int, typer.Option("--actors", min=0, help="async Ray actors; 0: no Ray")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object, for programs")] = False,
) -> None:
    """Annotated pictures → reasoning questions with several masks. The same command goes on where one stopped."""
    from pixellm.jobs.muse.command import generate_from_command_line

    report = generate_from_command_line(
        images,
        out,
        base_url=base_url,
        model=model,
        limit=limit,
        budget_usd=budget_usd,
        concurrency=concurrency,
        generator=generator,
        pairs_per_picture=pairs_per_picture,
        judge_model=judge_model,
        prices=(price_prompt, price_completion),
        requests_per_minute=requests_per_minute,
        timeout_s=timeout_s,
        seed=seed,
        shares=(val_share, test_share),
        work_dir=work,
        actors=actors,
    )
    typer.echo(json.dumps(report.to_json_dict()) if as_json else report.to_text())


@muse_app.command("review")
def muse_review(
    uri: Annotated[str, typer.Argument(help="what `muse generate` wrote, or shards with reasoning questions")],
    host: Annotated[str, typer.Option("--host")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535)] = 8001,
    who: Annotated[str | None, typer.Option("--who", help="the reviewer's name; else the login's")] = None,
    write_back: Annotated[
        bool, typer.Option("--write-back", help="no page: write all decisions back into the dataset, and end")
    ] = False,
) -> None:
    """A page to accept, reject and edit pairs with their masks drawn. Ctrl-C stops it."""
    if write_back:
        from pixellm.jobs.muse.review_data import apply_review

        typer.echo(apply_review(uri).to_text())
        return
    from pixellm.jobs.muse.review import review_forever

    review_forever(uri, host=host, port=port, who=who)
