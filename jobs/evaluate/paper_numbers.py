"""What the paper reports (Tables 1 to 3), to stand beside a run's own figures; percent, as printed there."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class PaperTable:
    """A table of the paper.

    Attributes:
        title: which, and what is not said there.
        columns: split and metric.
        rows: method and values, None where there is none.
        tflops: by method, where the table has them; the convention is the paper's own.
        note: what a reader of these rows must know.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]
    tflops: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


_SEEM = "SEEM has no maintained package: CLIPSeg stands in its place among the runs here, under its own name."


_MUSE = PaperTable(
    "Table 1: MUSE, judged by GPT-3.5",
    ("val gIoU", "val cIoU", "test few gIoU", "test few cIoU", "test many gIoU", "test many cIoU", "test gIoU",
     "test cIoU"),
    (
        ("SEEM", (13.6, 16.2, 23.6, 24.9, 8.5, 13.2, 11.7, 15.7)),
        ("LISA-7B", (18.8, 29.0, 24.7, 36.5, 9.6, 24.5, 12.8, 27.1)),
        ("LISA-7B rec", (24.5, 31.1, 30.0, 30.9, 12.4, 23.2, 16.2, 24.8)),
        ("LISA-7B aug", (42.0, 46.1, 43.5, 52.0, 37.7, 42.3, 38.9, 44.4)),
        ("PixelLM-7B†", (39.9, 48.0, 43.1, 56.7, 36.0, 38.2, 37.5, 42.2)),
        ("PixelLM-7B", (42.6, 50.7, 44.6, 59.2, 37.7, 42.8, 39.2, 46.3)),
        ("LISA-Llama2-13B", (20.4, 29.2, 27.5, 38.5, 10.9, 25.6, 14.4, 28.4)),
        ("LISA-Llama2-13B aug", (43.6, 50.2, 44.7, 60.0, 41.2, 47.9, 41.9, 50.5)),
        ("PixelLM-Llama2-13B†", (43.0, 51.7, 44.8, 61.6, 39.3, 44.6, 40.5, 48.2)),
        ("PixelLM-Llama2-13B", (44.8, 54.1, 45.2, 62.9, 41.5, 47.6, 42.3, 51.0)),
    ),
    {
        "SEEM": 0.43, "LISA-7B": 7.16, "LISA-7B rec": 7.16, "LISA-7B aug": 7.16, "PixelLM-7B†": 3.57,
        "PixelLM-7B": 3.57, "LISA-Llama2-13B": 10.24, "LISA-Llama2-13B aug": 10.24, "PixelLM-Llama2-13B†": 6.65,
        "PixelLM-Llama2-13B": 6.65,
    },
    _SEEM,
)  # fmt: skip
_UNC, _UMD = ("val", "testA", "testB"), ("val(U)", "test(U)")


def _multi(name: str, splits: tuple[str, ...], first: int) -> PaperTable:
    rows = {
        "LISA": (36.7, 38.3, 36.4, 34.0, 36.3, 32.1, 34.5, 36.2),
        "LISA aug": (68.9, 70.8, 66.3, 59.8, 62.2, 54.1, 62.3, 63.9),
        "PixelLM†": (70.3, 74.2, 66.2, 64.4, 69.6, 57.0, 64.0, 67.0),
        "PixelLM": (72.7, 76.2, 68.1, 65.7, 71.3, 57.7, 65.8, 67.7),
    }
    return _part(f"Table 2: {name} (the paper does not say which IoU)", splits, rows, first)


def _single(name: str, splits: tuple[str, ...], first: int) -> PaperTable:
    rows: dict[str, tuple[float | None, ...]] = {
        "MCN": (62.4, 64.2, 59.7, 50.6, 55.0, 44.7, 49.2, 49.4),
        "VLT": (67.5, 70.5, 65.2, 56.3, 61.0, 50.1, 55.0, 57.7),
        "CRIS": (70.5, 73.2, 66.1, 62.3, 68.1, 53.7, 59.9, 60.4),
        "LAVT": (72.7, 75.8, 68.8, 62.1, 68.4, 55.1, 61.2, 62.1),
        "ReLA": (73.8, 76.5, 70.2, 66.0, 71.0, 57.7, 65.0, 66.0),
        "X-Decoder": (None, None, None, None, None, None, 64.6, None),
        "SEEM": (None, None, None, None, None, None, 65.7, None),
        "LISA": (74.1, 76.5, 71.1, 62.4, 67.4, 56.5, 66.4, 68.5),
        "LISA aug": (74.0, 76.3, 70.4, 62.5, 66.3, 56.0, 67.0, 69.1),
        "PixelLM": (73.0, 76.5, 68.2, 66.3, 71.7, 58.3, 69.3, 70.5),
    }
    return _part(f"Table 3: {name} (the paper does not say which IoU)", splits, rows, first)


def _part(title: str, splits: tuple[str, ...], rows: Mapping[str, tuple[float | None, ...]], first: int) -> PaperTable:
    last = first + len(splits)
    chosen = tuple((method, values[first:last]) for method, values in rows.items())
    return PaperTable(title, splits, chosen, note=_SEEM if "SEEM" in rows else "")


PAPER_TABLES: dict[str, PaperTable] = {
    "muse": _MUSE,
    "mrefcoco": _multi("MrefCOCO", _UNC, 0),
    "mrefcoco+": _multi("MrefCOCO+", _UNC, 3),
    "mrefcocog": _multi("MrefCOCOg", _UMD, 6),
    "refcoco": _single("refCOCO", _UNC, 0),
    "refcoco+": _single("refCOCO+", _UNC, 3),
    "refcocog": _single("refCOCOg", _UMD, 6),
    "reasonseg": PaperTable(
        "Sec. 5.5: ReasonSeg, LISA",
        ("val gIoU", "val cIoU"),
        (("LISA", (52.9, 54.0)), ("LISA, trained with MUSE", (58.0, 59.1))),
    ),
}
