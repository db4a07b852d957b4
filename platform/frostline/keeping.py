"""Where the checkpoints of a study's trials lie until these have ended: a folder, or any URI that pyarrow writes."""

from __future__ import annotations

from pathlib import Path

from pyarrow.fs import FileSelector, FileType, LocalFileSystem

from frostline.commit import write_file
from frostline.files import DataError, Place, reaching

SUFFIX = ".safetensors"


def kept_trials(folder: Place) -> set[str]:
    """The trials that have one. Raises DataError."""
    with reaching(folder):
        found = folder.fs.get_file_info(FileSelector(folder.path, allow_not_found=True))
    return {info.base_name.removesuffix(SUFFIX) for info in found if info.base_name.endswith(SUFFIX)}


def keep_checkpoint(folder: Place, trial_id: str, checkpoint: bytes) -> str | None:
    """`write_checkpoint`, and what went wrong where it was not written: a training does without, rather than end for it."""
    try:
        write_checkpoint(folder, trial_id, checkpoint)
    except (OSError, DataError) as error:
        return f"the checkpoint of {trial_id} was not written, and the one before, if any, stays: {error}"
    return None


def write_checkpoint(folder: Place, trial_id: str, checkpoint: bytes) -> None:
    """Put it in the place of the one before; a reader finds either whole. Raises OSError and DataError."""
    place = _file(folder, trial_id)
    if isinstance(place.fs, LocalFileSystem):
        write_file(Path(place.path), checkpoint)
        return
    with reaching(place), place.fs.open_output_stream(place.path, compression=None) as stream:
        stream.write(checkpoint)


def read_checkpoint(folder: Place, trial_id: str) -> bytes | None:
    """The latest; None where there is none."""
    place = _file(folder, trial_id)
    with reaching(place):
        if place.fs.get_file_info(place.path).type != FileType.File:
            return None
        with place.fs.open_input_stream(place.path, compression=None) as stream:
            return stream.read()


def drop_checkpoint(folder: Place, trial_id: str) -> None:
    """Delete it, where there is one."""
    place = _file(folder, trial_id)
    with reaching(place):
        if place.fs.get_file_info(place.path).type == FileType.File:
            place.fs.delete_file(place.path)


def _file(folder: Place, trial_id: str) -> Place:
    return folder / f"{trial_id}{SUFFIX}"
