"""Sphinx's settings for `make docs`: pages of the reference are made from the docstrings of `lora_fx.__all__`."""

import importlib.metadata

project = "lora_fx"
author = "The lora_fx authors"
release = importlib.metadata.version("lora_fx")
extensions = [
    "myst_parser",  # the pages in Markdown
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",  # one page for each name, listed by templates/module.rst
    "sphinx.ext.napoleon",  # Args, Returns, Raises
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_title = "lora_fx"
html_copy_source = False
templates_path = ["templates"]
exclude_patterns = ["templates"]

autosummary_generate = True
autosummary_ignore_module_all = False
autosummary_imported_members = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "exclude-members": "__new__, __init__"}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# `name` in a docstring is code, and a link where it names something public.
default_role = "py:obj"
myst_heading_anchors = 3
