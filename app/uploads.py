"""Files that people bring: checked for size and form, read as data, never unpickled, unpacked blindly or executed."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

from heliosim_app.question import OWN, profiles_folder

from heliosim.errors import InputError
from heliosim.formats.trace import load_trace
from heliosim.profile_view import open_profile

MOST_BYTES = 200 * 2**20
"""What a profile may take unpacked."""
NAMES = ("profile.json", "behaviour.parquet", "steps.parquet")
"""Files of a profile that are taken over; others in the zip are refused."""


def take_trace(name: str, data: bytes) -> Path:
    """Keep a trace under its digest and answer where. Raises InputError for one that cannot be read."""
    suffix = Path(name).suffix.lower()
    folder = profiles_folder().parent / "traces"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.blake2b(data, digest_size=8).hexdigest()}{suffix}"
    fresh = path.with_suffix(f".part{suffix}")
    fresh.write_bytes(data)
    try:
        load_trace(fresh)
        os.replace(fresh, path)
    except InputError as error:
        error.where = error.where.replace(str(fresh), name)
        raise
    finally:
        fresh.unlink(missing_ok=True)
    return path


def take_profile(data: bytes) -> str:
    """Unpack and check a profile, and answer the name it is chosen by. Raises InputError for a bad one."""
    digest = hashlib.blake2b(data, digest_size=8).hexdigest()
    folder = profiles_folder() / f"own-{digest}"
    if (folder / "profile.json").is_file():
        return f"{OWN}{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".upload-"))
    try:
        _unpack(data, made)
        open_profile(str(made))
        os.replace(made, folder)
    except InputError as error:
        error.where = error.where.replace(str(made), "the profile")
        raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return f"{OWN}{digest}"


def _unpack(data: bytes, out: Path) -> None:
    """Write the zip's known files into ``out``, whatever folder they lie in."""
    try:
        held = zipfile.ZipFile(io.BytesIO(data))
    except zipfile.BadZipFile:
        raise InputError(
            "the upload", "not a zip", "cannot be unpacked", "Give a zip of the profile's folder."
        ) from None
    files = [one for one in held.infolist() if not one.is_dir()]
    strange = [one.filename for one in files if Path(one.filename).name not in NAMES]
    if strange:
        raise InputError("the upload", strange[0], "is no file of a profile", f"A profile has {', '.join(NAMES)}.")
    if len({Path(one.filename).name for one in files}) != len(files):
        raise InputError("the upload", len(files), "has a file twice", "Give one profile a zip.")
    if "profile.json" not in {Path(one.filename).name for one in files}:
        raise InputError("the upload", len(files), "has no profile.json", "Give a zip of the profile's folder.")
    if sum(one.file_size for one in files) > MOST_BYTES:
        raise InputError("the upload", "too large", "is more than 200 MB unpacked", "Give a smaller profile.")
    left = MOST_BYTES
    for one in files:
        with held.open(one) as source, (out / Path(one.filename).name).open("wb") as target:
            while block := source.read(2**20):
                left -= len(block)
                if left < 0:
                    raise InputError("the upload", one.filename, "is larger than it says", "Make the zip again.")
                target.write(block)
