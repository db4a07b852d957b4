"""Where the checkpoints of a study's trials lie until these have ended: a folder, or any URI that pyarrow writes."""

from __future__ import annotations

from pathlib import Path

from pyarrow.fs import FileType

from frostline.commit import write_file
from frostline.files import Place, locate, reaching


def write_checkpoint(root: str, trial_id: str, checkpoint: bytes) -> None:
    """Put it in the place of the one before; a reader finds either whole. Raises OSError and DataError."""
    place = _place(root, trial_id)
    if "://" not in root:
        write_file(Path(place.path), checkpoint)
        return
    with reaching(place), place.fs.open_output_stream(place.path, compression=None) as stream:
        stream.write(checkpoint)


def read_checkpoint(root: str, trial_id: str) -> bytes | None:
    """The latest; None where there is none."""
    place = _place(root, trial_id)
    with reaching(place):
        if place.fs.get_file_info(place.path).type != FileType.File:
            return None
        with place.fs.open_input_stream(place.path, compression=None) as stream:
            return stream.read()


def drop_checkpoint(root: str, trial_id: str) -> None:
    """Delete it, where there is one."""
    place = _place(root, trial_id)
    with reaching(place):
        if place.fs.get_file_info(place.path).type == FileType.File:
            place.fs.delete_file(place.path)


def _place(root: str, trial_id: str) -> Place:
    return locate(root) / f"{trial_id}.safetensors"
