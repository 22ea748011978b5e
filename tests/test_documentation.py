"""The documentation keeps up with the code: pages of public names, rows of options, sections of reasons."""

import ast
import dataclasses
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lora_fx

ROOT = Path(__file__).parents[1]
COMING_FROM = (ROOT / ".docs" / "coming-from.md").read_text()
MISSED = (ROOT / ".docs" / "missed-rewrites.md").read_text()


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The public names of a module, and of the modules among them."""
    for name in module.__all__:
        value = getattr(module, name)
        yield f"{module.__name__}.{name}", value
        if isinstance(value, ModuleType):
            yield from public(value)


PUBLIC = dict(public(lora_fx))
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented(name: str) -> None:
    assert inspect.getdoc(PUBLIC[name]), f"{name} has no docstring"
    if inspect.isclass(PUBLIC[name]):
        members = {key: value for key, value in vars(PUBLIC[name]).items() if not key.startswith("_")}
        called = {key for key, value in members.items() if inspect.isroutine(value) or isinstance(value, property)}
        assert not [key for key in called if not inspect.getdoc(getattr(PUBLIC[name], key))]


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_every_parameter_is_described(function: Callable[..., Any]) -> None:
    """In `Args`, once there is more than the model."""
    parameters = [name for name in inspect.signature(function).parameters if name != "self"]
    if len(parameters) > 1:
        text = inspect.getdoc(function) or ""
        described = re.findall(r"^    \*{0,2}(\w+(?:, \w+)*): ", text, re.MULTILINE)
        assert {name for group in described for name in group.split(", ")} >= set(parameters)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_what_is_raised_is_said(function: Callable[..., Any]) -> None:
    """At least the exceptions that a function raises itself."""
    raised = {
        node.exc.func.id
        for node in ast.walk(ast.parse(inspect.getsource(inspect.unwrap(function))))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
    }
    text = inspect.getdoc(function) or ""
    assert all(re.search(rf"^    {name}: ", text, re.MULTILINE) for name in raised), raised


# ---- coming from ... -------------------------------------------------------------------------------------------------


def named(text: str) -> set[str]:
    """The identifiers in code."""
    return {word for code in re.findall(r"`([^`\n]+)`", text) for word in re.findall(r"\w+", code)}


def test_every_option_of_ours_is_in_the_table() -> None:
    assert {field.name for field in dataclasses.fields(lora_fx.LoRAConfig)} <= named(COMING_FROM)


def test_every_option_of_peft_is_in_the_table() -> None:
    peft = pytest.importorskip("peft")
    inherited = {field.name for field in dataclasses.fields(peft.PeftConfig)}
    options = {field.name for field in dataclasses.fields(peft.LoraConfig)} - inherited
    assert options <= named(COMING_FROM)


def test_what_the_table_calls_exists() -> None:
    called = re.findall(r"lora_fx\.(\w+)", COMING_FROM + MISSED)
    assert called and {f"lora_fx.{name}" for name in called} <= PUBLIC.keys()


# ---- reasons ---------------------------------------------------------------------------------------------------------


def reasons() -> Iterator[list[str]]:
    """The texts that may become the reason of a site, each as the constant parts of it in order."""
    for file in [*sorted((ROOT / "passes").glob("*.py")), ROOT / "lora_fx" / "explain.py"]:
        for node in ast.walk(ast.parse(file.read_text())):
            found: list[ast.expr] = []
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "reason":
                found = [node.value]
            elif isinstance(node, ast.Call):
                function = getattr(node.func, "id", getattr(node.func, "attr", None))
                if function == "NotASite":
                    found = node.args[:1]
                elif function == "Declined":
                    found = node.args[4:5]
                elif ast.unparse(node.func).endswith("notes.append"):
                    found = node.args
                found += [keyword.value for keyword in node.keywords if keyword.arg == "reason"]
            for expression in found:
                yield from texts(expression)


def texts(expression: ast.expr) -> Iterator[list[str]]:
    if isinstance(expression, ast.Constant):
        yield [str(expression.value)]
    elif isinstance(expression, ast.JoinedStr):
        yield [str(part.value) if isinstance(part, ast.Constant) else "" for part in expression.values]
    elif isinstance(expression, ast.IfExp):
        yield from (*texts(expression.body), *texts(expression.orelse))
    else:  # it was made elsewhere, where it is found
        assert isinstance(expression, (ast.Name, ast.Attribute, ast.Call)), ast.unparse(expression)


def test_every_reason_has_a_section() -> None:
    found = list(reasons())
    assert len(found) > 15
    headings = re.findall(r"^### (.*)$", MISSED, re.MULTILINE)
    for parts in found:
        pattern = "".join(re.escape(part) if part else ".+" for part in parts)
        assert any(re.fullmatch(pattern, heading) for heading in headings), pattern


# ---- the pages -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_public_name_has_a_page(tmp_path: Path) -> None:
    """`make docs`; what Sphinx warns of is an error."""
    pytest.importorskip("sphinx")
    source, pages = tmp_path / "source", tmp_path / "pages"
    shutil.copytree(ROOT / ".docs", source, ignore=shutil.ignore_patterns("reference"))
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(tmp_path / "trees")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, str(source), str(pages)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in (pages / "reference").glob("lora_fx.*.html")} == PUBLIC.keys()
    assert "Raises" in (pages / "reference" / "lora_fx.compile.html").read_text()
