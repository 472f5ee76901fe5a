"""The table of rooms in docs/architecture.md, against the imports that the code has, wherever they stand in a file."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/architecture.md"
HEADER = "| room | what is in it |"


def read_rooms(page: str) -> list[str]:
    """Names of the first column, from top to bottom: `"losses/"` for a folder, `"files.py"` for a module."""
    lines = page.partition(HEADER)[2].partition("\n\n")[0].splitlines()[2:]
    return [name.strip(" `") for line in lines for name in line.split("|")[1].split(",")]


def find_modules(package: Path) -> dict[str, Path]:
    """Names and files of all modules of a package, itself included."""
    files = {path.relative_to(package.parent).with_suffix("").parts: path for path in package.rglob("*.py")}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for parts, path in files.items()}


def find_imports(source: str, modules: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports, also in functions, under `TYPE_CHECKING` and by `import_module`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are written in full"
            names = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module for name in names.values()}
        elif isinstance(node, ast.Constant) and "." in str(node.value):  # `import_module("...")`, or a table of it
            found.add(str(node.value))
    return found & modules.keys()


def find_room(module: str, modules: dict[str, Path]) -> str:
    """The row of the table that a module belongs to."""
    parts = module.split(".")
    if len(parts) == 1:
        return "__init__.py"
    return f"{parts[1]}/" if modules[".".join(parts[:2])].name == "__init__.py" else f"{parts[1]}.py"


def find_upward_imports(graph: dict[str, set[str]], rooms: list[str], modules: dict[str, Path]) -> list[str]:
    """Imports of a room that stands lower in the table; `evaluation/` may import `losses/`, and not the reverse."""
    rank = {room: number for number, room in enumerate(rooms)}
    return [
        f"{module} imports {imported}"
        for module, imports in sorted(graph.items())
        for imported in sorted(imports)
        if rank[find_room(module, modules)] < rank[find_room(imported, modules)]
    ]


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules of one import circle, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


MODULES = find_modules(ROOT / "spec_kd")
GRAPH = {name: find_imports(path.read_text(encoding="utf-8"), MODULES) for name, path in MODULES.items()}
ROOMS = read_rooms(PAGE.read_text(encoding="utf-8"))


def test_each_room_stands_in_the_table_once():
    assert sorted(ROOMS) == sorted({find_room(module, MODULES) for module in MODULES})


def test_rooms_import_only_rooms_above_them():
    assert find_upward_imports(GRAPH, ROOMS, MODULES) == []


def test_there_is_no_import_circle():
    assert find_circle(GRAPH) == []


@pytest.mark.parametrize(
    "source",
    [
        "import package.high",
        "import package.high as other",
        "from package import high",
        "from package.high import name",
        "def f():\n    from package.high import name",
        "if TYPE_CHECKING:\n    from package.high import Name",
        "name = import_module('package.high')",
        "HOME = {'name': 'package.high'}",
    ],
)
def test_an_import_upwards_and_a_circle_are_found(tmp_path, source):
    (tmp_path / "package").mkdir()
    for name, text in {"__init__": "", "low": source, "high": "from package import low"}.items():
        (tmp_path / "package" / f"{name}.py").write_text(text)
    modules = find_modules(tmp_path / "package")
    graph = {name: find_imports(path.read_text(), modules) for name, path in modules.items()}
    rooms = read_rooms(
        f"Text\n\n{HEADER}\n| --- | --- |\n| `low.py` | x |\n| `high.py`, `__init__.py` | x |\n\nMore.\n"
    )
    assert rooms == ["low.py", "high.py", "__init__.py"]
    assert find_upward_imports(graph, rooms, modules) == ["package.low imports package.high"]
    assert set(find_circle(graph)) == {"package.low", "package.high"}
