"""Files that are put in place together: killed at any line, all of the old ones or all of the new ones are there."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import lora_fx
from lora_fx import LoRAConfig, files
from lora_fx.files import write_together
from tests.toy_models import TOKENS, Toy, shake

ROOT = Path(__file__).resolve().parents[1]
OLD = {"a": b"old a", "b": b"old b"}
NEW = {"a": b"new a" * 1000, "b": b"new b"}


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folders_are_made_and_files_are_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "x" / "y"
    write_together(folder, OLD)
    assert content(folder) == OLD
    for new in (NEW, NEW, {**NEW, "b": OLD["b"]}, OLD):
        write_together(folder, new)
        assert content(folder) == new
        assert [path.name for path in folder.parent.iterdir()] == ["y"], "nothing else is left"
    (tmp_path / "empty").mkdir()
    write_together(tmp_path / "empty", NEW)
    assert content(tmp_path / "empty") == NEW


@pytest.mark.parametrize("before", [OLD, {}], ids=["replaced", "added"])
def test_what_else_is_in_the_folder_stays(tmp_path: Path, before: dict[str, bytes]) -> None:
    folder = tmp_path / "folder"
    (folder / "below" / "deeper").mkdir(parents=True)
    others = {"README.md": b"mine", "below/deeper/file": b"deep"}
    for name, text in {**others, **before}.items():
        (folder / name).write_bytes(text)
    (folder / "link").symlink_to("README.md")
    folder.chmod(0o750)
    write_together(folder, NEW)
    assert content(folder) == {**others, **NEW, "link": b"mine"}
    assert (folder / "link").is_symlink() and folder.stat().st_mode & 0o777 == 0o750
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_link_keeps_pointing_to_its_folder(tmp_path: Path) -> None:
    write_together(tmp_path / "step-1", OLD)
    (tmp_path / "newest").symlink_to("step-1")
    write_together(tmp_path / "newest", NEW)
    assert (tmp_path / "newest").is_symlink() and content(tmp_path / "step-1") == NEW


def killed_at(line: int, folder: Path, new: dict[str, bytes]) -> bool:
    """Write in another process, which dies before the `line`th line that it runs in `files`; whether it did."""
    child = os.fork()
    if child == 0:
        left = line

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal left
            if frame.f_code.co_filename != files.__file__:
                return None
            left -= event == "line"
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        code = 1
        try:
            sys.settrace(trace)
            write_together(folder, new)
            sys.settrace(None)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(OLD, NEW, id="both"),
        pytest.param(None, NEW, id="first"),
        pytest.param(OLD, {**OLD, "a": NEW["a"]}, id="one", marks=pytest.mark.slow),
        pytest.param({}, NEW, id="beside others", marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: dict[str, bytes] | None, new: dict[str, bytes]
) -> None:
    # For a machine that loses power; a killed process leaves the same without it, and this test takes a tenth.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    folder = tmp_path / "folder"
    seen: set[str] = set()
    line, killed = 0, True
    while killed:
        line += 1
        if folder.exists():
            (folder / "other").unlink()
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
        if old is not None:
            write_together(folder, {**old, "other": b"other"})
        killed = killed_at(line, folder, new)
        there = content(folder) if folder.exists() else None
        if there is not None and old is not None:
            assert there.pop("other") == b"other", line
        if old == {} and there == {"a": new["a"]}:  # where there was no "b", and is none: no adapter, as before
            there = {}
        assert there in (old, new), line
        seen.add("new" if there == new else "old")
        if there is not None and old is None:
            (folder / "other").touch()
    assert line > 20 and seen == {"old", "new"}
    write_together(folder, OLD)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"], "what dead processes left was removed"


def test_a_failure_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    write_together(folder, OLD)

    def full(path: Path) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(files, "flush", full)
    with pytest.raises(OSError, match="full"):
        write_together(folder, NEW)
    monkeypatch.undo()

    class WithoutExchange:
        def __init__(self, *arguments: Any, **kwargs: Any) -> None: ...

    monkeypatch.setattr(ctypes, "CDLL", WithoutExchange)
    with pytest.raises(ValueError, match=r"cannot exchange two folders in one step .*write to a new folder"):
        write_together(folder, NEW)
    assert content(folder) == OLD and [path.name for path in tmp_path.iterdir()] == ["folder"]
    write_together(folder, {**OLD, "b": NEW["b"]})  # one file needs no exchange
    assert content(folder) == {**OLD, "b": NEW["b"]}


# ---- adapters --------------------------------------------------------------------------------------------------------

WRITER = """
import sys
import lora_fx
from tests.test_files import variants

models = variants()
while True:
    for model in models:
        lora_fx.save_adapter(model, sys.argv[1])
        print("saved", flush=True)
"""


def variants() -> list[Toy]:
    """Two models whose files differ in tensors and configuration; any mixture of those is neither."""
    models = []
    for seed, alpha in enumerate((2.0, 48.0)):
        torch.manual_seed(0)
        model = lora_fx.install(Toy(), LoRAConfig(rank=4, alpha=alpha))
        shake(model, seed=seed)
        models.append(model)
    return models


@pytest.mark.slow
def test_killed_while_saving_adapters(tmp_path: Path) -> None:
    expected = [model(TOKENS) for model in variants()]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])}
    folder = tmp_path / "adapter"
    for attempt in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder)], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            for _ in range(3):
                assert process.stdout.readline() == "saved\n"
            time.sleep(0.0031 * attempt)
        finally:
            process.kill()
            process.communicate()
        torch.manual_seed(0)
        found = lora_fx.load_adapter(Toy(), folder)(TOKENS)
        assert any(torch.equal(found, output) for output in expected), attempt
    lora_fx.save_adapter(variants()[0], folder)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
