"""The public names of a room are importable from it, and listed where they are looked for."""

import importlib

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


@pytest.fixture(scope="module")
def printed(run_each):
    """Return what processes print that import nothing before: the package, or one of its rooms."""
    heavy = [f"moezoo_models.{name}" for name in ("text.corpus", "conversion.convert", "inspect")]
    code = f"import sys, moezoo_models; print([name for name in {heavy} if name in sys.modules])"
    codes = [
        f"from moezoo_models.{room} import *; import moezoo_models.{room} as r; print(r.__all__)"
        for room in ROOMS
    ]
    names = ("AutoModelForCausalLM", "PreTrainedModel", "PreTrainedTokenizerFast")
    first = f"from transformers import {', '.join(names)}"  # itself it is lazy
    return dict(zip(("", *ROOMS), run_each(first, [code, *codes]), strict=True))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_can_be_what_is_imported_first(room, printed):
    assert printed[room] == f"{importlib.import_module(f'moezoo_models.{room}').__all__}\n"


def test_models_are_imported_without_corpora_and_conversion(printed):
    assert printed[""] == "[]\n"
