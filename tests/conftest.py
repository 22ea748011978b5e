"""What all tests share."""

import gc
import logging
from collections.abc import Iterator

import pytest
import torch

from lora_fx.passes.kernels import native
from tests.anew import collect_garbage_seldom, leave_out_latency_of_guards
from tests.together import compile_kernels_of_a_graph_together

leave_out_latency_of_guards()
compile_kernels_of_a_graph_together()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that may take long come first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


def pytest_collection_finish() -> None:
    """Once all tests are imported."""
    collect_garbage_seldom()


def pytest_unconfigure() -> None:
    """What ends with Python is collected again: nanobind complains of what is left."""
    gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    """pytest listens to torch's trace, too, for which every compilation then prints its graphs. Others may listen."""
    trace = logging.getLogger("torch.__trace")
    trace.handlers[:] = [h for h in trace.handlers if not type(h).__module__.startswith("_pytest.")]
    return (yield)


@pytest.fixture
def without_onednn() -> Iterator[None]:
    """On CPUs with AMX oneDNN takes 80 ms for the smallest float8 product, which ATen makes in 0.3."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


@pytest.fixture(scope="session", autouse=True)
def kernels_on_every_cpu() -> Iterator[None]:
    """Thin products of 16 bits by our kernels wherever they run, so that one CPU tests what another does.

    oneDNN, to which CPUs with AMX leave them, makes kernels of its own for each small shape: three files of tests took
    175 seconds with them and 130 without.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "has_faster_products", lambda dtype: False)
        native.max_rank.cache_clear()
        yield
    native.max_rank.cache_clear()
