"""Every command of the experiments reads only arguments that it defines; most run on a GPU alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FOLDER = Path("experiments")


def arguments(tree: ast.AST) -> set[str]:
    """Names of the arguments and of what is set on the parsed ones, in code."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value.removeprefix("--").replace("-", "_"))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


def reads(tree: ast.AST, name: str) -> set[str]:
    """Attributes that are read of what has a name."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {node.attr for node in found if getattr(node.value, "id", getattr(node.value, "attr", None)) == name}


def wrong(text: str, shared: str) -> set[str]:
    """Names that a program reads of its arguments (`options`, or `chosen` where it parses them) and does not define."""
    tree, found = ast.parse(text), set()
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)):
        found |= reads(function, "options")
        if "parse_args" in reads(function, "parser"):
            found |= reads(function, "chosen")
    return found - arguments(tree) - (arguments(ast.parse(shared)) if "model_options" in text else set())


def test_an_argument_that_is_not_defined_is_found():
    text = "def main():\n    parser.add_argument('out')\n    chosen = parser.parse_args()\n    print(chosen.output)"
    assert wrong(text, "") == {"output"}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_what_is_read_of_the_arguments_is_defined(path):
    shared = (FOLDER / "shapes.py").read_text(encoding="utf-8")
    assert not wrong(path.read_text(encoding="utf-8"), shared)
