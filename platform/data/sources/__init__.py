"""The public datasets that can be turned into shards, by name."""

import difflib

from pixellm.errors import ConfigError
from pixellm.platform.data.sources.base import Source
from pixellm.platform.data.sources.coco import CocoSource
from pixellm.platform.data.sources.muse import MuseSource


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


def _sources() -> dict[str, Source]:
    sources: tuple[Source, ...] = (CocoSource(), MuseSource())
    return {source.name: source for source in sources}
