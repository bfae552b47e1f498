"""Files that are written whole or not at all."""

import os
import pathlib
import tempfile


def require_folder(path: pathlib.Path) -> None:
    """A file can be put there, which is better known before hours of work than after."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: {folder} is no folder")


def write(path: pathlib.Path, text: str) -> None:
    """Replace a file at once: at each moment it has its old content or all of the new one."""
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
