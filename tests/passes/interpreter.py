"""Tests in Triton's interpreter, in a process of their own.

The interpreter is chosen by an environment variable when Triton is imported, and other tests import it (through
Inductor) without.
"""

import os
import subprocess
import sys
from pathlib import Path

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
