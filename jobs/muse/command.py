"""The command line's options as a plan, Ray where it is wanted, and a progress line."""

from pathlib import Path

from pixellm.errors import ConfigError
from pixellm.jobs.muse.asker import AskPlan, Prices
from pixellm.jobs.muse.asking import AskOptions, Generator
from pixellm.jobs.muse.report import MuseReport
from pixellm.jobs.muse.run import generate
from pixellm.jobs.muse.splits import SplitShares
from pixellm.platform.cluster import connect, disconnect
from pixellm.platform.data.shards import open_shards
from pixellm.platform.llm_service import ServiceSettings
from pixellm.platform.observability import ProgressLine
from pixellm.platform.settings import from_environment

_GENERATORS: dict[str, Generator] = {"vision": "vision", "text": "text"}


def generate_from_command_line(
    images: str,
    out: str,
    *,
    base_url: str,
    model: str,
    limit: int | None,
    budget_usd: float | None,
    concurrency: int,
    generator: str,
    pairs_per_picture: int,
    judge_model: str | None,
    prices: tuple[float, float],
    requests_per_minute: float | None,
    timeout_s: float,
    seed: int,
    shares: tuple[float, float],
    work_dir: Path | None,
    actors: int,
) -> MuseReport:
    """Runs `generate` with the options of `pixellm muse generate`; see there."""
    if generator not in _GENERATORS:
        raise ConfigError(f"there is no generator {generator!r}; wanted one of {', '.join(_GENERATORS)}")
    if not base_url.startswith(("http://", "https://")):
        raise ConfigError(f"--base-url is {base_url!r}; wanted an address such as https://api.openai.com/v1")
    key = from_environment().get("OPENAI_API_KEY")
    plan = AskPlan(
        source=open_shards(images),
        options=AskOptions(model, _GENERATORS[generator], pairs_per_picture, judge_model),
        service=ServiceSettings(base_url, key, timeout_s=timeout_s, requests_per_minute=requests_per_minute),
        prices=Prices(*prices),
        concurrency=concurrency,
    )
    cluster = connect() if actors else None
    line: ProgressLine | None = None

    def show(done: int, total: int) -> None:
        nonlocal line
        line = line or ProgressLine(total)
        line.update(done, {})

    try:
        return generate(
            plan,
            out,
            limit=limit,
            budget_usd=budget_usd,
            seed=seed,
            shares=SplitShares(*shares),
            work_dir=work_dir,
            actors=actors,
            progress=show,
        )
    finally:
        if line is not None:
            line.close()
        if cluster is not None and cluster.is_ours:
            disconnect()
