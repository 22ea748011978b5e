"""Files that are put in place together: a kill at any moment leaves all of the old ones or all of the new ones."""

import ctypes
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

# Of `renameat2` on Linux and of `renamex_np` on macOS, where the flag has the same value.
_SWAP = 2
_HERE = -100  # AT_FDCWD: paths are taken as any other call takes them


def write_together(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make `folder` hold these files beside whatever else it holds, all of them or, on failure, none.

    They are written to a sibling ``.<folder>.<host>-<process>-<random>.partial`` and are on disk before they get their
    names. One rename is enough for a folder that is new or empty, and where only one file differs from what is there.
    Where several differ, the sibling gets hard links to everything else in the folder, and the two change names. What
    others create in the folder's subfolders during these moments may be lost. Siblings that killed processes of this
    machine left are removed.

    Args:
        folder: made if it is not there, with its parents.
        files: name -> content. In a folder that holds none of them they appear in this order.

    Raises:
        OSError: the disk is full, a permission is missing, and so on.
        ValueError: several files differ, and the file system cannot exchange two folders in one step.
    """
    folder = folder.resolve()  # what a link points to, and not the link, changes names
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    partial = folder.parent / f".{folder.name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.partial"
    partial.mkdir()
    try:
        for name, content in files.items():
            (partial / name).write_bytes(content)
            flush(partial / name)
        flush(partial)
        _publish(partial, folder, files)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    flush(folder)
    flush(folder.parent)


def flush(path: Path) -> None:
    """Return when a file or a folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(partial: Path, folder: Path, files: Mapping[str, bytes]) -> None:
    if not folder.exists() or not any(folder.iterdir()):
        partial.rename(folder)
        return
    there = [name for name in files if (folder / name).exists()]
    changed = [name for name, content in files.items() if name not in there or (folder / name).read_bytes() != content]
    # Without any of the files there is nothing old that could be mixed with something new.
    if len(changed) <= 1 or not there:
        for name in changed:
            os.replace(partial / name, folder / name)
        return
    _link_others(folder, partial)
    shutil.copymode(folder, partial)
    flush(partial)
    _exchange(partial, folder)
    _link_others(partial, folder)  # what came after the first look


def _link_others(source: Path, target: Path) -> None:
    """Hard links in `target` to what `source` holds and `target` does not."""
    for entry in source.iterdir():
        if os.path.lexists(target / entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, target / entry.name, symlinks=True, copy_function=os.link)
        else:
            os.link(entry, target / entry.name, follow_symlinks=False)


def _exchange(first: Path, second: Path) -> None:
    """Let two paths change names in one step."""
    libc = ctypes.CDLL(None, use_errno=True)
    one, two = os.fsencode(first), os.fsencode(second)
    if hasattr(libc, "renameat2"):
        failed = libc.renameat2(_HERE, one, _HERE, two, _SWAP)
    elif sys.platform == "darwin":
        failed = libc.renamex_np(one, two, _SWAP)
    else:
        failed = -1
    if failed:
        reason = os.strerror(ctypes.get_errno())
        raise ValueError(
            f"{second} holds other files of the same names, and this file system cannot exchange two folders in one "
            f"step ({reason}), so that a kill could leave a mixture: write to a new folder, or remove this one first"
        )


def _sweep(folder: Path) -> None:
    """Remove what processes of this machine left beside `folder` when they were killed."""
    start = f".{folder.name}.{socket.gethostname()}-"
    for path in folder.parent.iterdir():
        if path.name.startswith(start) and path.name.endswith(".partial"):
            process = path.name.removeprefix(start).partition("-")[0]
            if process.isdecimal() and not _alive(int(process)):
                shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is somebody else's
        return True
    return True
