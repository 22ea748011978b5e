import pytest

from tests.passes.interpreter import INTERPRETED, patch_languages_once

# Its assertions are the tests'.
pytest.register_assert_rewrite("tests.passes.harness")

if INTERPRETED:
    patch_languages_once()
