"""Expands a kustomization, as far as ours go: resources, namespace, images, JSON patches, generated ConfigMaps.

Anything else in a kustomization is an error here, so that nothing is silently left out of what the tests look at.
"""

from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]

_KNOWN = {
    "apiVersion",
    "configMapGenerator",
    "generatorOptions",
    "images",
    "kind",
    "labels",
    "namespace",
    "patches",
    "resources",
}
_CLUSTER_WIDE = {"Namespace"}


def build(folder: Path) -> list[Object]:
    """The objects that `kubectl apply -k FOLDER` would send."""
    written: Object = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    assert set(written) <= _KNOWN, f"{folder}: not understood here: {set(written) - _KNOWN}"
    objects: list[Object] = []
    for name in written.get("resources", []):
        path = folder / name
        assert path.exists(), f"{folder} names {name}, which does not exist"
        if path.is_dir():
            objects += build(path)
        else:
            # kustomize reads files below the folder of the kustomization only
            assert path.resolve().is_relative_to(folder.resolve()), f"{folder}: {name} is outside"
            objects += [item for item in yaml.safe_load_all(path.read_text(encoding="utf-8")) if item]
    objects += [_config_map(folder, generator) for generator in written.get("configMapGenerator", [])]
    for patch in written.get("patches", []):
        _patch(objects, folder, patch)
    for item in objects:
        if "namespace" in written and item["kind"] not in _CLUSTER_WIDE:
            item["metadata"]["namespace"] = written["namespace"]
        for image in written.get("images", []):
            _retag(item, image)
    return objects


def _config_map(folder: Path, generator: Object) -> Object:
    assert set(generator) == {"name", "files"}
    data = {name: (folder / name).read_text(encoding="utf-8") for name in generator["files"]}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generator["name"]}, "data": data}


def _patch(objects: list[Object], folder: Path, patch: Object) -> None:
    target = patch["target"]
    found = [item for item in objects if item["kind"] == target["kind"] and item["metadata"]["name"] == target["name"]]
    assert len(found) == 1, f"{folder}: the patch {patch['path']} fits {len(found)} objects"
    for operation in yaml.safe_load((folder / patch["path"]).read_text(encoding="utf-8")):
        _apply(found[0], operation)


def _apply(item: Any, operation: Object) -> None:
    """One operation of RFC 6902: `add` and `replace`."""
    *parents, leaf = operation["path"].removeprefix("/").split("/")
    for key in parents:
        item = item[int(key)] if isinstance(item, list) else item[key]
    if operation["op"] == "replace":
        assert leaf in item, f"{operation['path']} replaces what is not there"
    else:
        assert operation["op"] == "add"
    if isinstance(item, list):
        assert leaf == "-"
        item.append(operation["value"])
    else:
        item[leaf] = operation["value"]


def _retag(node: Any, image: Object) -> None:
    if isinstance(node, dict):
        for container in node.get("containers", []) if isinstance(node.get("containers"), list) else []:
            if container["image"].split(":")[0] == image["name"]:
                container["image"] = f"{image.get('newName', image['name'])}:{image['newTag']}"
        for value in node.values():
            _retag(value, image)
    elif isinstance(node, list):
        for value in node:
            _retag(value, image)
