"""The demo's report: one self-contained HTML file with the figures, the served answers and the training curve."""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape
from PIL import Image

_MARKER = re.compile(r"\[(\d+)\]")


@dataclass(frozen=True)
class StepRow:
    """One line of the table of what happened.

    Attributes:
        step: what was done.
        seconds: how long it took.
        figure: the key figure, in words.
    """

    step: str
    seconds: float
    figure: str


@dataclass(frozen=True)
class TextPiece:
    """A run of an answer's words; `color` (CSS) ties it to a mask, None for plain words."""

    text: str
    color: str | None = None


@dataclass(frozen=True)
class Answer:
    """One served answer, ready to show: picture as a data URL, words in coloured pieces."""

    question: str
    picture: str
    pieces: tuple[TextPiece, ...]
    targets: tuple[str, ...]
    milliseconds: float


def color_pieces(text: str, phrases: Sequence[str], colors: Sequence[str]) -> tuple[TextPiece, ...]:
    """Cuts an answer at its `[k]` markers and colours the phrase before each.

    Args:
        text: the answer with `[1]`, `[2]`, … behind the words that name a target.
        phrases: the phrase of target k − 1, expected right before its marker.
        colors: CSS colour of target k − 1.

    Returns:
        Pieces that join to the text.
    """
    pieces: list[TextPiece] = []
    start = 0
    for match in _MARKER.finditer(text):
        index = int(match.group(1)) - 1
        before, color = text[start : match.start()], colors[index % len(colors)]
        phrase = phrases[index] if index < len(phrases) else ""
        cut = before.lower().rfind(phrase.lower()) if phrase else -1
        cut = len(before) if cut < 0 else cut
        pieces += [TextPiece(before[:cut]), TextPiece(before[cut:] + match.group(), color)]
        start = match.end()
    pieces.append(TextPiece(text[start:]))
    return tuple(piece for piece in pieces if piece.text)


def data_url(picture: Path | Image.Image, *, max_side: int = 1600, quality: int = 85) -> str:
    """A picture as a JPEG data URL, no side longer than `max_side` pixels."""
    image = Image.open(picture) if isinstance(picture, Path) else picture
    image = image.convert("RGB")
    image.thumbnail((max_side, max_side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def plot_losses(history: Sequence[Mapping[str, float]], path: Path) -> Path:
    """Draws the loss parts over steps.

    Args:
        history: one mapping per logged step with `step` and the loss parts.
        path: PNG to write.

    Returns:
        `path`.
    """
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots()
    steps = [row["step"] for row in history]
    parts = [key for key in ("loss", "text", "ref", "dice") if any(key in row for row in history)]
    for part in parts:
        axes.plot(steps, [row.get(part, float("nan")) for row in history], label=part, linewidth=1.6)
    axes.set(xlabel="step", ylabel="weighted loss", yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(parts))
    figure.savefig(path, dpi=130)
    return path


def write_report(path: Path, **context: Any) -> Path:
    """Renders `demo_report.html.jinja` with `context` into one self-contained file; returns its path."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["jinja", "html"])
    )
    path.write_text(environment.get_template("demo_report.html.jinja").render(**context), encoding="utf-8")
    return path
