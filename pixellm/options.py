"""What several commands take and say in the same way (part of `cli`)."""

from collections.abc import Sequence
from typing import Annotated

import typer

from pixellm.errors import ConfigError

AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on standard output, for programs")]


def overrides(words: Sequence[str]) -> list[str]:
    """The words behind a command that change its recipe.

    Raises:
        ConfigError: one of them is no `--section.key=value`.
    """
    strange = [word for word in words if not (word.startswith("--") and "=" in word)]
    if strange:
        raise ConfigError(f"unknown argument {strange[0]!r}; overrides are written --section.key=value (no space)")
    return list(words)
