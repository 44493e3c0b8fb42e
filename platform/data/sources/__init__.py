"""The public datasets that can be turned into shards, by name."""

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pixellm.errors import ConfigError
from pixellm.platform.data.sources.base import Source
from pixellm.platform.data.sources.coco import CocoSource
from pixellm.platform.data.sources.muse import MuseSource
from pixellm.platform.data.sources.shapes import ShapesSource


def source_names() -> tuple[str, ...]:
    """Names that `get_source` knows."""
    return tuple(sorted(_sources()))


def get_source(name: str) -> Source:
    """The source of that name.

    Raises:
        ConfigError: there is none; the nearest name is given.
    """
    known = _sources()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
        raise ConfigError(f"there is no source {name!r}; {hint}")
    return known[name]


def is_generated(source: Source) -> bool:
    """Whether a source makes its pictures itself, so that there is nothing to read."""
    return isinstance(source, ShapesSource)


def with_options(source: Source, options: Mapping[str, Any]) -> Source:
    """A generating source that makes what the options say (`ShapesSource`'s arguments).

    Raises:
        ConfigError: the source reads files and takes no options, or a value is out of range.
    """
    if not options:
        return source
    if not isinstance(source, ShapesSource):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in options)
        raise ConfigError(f"{names} is for generated sources; {source.name} is read from --in as it is")
    return replace(source, **options)


def _sources() -> dict[str, Source]:
    sources: tuple[Source, ...] = (CocoSource(), MuseSource(), ShapesSource())
    return {source.name: source for source in sources}
