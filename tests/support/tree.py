"""The source tree as it lies on disk: which files the rooms hold, and what each of them imports."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ROOMS = ("server", "engine", "kernels")
MODULES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def here(path: Path) -> str:
    """The path as seen from the root: `engine/scheduler.py`."""
    return path.relative_to(ROOT).as_posix()


def imports(path: Path, at_run_time: bool = False) -> Iterator[str]:
    """The dotted names that a file imports, wherever in it; `from a import b` is both `a` and `a.b`."""
    for node in _walk(ast.parse(path.read_text(encoding="utf-8")), at_run_time):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: absolute imports only"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages(path: Path) -> set[str]:
    """The top-level packages that a file imports at run time."""
    return {name.split(".")[0] for name in imports(path, at_run_time=True)}


def _walk(node: ast.AST, at_run_time: bool) -> Iterator[ast.AST]:
    """All nodes below; at run time, without what only type checkers read."""
    yield node
    children: Iterator[ast.AST] = ast.iter_child_nodes(node)
    if at_run_time and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        children = iter(node.orelse)
    for child in children:
        yield from _walk(child, at_run_time)
