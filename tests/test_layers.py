"""Imports point one way: `errors` ← `model` | `platform` ← `jobs` | `serve` ← the command line. Read with `ast`."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pixellm

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("model", "platform", "jobs", "serve")

# Who may import whom. "root" is `import pixellm` for its version, "top" the command line and the demo.
ALLOWED = {
    "errors": set[str](),
    "root": {"errors"},
    "model": {"errors", "root", "model"},
    "platform": {"errors", "root", "platform"},
    "jobs": {"errors", "root", "model", "platform", "jobs"},
    "serve": {"errors", "root", "model", "platform", "serve"},
    "top": {"errors", "root", "model", "platform", "jobs", "serve", "top"},
}
# Third-party packages that a layer must do without.
FORBIDDEN = {"model": {"ray", "mlflow"}, "platform": {"torch", "transformers", "peft", "deepspeed"}}


def sources() -> list[Path]:
    folders = [REPOSITORY / name for name in PACKAGES]
    return sorted(
        [path for folder in folders for path in folder.rglob("*.py")] + list((REPOSITORY / "pixellm").glob("*.py"))
    )


def layer_of_file(path: Path) -> str:
    first = path.relative_to(REPOSITORY).parts[0]
    if first != "pixellm":
        return first
    return {"errors.py": "errors", "__init__.py": "root"}.get(path.name, "top")


def layer_of_module(module: str) -> str:
    parts = module.split(".")
    if len(parts) == 1:
        return "root"
    return parts[1] if parts[1] in (*PACKAGES, "errors") else "top"


def imported_modules(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every module that is imported anywhere in the file, inside functions too, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            if node.module != "pixellm":
                yield str(node.module), node.lineno
                continue
            for alias in node.names:  # `from pixellm import PixelLMEngine` reaches the home of the name
                is_submodule = (REPOSITORY / "pixellm" / alias.name).exists() or (
                    REPOSITORY / "pixellm" / f"{alias.name}.py"
                ).exists()
                yield (
                    pixellm._HOMES.get(alias.name, f"pixellm.{alias.name}" if is_submodule else "pixellm"),
                    node.lineno,
                )


def type_checking_lines(tree: ast.AST) -> set[int]:
    """Lines under `if TYPE_CHECKING:`, which no process executes."""
    return {
        inner.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
        if hasattr(inner, "lineno")
    }


def wrong_arrows(text: str, layer: str) -> list[str]:
    tree = ast.parse(text)
    unexecuted = type_checking_lines(tree) if layer == "root" else set()  # the root names its types, lazily
    wrong = []
    for module, line in imported_modules(tree):
        head = module.split(".")[0]
        if head == "pixellm" and layer_of_module(module) not in ALLOWED[layer] and line not in unexecuted:
            wrong.append(f"line {line}: {layer} imports {module}")
        if head in FORBIDDEN.get(layer, set()):
            wrong.append(f"line {line}: {layer} imports {module}")
        if head in ("model", "jobs", "serve") or module.startswith("platform."):
            wrong.append(f"line {line}: {module} would be a second copy of pixellm.{module}")
    return wrong


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_import_points_down(path: Path) -> None:
    assert wrong_arrows(path.read_text(encoding="utf-8"), layer_of_file(path)) == []


@pytest.mark.parametrize(
    ("text", "layer"),
    [
        ("from pixellm.platform.masks import rle_encode", "model"),
        ("def f():\n    import pixellm.serve.app", "jobs"),
        ("from pixellm import PixelLMEngine", "platform"),
        ("from pixellm import jobs", "platform"),
        ("from pixellm.cli import app", "jobs"),
        ("import torch", "platform"),
        ("import ray.data", "model"),
        ("from model.decoder import PixelDecoder", "jobs"),
        ("from platform.masks import rle_encode", "jobs"),
    ],
)
def test_a_wrong_arrow_is_seen(text: str, layer: str) -> None:
    assert len(wrong_arrows(text, layer)) == 1


@pytest.mark.parametrize(
    ("text", "layer"),
    [
        ("import platform", "jobs"),
        ("from pixellm import PixelLMEngine, __version__", "serve"),
        ("import pixellm", "platform"),
        ("from pixellm.errors import DataError", "model"),
        ("import torch", "jobs"),
    ],
)
def test_a_right_arrow_passes(text: str, layer: str) -> None:
    assert wrong_arrows(text, layer) == []


def test_the_four_packages_are_symlinks_kept_in_the_package_folder() -> None:
    for name in (*PACKAGES, "recipes"):
        link = REPOSITORY / "pixellm" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name


def test_the_platform_folder_never_becomes_a_package() -> None:
    assert not (REPOSITORY / "platform" / "__init__.py").exists()


def environment_reads(tree: ast.AST) -> list[int]:
    """Lines that read an environment variable; setting one for children is allowed, and extending their PATH."""
    lines = []
    for node in ast.walk(tree):
        name: ast.AST | None = None
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.getenv", "os.environ.get", "os.environ.copy"):
            name = node.args[0] if node.args else node
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            name = node.slice if ast.unparse(node.value) == "os.environ" else None
        elif isinstance(node, ast.Compare) and any(ast.unparse(side) == "os.environ" for side in node.comparators):
            name = node.left
        if name is not None and not (isinstance(name, ast.Constant) and name.value == "PATH"):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_only_the_settings_read_environment_variables(path: Path) -> None:
    if path != REPOSITORY / "platform" / "settings.py":
        assert environment_reads(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_a_read_of_the_environment_is_seen_and_a_write_is_not() -> None:
    assert environment_reads(ast.parse("x = os.environ['A']")) == [1]
    assert environment_reads(ast.parse("os.getenv('A')\nos.environ.get('B')\n'C' in os.environ")) == [1, 2, 3]
    assert environment_reads(ast.parse("os.environ['A'] = '1'\nos.environ.setdefault('B', '2')")) == []
    assert environment_reads(ast.parse("os.environ['PATH'] = 'bin:' + os.environ['PATH']")) == []


def test_help_does_not_pay_for_the_heavy_libraries() -> None:
    import subprocess

    heavy = ("torch", "transformers", "ray", "mlflow", "deepspeed", "pyarrow")
    code = f"import sys, pixellm.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
