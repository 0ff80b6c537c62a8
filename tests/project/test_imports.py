"""Components import each other in one direction only, and `import moezoo` stays cheap."""

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest

import moezoo
from moezoo.__main__ import COMMANDS

ROOT = Path(__file__).parents[2]
# Each component may import itself and those before it.
COMPONENTS = {
    "moezoo_kernels": ROOT / "kernels" / "moezoo_kernels",
    "moezoo": ROOT / "moezoo",
    "moezoo_models": ROOT / "models" / "moezoo_models",
    "moezoo_train": ROOT / "train" / "moezoo_train",
}
ORDER = list(COMPONENTS)
COMMAND = ROOT / "moezoo" / "__main__.py"


def imported_components(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").partition(".")[0])
    return names & set(COMPONENTS)


def violations(component: str, source: str) -> set[str]:
    return imported_components(source) - set(ORDER[: ORDER.index(component) + 1])


@pytest.mark.parametrize("component", COMPONENTS)
def test_components_import_only_what_stands_before_them(component):
    files = [path for path in COMPONENTS[component].rglob("*.py") if path != COMMAND]
    assert files
    found = {
        str(path.relative_to(ROOT)): wrong
        for path in files
        if (wrong := violations(component, path.read_text(encoding="utf-8")))
    }
    assert found == {}


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Return modules that import each other in a circle; none if there is no circle."""
    finished: set[str] = set()

    def follow(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in finished:
            return []
        for other in sorted(imports[module]):
            if found := follow(other, [*path, module]):
                return found
        finished.add(module)
        return []

    return next((found for module in imports if (found := follow(module, []))), [])


def modules_of(component: str) -> dict[str, set[str]]:
    """Return the modules of a component, and which of it each imports, types included."""
    folder, sources = COMPONENTS[component], {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        name = ".".join([component, *(part for part in parts if part != "__init__")])
        sources[name] = path.read_text(encoding="utf-8")
    return {name: imported(source, sources) - {name} for name, source in sources.items()}


def imported(source: str, known: Iterable[str]) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in known else node.module for name in inside}
    return names & set(known)


@pytest.mark.parametrize("component", COMPONENTS)
def test_modules_import_each_other_in_no_circle(component):
    imports = modules_of(component)
    assert sum(map(len, imports.values())) > len(imports)
    assert circle(imports) == []


def rooms_of(imports: dict[str, set[str]], folders: set[str]) -> dict[str, set[str]]:
    """Return the rooms of a component, and which others each imports.

    A room is a folder of the component, or a file that stands in none.
    """

    def room(module: str) -> str:
        parts = module.split(".")
        return parts[1] if len(parts) > 1 and parts[1] in folders else module

    rooms: dict[str, set[str]] = {room(module): set() for module in imports}
    for module, others in imports.items():
        rooms[room(module)] |= {room(other) for other in others} - {room(module)}
    return rooms


def folders_of(component: str) -> set[str]:
    return {path.parent.name for path in COMPONENTS[component].glob("*/__init__.py")}


@pytest.mark.parametrize("component", COMPONENTS)
def test_rooms_import_each_other_in_no_circle(component):
    folders = folders_of(component)
    assert folders
    assert circle(rooms_of(modules_of(component), folders)) == []


def test_a_circle_of_rooms_is_noticed():
    imports = {"m.a.x": {"m.b.y"}, "m.b.y": set(), "m.b.z": {"m.c"}, "m.c": {"m.a.w"}}
    rooms = rooms_of({**imports, "m.a.w": set()}, {"a", "b"})
    assert rooms == {"a": {"b"}, "b": {"m.c"}, "m.c": {"a"}}
    assert circle(rooms) == ["a", "b", "m.c"]


def test_a_circle_is_noticed():
    known = ("m.a", "m.b", "m.c")
    typed = "if TYPE_CHECKING:\n    from m.b import B\n"
    imports = {"m.a": imported(typed, known), "m.b": {"m.c"}, "m.c": imported("import m.a", known)}
    assert circle(imports) == ["m.a", "m.b", "m.c"]
    assert circle({**imports, "m.c": set()}) == []


def test_a_wrong_import_is_noticed():
    assert violations("moezoo_kernels", "def f():\n    from moezoo.errors import InputError") == {
        "moezoo"
    }
    assert violations("moezoo", "import moezoo_train.data.datamodule") == {"moezoo_train"}
    assert violations("moezoo_train", "import moezoo, moezoo_kernels.backends") == set()


@pytest.mark.parametrize("component", ["moezoo_models", "moezoo_train"])
def test_files_are_replaced_by_one_function(component):
    door, name = "models/moezoo_models/checkpoints/atomic.py", "moezoo.atomic.atomic_write"
    found = {
        str(path.relative_to(ROOT))
        for path in COMPONENTS[component].rglob("*.py")
        if imported(path.read_text(encoding="utf-8"), [name])
    }
    assert found <= {door}


def test_component_folders_are_not_packages():
    # An importable folder named `kernels` would break transformers, which probes for that name.
    for folder in ("kernels", "models", "train", "tests"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_import_moezoo_loads_nothing_heavy(run_each):
    heavy = ("lightning", "transformers", "triton", "jsonargparse", "rich", "matplotlib", "pandas")
    heavy += ("torch._dynamo",)  # takes longer to load than the rest of torch
    loaded = f"print([name for name in {heavy} if name in sys.modules])"
    # torch's FLOP counter loads triton on its own.
    codes = ["import sys;" + loaded, "import sys, moezoo; moezoo.zoo();" + loaded]
    bare, ours = run_each("import torch.utils.flop_counter", codes)
    assert ours == bare


def test_import_moezoo_loads_no_torch_until_a_name_is_asked_for(run_each):
    loaded = "\nimport sys; print('torch' in sys.modules"
    codes = ["import moezoo" + loaded + ", dir(moezoo) != [])"]
    codes += ["from moezoo import InputError" + loaded + ")"]
    codes += ["import moezoo; moezoo.layers.peer.PEER is moezoo.PEER" + loaded + ")"]
    assert run_each("", codes) == ["False True\n", "True\n", "True\n"]


def test_public_names_are_those_that_editors_see():
    tree = ast.parse((ROOT / "moezoo" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and not node.orelse and isinstance(node.test, ast.Name)
    )
    seen = {node.module: {alias.name for alias in node.names} for node in block.body}
    known = {f"moezoo.{module}": set(names) for module, names in moezoo._NAMES.items() if names}
    assert seen == known
    assert sorted(moezoo.__all__) == sorted(name for names in known.values() for name in names)
    assert all(getattr(moezoo, name).__name__ == name for name in moezoo.__all__)
    with pytest.raises(AttributeError, match="no attribute 'PEAR'"):
        moezoo.PEAR  # noqa: B018


def test_every_method_is_registered_whatever_is_imported_first(run_each):
    codes = [
        "from moezoo.feed_forward import zoo; print(len(zoo()))",
        "from moezoo.swap_layers import swap; import moezoo; print(len(moezoo.zoo()))",
        "from moezoo.feed_forward import registered, zoo; registered('moezoo.PEER');"
        "print(len(zoo()))",
    ]
    assert run_each("import torch", codes) == [f"{len(moezoo.zoo())}\n"] * 3


def test_overview_needs_no_optional_package(run_each):
    optional = ("jsonargparse", "lightning", "yaml", "rich", "transformers")
    blocked = f"import sys; sys.modules.update(dict.fromkeys({optional}))\n"
    (output,) = run_each("", [blocked + "from moezoo.__main__ import main; main(['--help'])"])
    assert "moezoo COMMAND" in output


TORCHLESS = ["--help", "--version", "zoo", "zoo --json"]
# Lightning's commands build their parser of classes, and keep the page: see test_pages.py.
TORCHLESS += [f"{name} --help" for name, each in COMMANDS.items() if not each.lightning]


@pytest.fixture(scope="module")
def imported_by(run_each):
    """Return which of the heavy modules each line imports, and prints last."""
    heavy = ("torch", "numpy", "transformers", "lightning", "moezoo.feed_forward", "rich")
    code = f"""
import atexit, sys
from moezoo.__main__ import main
atexit.register(lambda: print([name for name in {heavy} if name in sys.modules]))
main("""
    outputs = run_each("import jsonargparse", [f"{code}{line.split()})" for line in TORCHLESS])
    return {k: v.splitlines()[-1] for k, v in zip(TORCHLESS, outputs, strict=True)}


@pytest.mark.parametrize("line", TORCHLESS)
def test_what_only_says_something_imports_no_torch(line, imported_by):
    assert imported_by[line] == "[]"
