"""Public datasets to shards: the job behind `pixellm data prepare`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixellm.errors import ConfigError
from pixellm.platform import storage
from pixellm.platform.data.preparation import prepare_shards, run_here, run_on_ray
from pixellm.platform.data.shards import ROWS_PER_PART
from pixellm.platform.data.sources import get_source, is_generated, with_options
from pixellm.platform.data.sources.base import Ledger, PictureSource, PrepareReport, Progress

#: The photographs, masks, captions and questions that come with the package.
DEMO_DATA = Path(__file__).resolve().parent.parent / "platform" / "data" / "demo"


def prepare(
    source: str,
    input_dir: str | Path | None,
    out_uri: str | Path,
    *,
    strict: bool = False,
    skip_bad_masks: bool = False,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    on_ray: bool = False,
    pictures_per_part: int = ROWS_PER_PART,
) -> PrepareReport:
    """Turns a public dataset in its published layout into shards.

    Called again, it goes on where it was interrupted; see `pixellm.platform.data.preparation`.

    Args:
        source: name of the source, see `pixellm.platform.data.sources.source_names`.
        input_dir: folder with the dataset's files; None for a source that generates its pictures.
        out_uri: folder of the shards; older shards there are replaced in one step when all is done.
        strict: the first fault in the data ends the preparation instead of being counted.
        skip_bad_masks: leave out masks that lie outside their picture instead of ending with an error.
        options: of the source, e.g. `{"split": "val"}`.
        progress: called with (pictures looked at, pictures in all or None): after each picture in this process, after
            each part on Ray.
        on_ray: make the parts as Ray Data tasks on the cluster this process is connected to, else one by one here; the
            bytes are the same.
        pictures_per_part: pictures looked at for one Parquet file, which is also what a restart may have to do again.

    Raises:
        ConfigError: there is no such source, it needs an input folder, or takes no such options.
        DataError: a part is missing or malformed, a mask lies outside its picture, nothing was kept, or, in strict
            mode, any fault; another process prepares the same place.
    """
    reader = open_source(source, input_dir, options)
    ledger = Ledger(strict=strict, skip_bad_masks=skip_bad_masks, progress=progress)
    notes: dict[str, Any] = {"source": source}
    notes |= {"options": dict(options)} if options else {}
    done = prepare_shards(
        reader,
        str(input_dir or ""),
        out_uri,
        ledger,
        run_on_ray if on_ray else run_here,
        notes=notes,
        watch_pictures=not on_ray,
        entries_per_part=pictures_per_part,
    )
    info = done.info
    return PrepareReport(
        source=source,
        uri=str(out_uri),
        digest=info.digest,
        rows=info.counts["rows"],
        targets=info.counts["targets"],
        ignore_regions=info.counts["ignore_regions"],
        dialogues={key.removesuffix("_dialogues"): n for key, n in info.counts.items() if key.endswith("_dialogues")},
        skipped=dict(ledger.counts),
        skipped_names=ledger.names,
        licenses=info.licenses,
        noted=dict(ledger.notes),
        noted_names=ledger.note_names,
        parts_found=done.parts_found,
    )


def open_source(source: str, input_dir: str | Path | None, options: Mapping[str, Any] | None = None) -> PictureSource:
    """The reader of a source with its options; looks at no data.

    Raises:
        ConfigError: there is no such source, it needs an input folder, or takes no such options.
    """
    reader = with_options(get_source(source), options or {})
    if input_dir is None and not is_generated(reader):
        raise ConfigError(f"{source} is read from a folder: give --in with {reader.layout}")
    return reader


def prepare_demo(out_dir: str | Path) -> dict[str, str]:
    """Writes the shards of the packaged demo data; returns the URI for each group of questions."""
    coco, muse = storage.join(out_dir, "coco"), storage.join(out_dir, "muse")
    prepare("coco", DEMO_DATA, coco, strict=True)
    prepare("muse", DEMO_DATA, muse, strict=True)
    return {"segmentation": coco, "vqa": coco, "muse": muse}
