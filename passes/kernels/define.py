"""Triton functions out of text."""

from __future__ import annotations

import hashlib
import linecache
from typing import Any

import triton
import triton.language as tl


def define(text: str, name: str, what: str) -> Any:
    """The Triton function ``name`` of a text, in a file that is called after ``what`` it is and what it says.

    Triton and Inductor read its source through linecache, so that is where it is put on record.
    """
    file = f"<lora_fx {what} {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    space: dict[str, Any] = {"triton": triton, "tl": tl, "__name__": __name__}
    exec(compile(text, file, "exec"), space)
    return space[name]
