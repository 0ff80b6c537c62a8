"""pyproject, constraints, environment, Makefile and wheel say the same thing, and work."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import moezoo

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
PACKAGES = {
    "moezoo_kernels": ROOT / "kernels" / "moezoo_kernels",
    "moezoo": ROOT / "moezoo",
    "moezoo_models": ROOT / "models" / "moezoo_models",
    "moezoo_train": ROOT / "train" / "moezoo_train",
}
# Built from source against the torch that is there; probed for, never required.
PROBED = {
    "megablocks",
    "scattermoe",
    "grouped_gemm",
    "torchtitan",
    "liger_kernel",
    "cut_cross_entropy",
}
MODULE_OF = {"pyyaml": "yaml", "peer-pytorch": "PEER_pytorch"}


def direct_requirements() -> dict[str, Requirement]:
    """Every requirement of the core and of all extras, except on moezoo itself."""
    texts = [*PROJECT["project"]["dependencies"], *(r for extra in EXTRAS.values() for r in extra)]
    found = {canonicalize_name((r := Requirement(text)).name): r for text in texts}
    found.pop("moezoo")
    return found


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    return {canonicalize_name((r := Requirement(line)).name): r for line in lines}


def makefile() -> str:
    return (ROOT / "Makefile").read_text(encoding="utf-8")


def recipe(target: str) -> str:
    """The recipe lines of one Makefile target."""
    match = re.search(rf"^{re.escape(target)}:.*\n((?:\t.*\n?)*)", makefile(), re.MULTILINE)
    assert match, target
    return match[1]


def test_every_direct_dependency_is_pinned_and_nothing_else():
    assert sorted(pins()) == sorted(direct_requirements())


def test_pins_are_exact_and_allowed():
    requirements = direct_requirements()
    for name, pin in pins().items():
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), name
        version = str(pin.specifier).removeprefix("==")
        assert requirements[name].specifier.contains(version, prereleases=True), name


def test_torch_is_pinned():
    assert str(pins()["torch"].specifier) == "==2.13.0"


def test_core_is_small():
    names = {Requirement(text).name for text in PROJECT["project"]["dependencies"]}
    assert names == {"torch", "numpy", "safetensors"}


def test_heavy_packages_have_their_place():
    named = {extra: {Requirement(text).name for text in texts} for extra, texts in EXTRAS.items()}
    assert {"lightning", "sentencepiece", "transformers"} <= named["train"]
    assert "deepspeed" in named["deepspeed"]
    assert "xformers" in named["xformers"]
    requirements = direct_requirements()
    # Their extras bring outdated pins; megablocks would even replace torch.
    assert requirements["lightning"].extras == set()
    assert not PROBED & set(requirements)


def test_heavy_packages_are_asked_for_on_linux_only():
    for name in ("deepspeed", "xformers", "triton"):
        assert str(direct_requirements()[name].marker) == 'sys_platform == "linux"'


def test_everything_imported_is_declared():
    distributions = {MODULE_OF.get(name, name.replace("-", "_")) for name in direct_requirements()}
    known = set(sys.stdlib_module_names) | set(PACKAGES) | distributions | PROBED
    for folder in PACKAGES.values():
        for path in folder.rglob("*.py"):
            assert imported(path) <= known, path


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_environment_equals_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *conda, last = environment["dependencies"]
    assert f"python{PROJECT['project']['requires-python']}" in conda
    assert {"pip", "make"} <= set(conda)
    assert last["pip"][0] == "--constraint constraints.txt"
    installs = [re.fullmatch(r"--editable \.\[([\w,]+)\]", line) for line in last["pip"][1:]]
    extras = [extra for match in installs if match for extra in match[1].split(",")]
    assert len(installs) == 1
    assert set(extras) <= set(EXTRAS)
    # What environment.yml installs is what the commands of `moezoo` import.
    assert {"train", "data"} <= set(extras)


def test_version_is_said_once_the_same():
    version = PROJECT["project"]["version"]
    assert moezoo.__version__ == version
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[([\d.]+)\]", changelog, re.MULTILINE)[1] == version


def test_packages_say_that_they_are_typed():
    for folder in PACKAGES.values():
        assert (folder / "py.typed").is_file()


def test_make_installs_under_constraints_and_demo_takes_no_dev_packages():
    for stamp, extra in ((".train", "train"), (".dev", "dev"), (".docs", "docs")):
        lines = recipe(f"$(VENV)/{stamp}")
        assert f'--constraint constraints.txt --editable ".[{extra}]"' in lines
    assert "demo: $(VENV)/.train\n" in makefile()
    assert "test: $(VENV)/.dev\n" in makefile()
    assert "docs: $(VENV)/.docs\n" in makefile()


def test_continuous_integration_runs_lint_and_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    assert text.splitlines()[-2:] == ["make docs", "make lint test"]


def test_pre_commit_runs_the_tools_of_make_lint():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    tools = {tuple(hook["entry"].removeprefix(".venv/bin/").split()[:2]) for hook in hooks}
    lint = recipe("lint").replace("$(BIN)/", "").replace("@", "").replace(" --check", "")
    wanted = {tuple(line.split()[:2]) for line in lint.splitlines()}
    assert tools == wanted
    assert all(repo["repo"] == "local" for repo in config["repos"])


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_says_what_is_wrong_with_the_interpreter(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt", "setup.py"):
        (tmp_path / name).touch()
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.2\n')
    bare = tmp_path / "bare-python"
    bare.write_text(
        f'#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"\n'
    )
    for script in (old, bare):
        script.chmod(0o755)
    expected = {
        "./old-python": "make: moezoo needs Python 3.11 or newer, ./old-python is Python 3.9.2;",
        "./bare-python": "make: ./bare-python has no venv module;",
        "./no-python": "make: ./no-python does not run;",
    }
    for python, message in expected.items():
        command = ["make", "demo", f"PYTHON={python}", "CPU_ONLY="]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode != 0
        assert done.stderr.splitlines()[0].startswith(message)
    assert not (tmp_path / ".venv").exists()


def copy_sources(target: Path) -> None:
    """Copy what a release is built from, and nothing that was built here."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "_native_*")
    for folder in ("moezoo", "kernels", "models", "train", "configs"):
        shutil.copytree(ROOT / folder, target / folder, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)


def texts(folder: Path) -> dict[str, str]:
    """Every YAML file below a folder."""
    paths = sorted(folder.rglob("*.yaml"))
    return {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in paths}


def install(wheel: Path, site: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target"]
    subprocess.run([*command, str(site), str(wheel)], check=True, capture_output=True)


def in_site(site: Path, code: str) -> str:
    """Run code with what was installed there, from another folder."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=site.parent,
        env={**os.environ, "PYTHONPATH": str(site)},
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


@pytest.mark.slow
def test_wheel_holds_our_packages_only_and_imports_from_elsewhere(tmp_path):
    source = tmp_path / "source"
    copy_sources(source)
    setup = source / "setup.py"
    text = setup.read_text(encoding="utf-8")
    # Optimising, and other instruction sets from the same sources, would take minutes; nothing
    # here is measured, and `make test` has installed the sources with all of them.
    for changed, to in (('"-O3"', '"-O0"'), ("flags |= X86", "pass")):
        assert changed in text
        text = text.replace(changed, to)
    setup.write_text(text, encoding="utf-8")
    # By way of the source distribution, so that one is complete too.
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    install(wheel, site)

    top = {path.name for path in site.iterdir()} - {"bin"}
    assert top == {*PACKAGES, f"moezoo-{moezoo.__version__}.dist-info"}
    installed = {str(p.relative_to(site)) for name in PACKAGES for p in (site / name).rglob("*.py")}
    written = {
        str(path.relative_to(folder.parent))
        for folder in PACKAGES.values()
        for path in folder.rglob("*.py")
    }
    assert installed == written
    for name in PACKAGES:
        assert (site / name / "py.typed").is_file()

    code = "from moezoo.command.recipes import find, folder; print(find('peer'), folder())\n"
    code += "import moezoo_kernels, moezoo, moezoo_models, moezoo_train\n"
    code += "for m in (moezoo_kernels, moezoo, moezoo_models, moezoo_train): print(m.__file__)\n"
    code += "from moezoo_kernels import native; print(getattr(native.load(), 'name', 'none'))"
    recipes, *modules, native = in_site(site, code).splitlines()
    assert recipes.split() == [
        str(site / "moezoo" / "recipes" / "peer.yaml"),
        str(site / "moezoo" / "recipes"),
    ]
    assert texts(site / "moezoo" / "recipes") == texts(ROOT / "configs")
    assert all(line.startswith(str(site)) for line in modules)
    if shutil.which("g++") or shutil.which("c++"):
        assert native == "generic"


@pytest.mark.slow
def test_without_a_compiler_the_wheel_builds_and_runs_on_plain_torch(tmp_path):
    source = tmp_path / "source"
    copy_sources(source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    without = {**os.environ, "CC": "no-compiler", "CXX": "no-compiler"}
    subprocess.run([*build, str(source)], check=True, capture_output=True, env=without)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    install(wheel, site)
    assert not list(site.rglob("_native_*"))
    code = "import torch, moezoo; from moezoo_kernels import native; print(native.load())\n"
    code += "print(moezoo.PEER(32)(torch.randn(3, 32)).hidden.shape)"
    reason, shape = in_site(site, code).splitlines()
    assert reason.startswith("not built: no C++ compiler")
    assert shape == "torch.Size([3, 32])"
