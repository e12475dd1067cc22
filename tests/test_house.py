"""The house rules: one-way imports, short files and functions, an operator without files, no leftovers."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src" / "nha"
FILES = sorted(path for folder in ("src", "tests", "experiments", "examples") for path in (ROOT / folder).rglob("*.py"))
FILE_LINES = 600
FUNCTION_LINES = 80
KERNEL_LINES = 240  # Triton compiles a kernel from one function; what can be shared is in primitives.py
PARAMETERS = 12
README_LINES = 100
WIDE_SIGNATURES = {"nha_attention"}  # the operator's arguments are the contract

# From the bottom up: a room imports from its own level and from levels above it in this list.
LEVELS = (
    {"errors", "settings", "yaml_file", "__init__"},
    {"ops"},
    {"tensor_file"},
    {"io"},
    {"layer"},
    {"models"},
    {"data", "memory"},
    {"convert"},
    {"distill", "evaluate"},
    {"train"},
    {"ablate", "bench", "report", "serve"},
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


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / "src").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SRC.rglob("*.py")}
HOMES = {
    alias.name: str(node.module)
    for node in tree(SRC / "__init__.py").body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}


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


def is_operator(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether it is registered with PyTorch, whose schemas know tensors and numbers but no dataclasses."""
    return any("torch.library.custom_op" in ast.unparse(decorator) for decorator in function.decorator_list)


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


def test_every_module_has_a_level():
    expect_none({room(n) for n in MODULES} - set().union(*LEVELS))


def test_imports_go_from_upper_rooms_to_lower_ones():
    wrong = [
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in others
        if (level(room(other), LEVELS) or 0) > (level(room(name), LEVELS) or 0)
    ]
    expect_none(wrong)


def test_rooms_import_each_other_in_no_circle():
    edges: dict[str, set[str]] = {room(name): set() for name in graph()}
    for name, others in graph().items():
        edges[room(name)] |= {room(n) for n in others} - {room(name)}
    expect_none(" <-> ".join(group) for group in circles(edges))


def test_modules_import_each_other_in_no_circle():
    expect_none(" <-> ".join(group) for group in circles(graph()))


def test_models_are_built_from_the_config_up():
    wrong = []
    for name, others in graph().items():
        mine = level(name.removeprefix("nha.models."), MODEL_LEVELS)
        for other in others:
            theirs = level(other.removeprefix("nha.models."), MODEL_LEVELS)
            if None not in (mine, theirs) and theirs > mine:  # type: ignore[operator]
                wrong.append(f"{name} imports {other}")
    expect_none(wrong)


def test_the_library_tests_and_experiments_import_each_other_one_way():
    allowed = {
        "src": {"nha"},
        "experiments": {"nha", "experiments"},
        "examples": {"nha"},
        "tests": {"nha", "experiments", "tests"},
    }
    own = {"nha", "tests", "experiments", "examples", "benchmarks"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in FILES
        for name in {name.split(".")[0] for name in imported(path)} & own
        if name not in allowed[path.relative_to(ROOT).parts[0]]
    ]
    expect_none(wrong)


def test_the_operator_knows_tensors_only():
    """No files, no transformers, no safetensors."""
    banned = {"transformers", "safetensors", "pathlib", "tempfile", "shutil", "io", "json", "pickle"}
    wrong = []
    for path in (SRC / "ops").rglob("*.py"):
        names = {name.split(".")[0] for name in imported(path)} & banned
        wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in sorted(names)]
        wrong += [
            f"{place(path, node)} opens a file"
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("open", "torch.save", "torch.load")
        ]
    expect_none(wrong)


def test_no_file_calls_a_private_method_of_a_class_of_another_file():
    own: dict[str, set[Path]] = {}  # by name, the files whose classes have such a method
    for path in SRC.rglob("*.py"):
        for node in (each for each in ast.walk(tree(path)) if isinstance(each, ast.ClassDef)):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and re.match(
                    "_(?!_|make$)", method.name
                ):  # `_make`: named tuples
                    own.setdefault(method.name, set()).add(path)
    assert "_keep" in own
    expect_none(
        [
            f"{place(path, node)} {ast.unparse(node)}"
            for path in SRC.rglob("*.py")
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Attribute)
            and path not in own.get(node.attr, {path})
            and not (isinstance(node.value, ast.Call) or ast.unparse(node.value) in ("self", "cls"))  # a base's own
        ]
    )


@pytest.mark.parametrize("leftover", ["fmt:" + " skip", "fmt:" + " off", "TO" + "DO", "FIX" + "ME"])
def test_nothing_is_left_over(leftover):
    expect_none([str(path.relative_to(ROOT)) for path in FILES if leftover in path.read_text()])


def test_there_is_no_import_hook():
    expect_none([str(path.relative_to(ROOT)) for path in SRC.rglob("*.py") if "meta_path" in path.read_text()])


def test_the_readme_fits_a_screen():
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_no_docstring_begins_with_what():
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    wrong = [
        f"{path.relative_to(ROOT)}: {getattr(node, 'name', 'module')}"
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, documented) and re.match(r"What\b", ast.get_docstring(node) or "")
    ]
    expect_none(wrong)


def test_files_are_short_enough_to_read():
    lengths = {path: len(path.read_text().splitlines()) for path in FILES}
    expect_none([f"{path.relative_to(ROOT)}: {n} lines" for path, n in lengths.items() if n > FILE_LINES])


def test_functions_fit_a_screen():
    expect_none(
        [
            f"{place(path, function)} {function.name}: {code_lines(function)} lines"
            for path in FILES
            for function in functions(path)
            if code_lines(function) > (KERNEL_LINES if is_kernel(function) else FUNCTION_LINES)
        ]
    )


def test_signatures_are_short():
    wrong = []
    for path in FILES:
        for function in functions(path):
            if is_kernel(function) or is_operator(function) or function.name in WIDE_SIGNATURES:
                continue
            given = function.args
            names = [x.arg for x in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            count = len([n for n in names if n not in ("self", "cls", "ctx")])
            if count > PARAMETERS:
                wrong.append(f"{place(path, function)} {function.name}: {count} parameters")
    expect_none(wrong)


def test_the_package_says_that_it_is_typed():
    assert (SRC / "py.typed").exists()
