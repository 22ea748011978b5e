"""Tests in Triton's interpreter, in a process of their own.

The interpreter is chosen by an environment variable when Triton is imported, and other tests import it (through
Inductor) without.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def run_interpreted(file: str, *options: str) -> None:
    """Run pytest on ``file`` with the interpreter: all that is there passes, and something does."""
    path = Path(file).resolve()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(path), *options]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    done = subprocess.run(command, cwd=path.parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1], done.stdout[-2000:]


def patch_languages_once() -> None:
    """Have the interpreter look for what it is to patch once a launch, and not again at each call of a helper.

    A launch patches what its kernel sees of Triton's language, and each call of `tl.sum` and others what those see, all
    of it anew and to no effect but the first time: an eighth of the time of what runs here.
    """
    from triton.runtime import interpreter

    original, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    seen: set[int] = set()  # the globals of functions, in this launch

    def patch(function: Any) -> Any:
        if id(function.__globals__) in seen:
            return None  # a helper's, which nobody restores
        scope = original(function)
        seen.add(id(function.__globals__))
        return scope

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            seen.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch, launch_anew
