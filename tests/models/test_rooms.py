"""The public names of a room are importable from it, and listed where they are looked for."""

import importlib
import subprocess
import sys

import pytest

ROOMS = ("checkpoints", "text", "evaluation", "inspect", "conversion")


@pytest.mark.parametrize("room", ROOMS)
def test_public_names_are_those_of_modules_of_the_room(room):
    package = importlib.import_module(f"moezoo_models.{room}")
    assert package.__all__
    for name in package.__all__:
        found = getattr(package, name)
        assert found.__name__ == name
        assert found.__module__.startswith(f"moezoo_models.{room}.")


def test_a_name_that_a_room_has_not_is_refused():
    package = importlib.import_module("moezoo_models.text")
    with pytest.raises(AttributeError, match=r"module 'moezoo_models.text' has no attribute 'x'"):
        package.x  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'x'"):
        exec("from moezoo_models.text import x")


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_can_be_what_is_imported_first(room):
    code = f"from moezoo_models.{room} import *; import moezoo_models.{room} as r; print(r.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_models_are_imported_without_corpora_and_conversion():
    heavy = [f"moezoo_models.{name}" for name in ("text.corpus", "conversion.convert", "inspect")]
    code = f"import sys, moezoo_models; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
