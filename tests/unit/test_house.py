"""The rooms of docs/architecture.md: each is there, and imports no more than the house allows."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "gpuctl"
HOUSE = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
MODULES = sorted(PACKAGE.rglob("*.py"))
LIGHT = {
    "contextlib",
    "dataclasses",
    "difflib",
    "importlib",
    "json",
    "os",
    "pathlib",
    "sys",
    "typing",
    "typer",
}


def imports(module: Path, *, top: bool = False) -> Iterator[str]:
    """What it imports when it runs, `if TYPE_CHECKING` left out; `top`: only what it imports on being imported."""
    waiting: list[ast.AST] = [ast.parse(module.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        elif not (top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            waiting += ast.iter_child_nodes(node)


def of_ours(module: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(module) if name.startswith("gpuctl.")}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_what_its_room_may(module: Path) -> None:
    room = module.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "local":
        assert of_ours(module) <= {"local", "errors"}
        return
    foreign = {name.partition(".")[0] for name in imports(module)}
    assert not foreign & {"modal", "modal_proto"}, "the core runs the client, it does not import it"
    if room not in ("cli", "__main__"):
        assert "cli" not in of_ours(module)
        if room not in ("reach",):
            assert "local" not in of_ours(module)
    if room == "cli":
        at_top = {name for name in imports(module, top=True) if not name.startswith("__future__")}
        heavy = {name.partition(".")[0] for name in at_top} - LIGHT - {"gpuctl"}
        assert not heavy, "imported before it is needed: inside the verb's function, please"


def test_every_room_is_on_the_plan() -> None:
    for path in PACKAGE.iterdir():
        if path.suffix == ".py" and path.name != "__init__.py":
            assert f"{path.name}`" in HOUSE, path.name
        elif path.is_dir() and path.name != "__pycache__":
            assert f"`gpuctl/{path.name}/`" in HOUSE, path.name
