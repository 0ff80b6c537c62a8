"""Licences and READMEs go along with what is made of a model."""

import os

import pytest

from moezoo import InputError
from moezoo_models.checkpoints.companions import HEADING, carry_over, is_license, with_change
from moezoo_models.conversion.upcycle import upcycle
from moezoo_models.export.standalone.export import MODULE, export_with_code
from moezoo_models.export.stock import export_stock

README = "---\nlicense: mit\n---\n# A model\n\nWords, and bytes that are no text: é\n"


def described(directory, license="Do as you like.\n"):
    (directory / "README.md").write_text(README)
    (directory / "LICENSE").write_text(license)
    (directory / "Notice.txt").write_text("Made by somebody.\n")
    return directory


def test_which_files_are_licences():
    names = ["LICENSE", "LICENCE.md", "license-2.0.txt", "NOTICE", "COPYING", "USE_POLICY.md"]
    assert all(map(is_license, names))
    others = [
        "licensed_model.safetensors",
        "license.py",
        "README.md",
        "model_license",
        "notice.bin",
    ]
    assert not any(map(is_license, others))


def test_a_section_says_what_was_changed():
    once = with_change(README.encode(), "Cut\nin two.")
    assert once.decode() == f"{README}\n{HEADING}\n\n- Cut in two.\n"
    twice = with_change(once, "Glued.")
    assert twice.decode() == f"{README}\n{HEADING}\n\n- Cut in two.\n- Glued.\n"
    assert with_change(twice, "Glued.") == twice
    # What somebody has written behind the section stays behind it.
    followed = with_change(once + b"\n# More\n\n- a list\n", "Glued.")
    assert followed.decode().endswith("- Cut in two.\n- Glued.\n\n# More\n\n- a list\n")
    odd = with_change(b"\xff\xfe words\r\n", "Cut.")
    assert odd.startswith(b"\xff\xfe words")


def test_nothing_that_was_there_is_lost(tmp_path):
    source, target, fresh = (tmp_path / name for name in ("source", "target", "fresh"))
    for each in (source, target, fresh):
        each.mkdir()
    described(source)
    (target / "README.md").write_text("About another model.\n")
    (target / "LICENSE").write_text("Do nothing.\n")
    (target / "COPYING").write_text("Neither.\n")
    carry_over([source], fresh, "Cut.", target)
    found = {file.name: file.read_text() for file in fresh.iterdir()}
    assert found.pop("README.md") == f"{README}\n{HEADING}\n\n- Cut.\n"
    assert found == {
        "README.md.earlier": "About another model.\n",
        "LICENSE": "Do as you like.\n",
        "LICENSE.earlier": "Do nothing.\n",
        "COPYING": "Neither.\n",
        "Notice.txt": "Made by somebody.\n",
    }


def test_a_readme_that_was_continued_stays_so(tmp_path):
    source, target, fresh = (tmp_path / name for name in ("source", "target", "fresh"))
    for each in (source, target, fresh):
        each.mkdir()
    described(source)
    own = f"{README}\nMeasured by me: 3.\n"
    (target / "README.md").write_text(own)
    carry_over([source], fresh, "Cut.", target)
    assert (fresh / "README.md").read_text() == f"{own}\n{HEADING}\n\n- Cut.\n"
    assert not (fresh / "README.md.earlier").exists()


def test_links_out_of_the_directory_are_refused(tmp_path):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "source").mkdir()
    (tmp_path / "fresh").mkdir()
    os.symlink(tmp_path / "secret", tmp_path / "source" / "LICENSE")
    with pytest.raises(InputError, match="is a link out of its directory"):
        carry_over([tmp_path / "source"], tmp_path / "fresh", "Cut.")
    assert not any((tmp_path / "fresh").iterdir())


def test_conversions_take_them_along(llama, place):
    source = described(place / "model")
    made = place / "mixture"
    upcycle(source, made, experts=2, top_k=1)
    (section,) = (made / "README.md").read_text().split(README)[1:]
    assert section.startswith(f"\n{HEADING}\n\n- `moezoo upcycle` made a `mixtral` of this `llama`")
    for name in ("LICENSE", "Notice.txt"):
        assert (made / name).read_bytes() == (source / name).read_bytes()


def test_several_models_bring_theirs(place, tmp_path):
    one, other, fresh = (tmp_path / name for name in ("one", "other", "fresh"))
    for each in (one, other, fresh):
        each.mkdir()
    described(one)
    described(other, "Ask first.\n")
    carry_over([one, other], fresh, "Joined.")
    names = {file.name for file in fresh.iterdir()}
    assert names == {"README.md", "LICENSE", "LICENSE_2", "Notice.txt"}
    assert (fresh / "LICENSE_2").read_text() == "Ask first.\n"


def test_exports_take_them_along(ours, tmp_path):
    described(ours)
    stock = export_stock(ours, tmp_path / "stock")
    coded = export_with_code(ours, tmp_path / "coded")
    assert "wrote the same weights as a `llama`" in (stock / "README.md").read_text()
    assert f"added `{MODULE}.py`" in (coded / "README.md").read_text()
    for made in (stock, coded):
        assert (made / "LICENSE").read_text() == "Do as you like.\n"
        assert (made / "README.md").read_text().startswith(README)
