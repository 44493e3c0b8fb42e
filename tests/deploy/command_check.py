"""Whether a written `pixellm …` command is one that the command line takes: its name, options, values and settings."""

from pathlib import Path
from typing import Any

import typer
import typer.main

from pixellm.cli import app
from pixellm.errors import PixelLMError
from pixellm.platform.settings import load_settings

REPOSITORY = Path(__file__).resolve().parents[2]
# Typer carries a copy of click of its own: this is its UsageError.
_UsageError: Any = typer.BadParameter.__bases__[0]


def problem_with(words: list[str]) -> str | None:
    """What the command line would refuse before anything runs; None where it would start.

    Args:
        words: e.g. ["pixellm", "train", "--config", "recipes/tiny.yaml"].
    """
    if words[1] == "submit":
        return _problem_of_submit(words[2:])
    command: Any = typer.main.get_command(app)
    context, rest = None, list(words[1:])
    try:
        while (below := getattr(command, "commands", None)) is not None:
            if rest and rest[0].startswith("-"):  # an option of its own: --help, --version
                context = command.make_context(command.name, rest, parent=context)
                return None
            if not rest or rest[0] not in below:
                return f"no such command: {' '.join(words)}"
            name, *rest = rest
            command = below[name]
        leaf = command.make_context(command.name, rest, parent=context)
    except typer.Exit:  # --help
        return None
    except _UsageError as error:
        return str(error.format_message())
    return _problem_of_settings(leaf.params.get("config"), leaf.args)


def _problem_of_settings(config: Path | None, overrides: list[str]) -> str | None:
    if not overrides and config is None:
        return None
    try:
        load_settings(REPOSITORY / config if config else None, overrides)
    except PixelLMError as error:
        return str(error)
    return None


def _problem_of_submit(words: list[str]) -> str | None:
    from pixellm.jobs.submission import parse_submit_words

    try:
        options = parse_submit_words(words)
    except PixelLMError as error:
        return str(error)
    return problem_with(["pixellm", *options.command])
