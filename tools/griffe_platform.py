"""Lets the API page see `pixellm.platform`, a folder that must never hold an `__init__.py` (decision 0001).

Python imports it as a namespace package; griffe, which reads the sources for mkdocstrings, passes over such folders
inside a regular package. `mkdocs.yml` names this file.
"""

from typing import Any

import griffe


class NamespaceFolder(griffe.Extension):
    """Adds the folder as an empty module, which griffe then fills as any other."""

    def on_module_instance(self, *, mod: griffe.Module, **_kwargs: Any) -> None:
        """Changes the root package alone; called before the modules below it are looked for."""
        if mod.path == "pixellm":
            folder = mod.filepath.parent / "platform"  # type: ignore[union-attr]
            mod.set_member("platform", griffe.Module("platform", filepath=folder))
