import pytest

# Its assertions are the tests'.
pytest.register_assert_rewrite("tests.passes.harness")
