"""Real text that every Python carries: its documentation topics, and the sources of its standard library.

Text is bytes: token ids are 0..255, and a zero byte stands between documents. A document (a topic; a top-level module
or a whole package) is in the training part or in the held-out part, never in both, and one that repeats others is left
out.
"""

import hashlib
import os
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

SEPARATOR = b"\0"
HELD_OUT_PERCENT = 15

# A document repeats others if more than this part of its long lines (in bytes) stands in longer ones that were kept.
MAX_REPEATED = 0.1
LONG_LINE = 50

# Not the new domain: tests and installed packages; the documentation that the model was pre-trained on; tables and
# generated files, which are near-copies of one another on both sides of any split.
EXCLUDED = frozenset(
    {"site-packages", "dist-packages", "test", "idlelib", "lib2to3", "pydoc_data", "encodings", "turtledemo"}
)


@dataclass(frozen=True)
class Corpus:
    """Two sets of documents of one kind, by name, without a document in common."""

    name: str
    train: Mapping[str, bytes]
    held_out: Mapping[str, bytes]

    def __str__(self) -> str:
        sizes = [sum(map(len, part.values())) / 1e6 for part in (self.train, self.held_out)]
        return (
            f"{self.name}: {len(self.train)} documents, {sizes[0]:.2f} MB; "
            f"held out {len(self.held_out)}, {sizes[1]:.2f} MB"
        )

    def train_tokens(self) -> Tensor:
        """All training documents, joined: int64 [tokens]."""
        return tokenise(self.train)

    def held_out_tokens(self) -> Tensor:
        """All held-out documents, joined: int64 [tokens]."""
        return tokenise(self.held_out)


def documentation() -> Corpus:
    """The topics of `help()`: English with examples, about half a megabyte; one document a topic."""
    return split("documentation", {name: text.encode() for name, text in topics.items()})


def library_sources(root: Path | None = None) -> Corpus:
    """The standard library's Python sources; one document a top-level module or package.

    Args:
        root: folder of the library; None is the running Python's.

    Raises:
        FileNotFoundError: the folder has no Python sources.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    documents: dict[str, bytes] = {}
    paths: list[Path] = []
    for folder, folders, files in os.walk(root):
        if folder == str(root):  # installed packages are many times the library: not even their names are read
            folders[:] = [name for name in folders if name not in EXCLUDED]
        paths += [Path(folder, file) for file in files if file.endswith(".py")]
    for path in sorted(paths):
        folder = path.relative_to(root).parts[0]
        if folder in EXCLUDED or folder.startswith("_sysconfigdata") or "test" in path.parts or "tests" in path.parts:
            continue
        name = folder.removesuffix(".py")
        documents[name] = documents.get(name, b"") + path.read_bytes() + SEPARATOR
    if not documents:
        raise FileNotFoundError(f"no Python sources under {root}: is this Python installed without its library?")
    return split("library sources", documents)


def split(name: str, documents: Mapping[str, bytes]) -> Corpus:
    """Divide documents by a hash of their names, so that the division needs no seed and survives additions.

    Documents that repeat others are left out first: some topics of `help()` are chapters of others.
    """
    seen: set[bytes] = set()
    train: dict[str, bytes] = {}
    held_out: dict[str, bytes] = {}
    for key, text in sorted(documents.items(), key=lambda item: (-len(item[1]), item[0])):
        lines = {line for line in text.splitlines() if len(line) >= LONG_LINE}
        if text.strip() and len(lines & seen) <= MAX_REPEATED * len(lines) and text not in seen:
            (held_out if _bucket(key) < HELD_OUT_PERCENT else train)[key] = text
            seen |= lines | {text}
    return Corpus(name, train, held_out)


def tokenise(documents: Mapping[str, bytes]) -> Tensor:
    """The documents in order of name, each followed by a zero byte, as int64 ids [tokens]."""
    text = b"".join(documents[name] + SEPARATOR for name in sorted(documents))
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def _bucket(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
