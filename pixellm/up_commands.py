"""`pixellm up`, `status` and `down`: a team's single machine (part of `cli`)."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pixellm.options import AsJson, overrides

Folder = Annotated[Path, typer.Option("--state", help="folder of the state file, Ray's token and the logs")]

_DEFAULT_FOLDER = Path.home() / ".pixellm" / "up"


def up(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", help="what is served")] = "models:/pixellm@champion",
    host: Annotated[str, typer.Option("--host", help="where the service listens")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="of the service")] = 8000,
    mlflow_port: Annotated[int, typer.Option("--mlflow-port", min=0, max=65535)] = 5000,
    dashboard_port: Annotated[
        int, typer.Option("--dashboard-port", min=0, max=65535, help="Ray's, where jobs are submitted")
    ] = 8265,
    ray_port: Annotated[int, typer.Option("--ray-port", min=0, max=65535, help="Ray's control store")] = 6379,
    metrics_port: Annotated[
        int, typer.Option("--metrics-port", min=0, max=65535, help="Ray's metrics, for Prometheus")
    ] = 8080,
    num_cpus: Annotated[int | None, typer.Option("--num-cpus", min=1, help="logical CPUs of Ray")] = None,
    folder: Folder = _DEFAULT_FOLDER,
    config: Annotated[Path | None, typer.Option("--config", help="YAML recipe: sections serve and tracking")] = None,
    as_json: AsJson = False,
) -> None:
    """Starts Ray, MLflow's page and the service here, and returns when they answer; again: what is missing."""
    from pixellm.platform.settings import load_settings
    from pixellm.up import up as bring_up
    from pixellm.up_state import Ports

    words = overrides(context.args)
    ports = Ports(port, mlflow_port, dashboard_port, ray_port, metrics_port)
    report = bring_up(
        folder,
        load_settings(config, words),
        model=model,
        ports=ports,
        host=host,
        num_cpus=num_cpus,
        service_words=[*(["--config", str(config)] if config else []), *words],
    )
    typer.echo(json.dumps(report.to_json_dict()) if as_json else report.to_text())


def status(folder: Folder = _DEFAULT_FOLDER, as_json: AsJson = False) -> None:
    """What `pixellm up` has up on this machine; exit code 1 unless all of it runs."""
    from pixellm.up import status as look

    report = look(folder)
    typer.echo(json.dumps(report.to_json_dict()) if as_json else report.to_text())
    raise typer.Exit(0 if report.is_all_up else 1)


def down(folder: Folder = _DEFAULT_FOLDER) -> None:
    """Ends what `pixellm up` started, and removes what it wrote."""
    from pixellm.up import down as bring_down

    typer.echo("down" if bring_down(folder) else "nothing was up")
