"""The house rules: one-way imports, short files and functions, an operator without files, no leftovers."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

import nha

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src" / "nha"
FILES = sorted(path for folder in ("src", "tests", "experiments", "examples") for path in (ROOT / folder).rglob("*.py"))
FILE_LINES = 600
FUNCTION_LINES = 80
KERNEL_LINES = 200  # Triton compiles a kernel from one function; what can be shared is in primitives.py
PARAMETERS = 12
WIDE_SIGNATURES = {"nha_attention"}  # the operator's arguments are the contract
IMPORT_S = 0.5

# From the bottom up: a room imports from its own level and from levels above it in this list.
LEVELS = (
    {"errors", "__init__"},
    {"ops"},
    {"io"},
    {"layer"},
    {"models"},
    {"data"},
    {"convert"},
    {"distill", "evaluate"},
    {"train"},
    {"bench", "report", "serve"},
    {"cli", "__main__"},
)
MODEL_LEVELS = (
    {"config"},
    {"masks", "observe", "full_attention"},
    {"cache"},
    {"adapter"},
    {"nha"},
    {"auto"},
    {"loading"},
)
HOMES = getattr(nha, "_HOMES", {})


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / "src").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SRC.rglob("*.py")}


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports anywhere, inside functions and for type checking too, by their full names."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in MODULES:
                    yield inner
                elif node.module == "nha":
                    yield HOMES.get(alias.name, "nha")
                else:
                    yield str(node.module)


@cache
def graph() -> dict[str, set[str]]:
    """The modules of the library that each of them imports; the package itself only names homes of public names."""
    edges = {name: {n for n in imported(path) if n in MODULES} for name, path in MODULES.items()}
    return edges | {"nha": set()}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Every strongly connected part with more than one node, and nodes that import themselves."""

    def reach(start: str) -> set[str]:
        found: set[str] = set()
        new = set(edges[start])
        while new:
            found |= new
            new = set().union(*(edges[n] for n in new)) - found
        return found

    reached = {name: reach(name) for name in edges}
    groups = {tuple(sorted(m for m in edges if m in reached[n] and n in reached[m])) for n in edges if n in reached[n]}
    return [list(group) for group in sorted(groups)]


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


def level(name: str, levels: tuple[set[str], ...]) -> int | None:
    return next((i for i, names in enumerate(levels) if name in names), None)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return lines - ((first.end_lineno or 0) - first.lineno + 1 if documented else 0)


def place(path: Path, node: ast.stmt | ast.expr) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def expect_none(found: Iterable[str]) -> None:
    wrong = sorted(found)
    assert not wrong, "\n".join(wrong)


def test_rooms_import_each_other_in_no_circle():
    edges: dict[str, set[str]] = {room(name): set() for name in graph()}
    for name, others in graph().items():
        edges[room(name)] |= {room(n) for n in others} - {room(name)}
    expect_none(" <-> ".join(group) for group in circles(edges))


@pytest.mark.parametrize("leftover", ["fmt:" + " skip", "fmt:" + " off", "TO" + "DO", "FIX" + "ME"])
def test_nothing_is_left_over(leftover):
    expect_none([str(path.relative_to(ROOT)) for path in FILES if leftover in path.read_text()])


def test_the_package_says_that_it_is_typed():
    assert (SRC / "py.typed").exists()


def test_importing_the_package_adds_little_to_torch_and_transformers():
    """Processor time, the best of three: other work on the machine must not count."""
    first = "import time, torch; from transformers import AutoModelForCausalLM, LlamaForCausalLM"
    code = f"{first}; start = time.process_time(); import nha; print(time.process_time() - start)"
    times = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3)]
    assert min(times) < IMPORT_S
