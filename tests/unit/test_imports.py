"""Imports go one way: no circle between modules, no arrow upwards between rooms; docs/architecture.md draws them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "skipnet_rt"

# Rooms from top to bottom; a module imports from its own room and from those below. Neighbours do not know each other.
LEVELS = (("__main__",), ("cli",), ("measure", "training", "serving"), ("__init__",), ("runtime",), ("ops",),
          ("engines", "checkpoint", "data"), ("kernels",), ("_C",), ("model",), ("util", "assets"))
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def sources(package: Path, kernels: Path) -> dict[str, ast.Module]:
    """Every module by its name; skipnet_rt.kernels is a folder of its own."""
    modules = {}
    for folder, prefix in ((package, PACKAGE), (kernels, f"{PACKAGE}.kernels")):
        for file in folder.rglob("*.py*"):
            if file.suffix in (".py", ".pyi"):
                parts = file.relative_to(folder).with_suffix("").parts
                name = ".".join((prefix, *(parts[:-1] if parts[-1] == "__init__" else parts)))
                modules[name] = ast.parse(file.read_text(encoding="utf-8"), file)
    return modules


def imported(name: str, tree: ast.Module, modules: dict[str, ast.Module]) -> set[str]:
    """The modules of ours that one imports, wherever it does: in functions and for type checking only, too."""
    targets = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            targets |= {member if member in modules else node.module for member in members}
    return {target for target in targets if target.split(".")[0] == PACKAGE} - {name}


def room(module: str) -> str:
    """A folder, or a file of the package itself; the package's own is ``__init__``."""
    return module.split(".")[1] if "." in module else "__init__"


def upwards(arrows: dict[str, set[str]]) -> list[str]:
    """Imports from a room above, or beside."""
    return sorted(f"{start} imports {end}" for start, ends in arrows.items() for end in ends
                  if room(start) != room(end) and LEVEL[room(start)] >= LEVEL[room(end)])


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """A circle for every module that is reached again while its own imports are followed."""
    closed, finished = [], set()

    def follow(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            closed.append(" -> ".join((*path[path.index(module):], module)))
        elif module not in finished:
            for target in sorted(arrows.get(module, ())):
                follow(target, (*path, module))
            finished.add(module)

    for module in sorted(arrows):
        follow(module, ())
    return closed


def arrows_of(modules: dict[str, ast.Module]) -> dict[str, set[str]]:
    return {name: imported(name, tree, modules) for name, tree in modules.items()}


@pytest.fixture(scope="module")
def arrows():
    return arrows_of(sources(ROOT / PACKAGE, ROOT / "kernels"))


def test_every_module_has_a_room(arrows):
    assert {room(module) for module in arrows} <= set(LEVEL)
    assert {target for targets in arrows.values() for target in targets} <= set(arrows), "of modules that exist"


def test_no_import_goes_upwards(arrows):
    assert upwards(arrows) == []


def test_no_circle(arrows):
    assert circles(arrows) == []


# The tests above can fail ---------------------------------------------------------------------------------------------

@pytest.fixture
def house(tmp_path):
    """Writes modules of a made-up package, and returns its arrows."""
    def build(**files: str) -> dict[str, set[str]]:
        for name, text in files.items():
            file = tmp_path / PACKAGE / f"{name.replace('__', '/')}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "language.py").write_text("import torch\n")
        return arrows_of(sources(tmp_path / PACKAGE, tmp_path / "kernels"))
    return build


def test_a_house_in_order_passes(house):
    arrows = house(model__arch="", engines__base="from skipnet_rt.model.arch import arch",
                   engines__cpu="from skipnet_rt.engines import base\nfrom skipnet_rt.kernels import language")
    assert arrows["skipnet_rt.engines.cpu"] == {"skipnet_rt.engines.base", "skipnet_rt.kernels.language"}
    assert upwards(arrows) == circles(arrows) == []


@pytest.mark.parametrize("text", [
    "from skipnet_rt.runtime import compile",
    "from skipnet_rt import runtime",
    "import skipnet_rt.runtime",
    "def late():\n    from skipnet_rt.runtime import compile",
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from skipnet_rt.runtime import compile",
    "try:\n    pass\nfinally:\n    import skipnet_rt.runtime as above",
])
def test_an_arrow_upwards_is_seen_wherever_it_stands(house, text):
    assert upwards(house(runtime="", engines__cpu=text)) == ["skipnet_rt.engines.cpu imports skipnet_rt.runtime"]


def test_neighbours_do_not_know_each_other(house):
    arrows = house(measure__clock="from skipnet_rt.training.loop import train", training__loop="")
    assert upwards(arrows) == ["skipnet_rt.measure.clock imports skipnet_rt.training.loop"]


def test_a_circle_is_seen_through_several_modules(house):
    arrows = house(engines__a="from skipnet_rt.engines.b import b",
                   engines__b="def late():\n    from skipnet_rt.engines import c",
                   engines__c="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import skipnet_rt.engines.a")
    assert circles(arrows) == ["skipnet_rt.engines.a -> skipnet_rt.engines.b -> skipnet_rt.engines.c "
                               "-> skipnet_rt.engines.a"]
