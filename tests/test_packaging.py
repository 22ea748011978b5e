"""What is built and installed is what the tree holds: the link's target as real files, and nothing called `passes`."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Through the link, so that these paths are the ones of the archives: passes/..., below lora_fx.
PACKAGE = ROOT / "lora_fx"
PASS_FILES = sorted(
    path.relative_to(PACKAGE) for path in (PACKAGE / "passes").rglob("*") if path.suffix in (".py", ".cpp")
)
PASS_MODULES = [path for path in PASS_FILES if path.suffix == ".py"]


def run(*command: object, cwd: Path) -> str:
    """The standard output of a command that must succeed, run where nothing of this tree is importable."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


# ---- archives --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An sdist, the wheel made from that sdist, and the wheel made from the tree."""
    out = tmp_path_factory.mktemp("built")
    build = [sys.executable, "-m", "build", "--no-isolation"]
    run(*build, "--outdir", out / "by_sdist", ROOT, cwd=out)
    run(*build, "--wheel", "--outdir", out / "direct", ROOT, cwd=out)
    (sdist,) = (out / "by_sdist").glob("*.tar.gz")
    (wheel,) = (out / "by_sdist").glob("*.whl")
    (direct,) = (out / "direct").glob("*.whl")
    return {"sdist": sdist, "wheel": wheel, "direct": direct}


def test_sdist_holds_the_passes_as_real_files(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        members = {Path(*Path(member.name).parts[1:]): member for member in archive.getmembers()}
        for path in PASS_FILES:
            packed = Path("lora_fx") / path
            assert packed in members, f"{packed} is missing"
            content = archive.extractfile(members[packed])
            assert content is not None and content.read() == (PACKAGE / path).read_bytes()
    assert all(member.isfile() for member in members.values())
    assert not [name for name in members if name.parts[0] == "passes"]
    assert Path("LICENSE") in members and Path("README.md") in members
    assert Path("tests/test_packaging.py") in members
    assert Path("lora_fx/passes/kernels/thin.cpp") in members


@pytest.mark.parametrize("source", ["wheel", "direct"])
def test_wheel_holds_the_passes_and_only_lora_fx(built: dict[str, Path], source: str) -> None:
    with zipfile.ZipFile(built[source]) as archive:
        names = set(archive.namelist())
        assert {path.as_posix() for path in map(Path("lora_fx").joinpath, PASS_FILES)} <= names
        for path in PASS_FILES:
            assert archive.read(f"lora_fx/{path.as_posix()}") == (PACKAGE / path).read_bytes()
    assert "lora_fx/py.typed" in names
    tops = {name.split("/")[0] for name in names}
    assert {re.sub(r"-.*\.dist-info$", ".dist-info", top) for top in tops} == {"lora_fx", "lora_fx.dist-info"}


# ---- an installation -------------------------------------------------------------------------------------------------

# Runs in an environment that has the wheel, from a folder that is not the tree, and prints what it finds.
LOOK = """
import importlib.metadata, importlib.util, json, sys
import lora_fx, lora_fx.passes
from torch._dynamo import list_backends, lookup_backend
(entry,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="lora_fx")
backend = entry.load()
print(json.dumps({
    "lora_fx": lora_fx.__file__,
    "passes": lora_fx.passes.__file__,
    "passes_is_importable": importlib.util.find_spec("passes") is not None,
    "entry": entry.value,
    "backend_is_callable": callable(backend),
    "backend_is_listed": "lora_fx" in list_backends(exclude_tags=()),
    "backend_is_found": lookup_backend("lora_fx") is backend,
    "backend_module_is": sys.modules["lora_fx.compile"].__file__,
    "compile_is_the_function": type(lora_fx.compile).__name__,
    "requires": importlib.metadata.requires("lora_fx"),
}))
"""


def test_the_installed_wheel_works_from_another_folder(built: dict[str, Path], tmp_path: Path) -> None:
    env = tmp_path / "env"
    run(sys.executable, "-m", "venv", "--without-pip", env, cwd=tmp_path)
    python = env / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet"]
    run(*pip, built["wheel"], cwd=tmp_path)
    (packages,) = env.glob("lib/python*/site-packages") if os.name != "nt" else [env / "Lib" / "site-packages"]
    # torch and the rest come from the environment that runs the tests. They stand behind the wheel, and a folder named
    # in a .pth file has its own .pth files ignored: an editable lora_fx over there does not reach here.
    (packages / "zz_borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    found = json.loads(run(python, "-c", LOOK, cwd=tmp_path))

    home = str(packages / "lora_fx")
    assert found["lora_fx"] == f"{home}{os.sep}__init__.py"
    assert found["passes"] == f"{home}{os.sep}passes{os.sep}__init__.py"
    assert not (packages / "lora_fx" / "passes").is_symlink()
    assert not found["passes_is_importable"]
    assert found["entry"] == "lora_fx.compile:backend"
    assert found["backend_is_callable"] and found["backend_is_listed"] and found["backend_is_found"]
    # The package binds `compile` to the function; the entry point reaches the module of that name all the same.
    assert found["backend_module_is"] == f"{home}{os.sep}compile.py"
    assert found["compile_is_the_function"] == "function"
    needed = [requirement for requirement in found["requires"] if "extra ==" not in requirement]
    assert sorted(re.split(r"[^\w-]", requirement)[0] for requirement in needed) == ["safetensors", "torch"]


def test_the_link_is_a_link_in_the_tree() -> None:
    link = ROOT / "lora_fx" / "passes"
    if not (ROOT / "passes").exists():
        pytest.skip("an unpacked sdist: lora_fx/passes is the folder itself")
    assert link.is_symlink() and os.readlink(link) == "../passes"


# ---- what is imported ------------------------------------------------------------------------------------------------


def closure(*names: str) -> set[str]:
    """The distributions that these need, and the ones that those need, extras aside."""
    found: set[str] = set()
    queue = list(names)
    while queue:
        name = normal(queue.pop())
        if name in found:
            continue
        found.add(name)
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        queue += [re.split(r"[^\w.-]", requirement)[0] for requirement in requires if "extra ==" not in requirement]
    return found


def normal(name: str) -> str:
    """The name of a distribution, as all spellings of it are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_importing_lora_fx_imports_torch_and_safetensors_alone(tmp_path: Path) -> None:
    # What torch itself picks up where it happens to be installed (NumPy, tqdm, ...) is not ours: the compiler's
    # modules are imported first, and only what comes on top is looked at.
    look = (
        "import sys, json, torch, torch._inductor.compile_fx, torch._inductor.pattern_matcher\n"
        "before = {name.split('.')[0] for name in sys.modules}\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import lora_fx, lora_fx.passes\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules} - before)))"
    )
    new = set(json.loads(run(sys.executable, "-c", look, cwd=tmp_path))) - {"lora_fx", *sys.stdlib_module_names}
    owners = importlib.metadata.packages_distributions()
    allowed = closure("torch", "safetensors")
    foreign = {
        module for module in new if module in owners and not {normal(owner) for owner in owners[module]} & allowed
    }
    assert not foreign


def test_importing_lora_fx_does_not_import_the_compiler(tmp_path: Path) -> None:
    """Which takes longer than torch itself, and which a program that does not compile has no use for."""
    look = (
        "import sys, json, torch\n"
        "before = set(sys.modules)\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import lora_fx, lora_fx.passes\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    new = {".".join(name.split(".")[:2]) for name in json.loads(run(sys.executable, "-c", look, cwd=tmp_path))}
    heavy = {"torch._inductor", "torch._dynamo", "torch._functorch", "torch.distributed", "triton", "sympy", "numpy"}
    assert "lora_fx.compile" in new and not new & heavy


def imports(path: Path) -> Iterator[str]:
    """The absolute names of all modules that a file of lora_fx.passes imports, wherever in the file it does."""
    package = ("lora_fx", *path.parent.parts)
    for node in ast.walk(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [] if node.level == 0 else list(package[: len(package) - node.level + 1])
            module = ".".join(base + ([node.module] if node.module else []))
            # `from lora_fx import passes` and `from . import site` name modules on the right.
            yield from (f"{module}.{alias.name}" for alias in node.names) if module in {"lora_fx", ""} else [module]


@pytest.mark.parametrize("path", PASS_MODULES, ids=str)
def test_a_pass_module_knows_graphs_only(path: Path) -> None:
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for name in imports(path):
        inside = name == "lora_fx.passes" or name.startswith("lora_fx.passes.")
        assert inside or name.split(".")[0] in allowed, f"{path} imports {name}"


@pytest.mark.parametrize("path", PASS_MODULES, ids=str)
def test_a_pass_module_says_what_it_does(path: Path) -> None:
    assert ast.get_docstring(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))), f"{path} has no docstring"


def test_there_are_passes() -> None:
    assert Path("passes/__init__.py") in PASS_MODULES  # else the parametrised tests above test nothing


# ---- the metadata ----------------------------------------------------------------------------------------------------


def test_constraints_pin_every_extra() -> None:
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    assert not [version for version in pinned.values() if "+" in version], "a local version fits one build only"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    # A torch for CUDA asks for one version of Triton, each for another.
    required = {normal(re.split(r"[^\w-]", requirement)[0]) for requirement in wanted}
    assert required <= {normal(name) for name in pinned} | {"triton"}
