"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def write(path: str | Path, content: bytes | str) -> Path:
    """Write a file that has no name yet, flush it to the disk, and give it its name: `path` holds the old content or the new.

    Raises:
        OSError: naming `path`; the disk is full, for instance. The old content is still there.
    """
    path = Path(path)
    content = content.encode() if isinstance(content, str) else content
    temporary = path.parent / f".{path.name[:200]}.{secrets.token_hex(4)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            handle, nameless = _open(path.parent, temporary)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fchmod(handle, 0o644)
                os.fsync(handle)
                if nameless:
                    os.link(f"/proc/self/fd/{handle}", temporary, src_dir_fd=folder)  # a folder given: linkat, which follows
            os.replace(temporary, path)
            os.fsync(folder)  # the name too outlives a power cut
        finally:
            os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):  # mostly there is none
            temporary.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error
        raise
    return path


def _open(folder: Path, temporary: Path) -> tuple[int, bool]:
    """A new file to write, and whether it is without a name: one that a kill would leave nothing of."""
    if os.path.isdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # a file system that has none
            return os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o644), True
    return os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644), False


def check_writable(path: str | Path) -> None:
    """For what takes long, before it begins.

    Raises:
        OSError: naming `path`: a folder is there, or it cannot be made there.
    """
    path = Path(path)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        why = "a folder has that name" if path.is_dir() else f"{folder} is no folder that can be written to"
        raise OSError(f"cannot write {path}: {why}")
