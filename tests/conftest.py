"""What all tests share."""

import logging
from collections.abc import Iterator

import pytest
import torch


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
