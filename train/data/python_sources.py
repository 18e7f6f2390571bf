"""Definitions and docstrings of installed Python packages: real text and code, always at hand."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import pathlib
import sysconfig
import warnings
from collections.abc import Iterator, Sequence

# Tests, vendored copies and generated tables say nothing about how people document code.
_LEFT_OUT = {"tests", "test", "site-packages", "idlelib", "__pycache__", "lib2to3", "turtledemo"}


@dataclasses.dataclass(frozen=True)
class Definition:
    """A module, class or function of a package.

    Attributes:
      module: dotted name of the module.
      name: qualified name inside the module, "" for the module itself.
      kind: "module", "class" or "function".
      docstring: cleaned docstring, "" without one.
      source: source text of the definition, docstring included.
    """

    module: str
    name: str
    kind: str
    docstring: str
    source: str


def python_files(packages: Sequence[str] = ("stdlib",)) -> list[tuple[str, pathlib.Path]]:
    """(dotted module name, file) of every source file, sorted by name.

    `packages` are installed packages, found without importing them; "stdlib" is Python's own
    library.

    Raises ValueError naming a package that is not installed.
    """
    found = []
    for package in packages:
        if package == "stdlib":
            root, prefix = pathlib.Path(sysconfig.get_paths()["stdlib"]), ""
        else:
            spec = importlib.util.find_spec(package)
            if spec is None or not spec.submodule_search_locations:
                raise ValueError(f"package {package!r} is not installed; its sources are wanted")
            root, prefix = pathlib.Path(spec.submodule_search_locations[0]), package
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            if _LEFT_OUT.isdisjoint(parts) and not parts[-1].startswith("test_"):
                names = [prefix, *parts] if prefix else list(parts)
                if names[-1] == "__init__":
                    names.pop()
                found.append((".".join(names), path))
    return sorted(found)


def definitions(packages: Sequence[str] = ("stdlib",)) -> Iterator[Definition]:
    """Every module, class and function of `packages`, by module name, then by place in the file.

    Files that do not parse or decode are left out.
    """
    for module, path in python_files(packages):
        try:
            text = path.read_text("utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(text)
        except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
            continue
        yield Definition(module, "", "module", ast.get_docstring(tree) or "", text)
        yield from _inside(module, "", tree, text.splitlines(keepends=True))


def _inside(module: str, prefix: str, node: ast.AST, lines: list[str]) -> Iterator[Definition]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}{child.name}"
            kind = "class" if isinstance(child, ast.ClassDef) else "function"
            source = "".join(lines[child.lineno - 1 : child.end_lineno])
            yield Definition(module, name, kind, ast.get_docstring(child) or "", source)
            yield from _inside(module, f"{name}.", child, lines)
