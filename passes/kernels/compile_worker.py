"""A process that compiles Triton kernels into Triton's cache: a script, which ``compile_ahead`` runs.

It imports Triton and nothing else, so that it starts in a moment, and needs no GPU: the target is named. It reads a job
from each line of its input and answers each with a line of its output, both JSON; it ends with its input. A job:

    ``code``, ``file``, ``name``, ``module``: a kernel's source, and what the function is called where it will be run
    ``arguments``: of a launch by place, numbers or, for tensors, ``["tensor", dtype]``
    ``named``: constants and options
    ``target``: backend, architecture, and threads of a warp
    ``cache``: the folder of Triton's cache
"""

import json
import linecache
import os
import sys
from typing import Any


class Device:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def compile_job(job: dict[str, Any]) -> None:
    """Compile one kernel, as the launch that the job describes would."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import MockTensor

    triton.knobs.cache.dir = job["cache"]
    driver.set_active(Device(GPUTarget(*job["target"])))
    code, file = job["code"], job["file"]
    linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
    namespace: dict[str, Any] = {"triton": triton, "tl": tl, "__name__": job["module"]}
    exec(compile(code, file, "exec"), namespace)
    arguments = [MockTensor(a[1]) if isinstance(a, list) else a for a in job["arguments"]]
    namespace[job["name"]].warmup(*arguments, **job["named"], grid=(1, 1))


def main() -> None:
    """Answer jobs with nothing, or with what went wrong."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a compiler prints is no answer
    for line in sys.stdin:
        try:
            compile_job(json.loads(line))
            answer = ""
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
