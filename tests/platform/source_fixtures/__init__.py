"""One small folder in the genuine layout of each source, for every test that must hold for all of them.

A file here per source (or family of sources) holds `FIXTURES`, a tuple of `SourceFixture`; it is found by being here.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class SourceFixture:
    """How to prepare one source from a folder that `build` fills.

    `build` gets an empty folder and writes the layout into it, the same bytes each time. `rows`, `targets` and
    `skipped` are what a preparation must report, known without running it. `options` are those of the command line
    (`{"split": "val"}`); `skip_bad_masks` as there.
    """

    source: str
    build: Callable[[Path], object]
    rows: int
    targets: int
    skipped: Mapping[str, int] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    skip_bad_masks: bool = False
    variant: str = ""

    def __str__(self) -> str:
        return f"{self.source}-{self.variant}" if self.variant else self.source


def all_fixtures() -> list[SourceFixture]:
    """Those of every file in this folder, by source name."""
    found: list[SourceFixture] = []
    for module in pkgutil.iter_modules(__path__):
        found += importlib.import_module(f"{__name__}.{module.name}").FIXTURES
    return sorted(found, key=str)
