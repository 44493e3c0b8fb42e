"""The public datasets that can be turned into shards, by name."""

import difflib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from pixellm.errors import ConfigError
from pixellm.platform.data.sources.ade20k import Ade20kSource
from pixellm.platform.data.sources.base import PictureSource
from pixellm.platform.data.sources.coco import CocoSource
from pixellm.platform.data.sources.coco_stuff import CocoStuffSource
from pixellm.platform.data.sources.generic_coco import GenericCocoSource
from pixellm.platform.data.sources.llava import LlavaInstructSource
from pixellm.platform.data.sources.lvis import LvisSource
from pixellm.platform.data.sources.mapillary import MapillarySource
from pixellm.platform.data.sources.muse import MuseSource
from pixellm.platform.data.sources.paco_lvis import PacoLvisSource
from pixellm.platform.data.sources.pascal_part import PascalPartSource
from pixellm.platform.data.sources.reasonseg import ReasonSegSource
from pixellm.platform.data.sources.refer import refer_sources
from pixellm.platform.data.sources.shapes import ShapesSource


def source_names() -> tuple[str, ...]:
    """Names that `get_source` knows."""
    return tuple(sorted(_sources()))


def get_source(name: str) -> PictureSource:
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


def is_generated(source: PictureSource) -> bool:
    """Whether a source makes its pictures itself, so that there is nothing to read."""
    return isinstance(source, ShapesSource)


def with_options(source: PictureSource, options: Mapping[str, Any]) -> PictureSource:
    """The source with its options (its fields besides `name` and `layout`) set, e.g. `{"split": "val"}`.

    Raises:
        ConfigError: the source has no such option, or a value is out of range.
    """
    if not options:
        return source
    known = {field.name for field in fields(source)} - {"name", "layout"} if is_dataclass(source) else set[str]()
    strange = ", ".join(f"--{name.replace('_', '-')}" for name in options if name not in known)
    if strange or not is_dataclass(source):
        own = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(known)) or "no option"
        raise ConfigError(f"{strange} does not belong to {source.name}, which takes {own}")
    return replace(source, **options)


def _sources() -> dict[str, PictureSource]:
    sources: tuple[PictureSource, ...] = (
        CocoSource(),
        GenericCocoSource(),
        CocoStuffSource(),
        Ade20kSource(),
        MapillarySource(),
        LvisSource(),
        PacoLvisSource(),
        PascalPartSource(),
        MuseSource(),
        ShapesSource(),
        LlavaInstructSource(),
        ReasonSegSource(),
        *refer_sources(),
    )
    return {source.name: source for source in sources}
