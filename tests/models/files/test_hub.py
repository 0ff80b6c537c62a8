"""Models by their names on the Hub, from a cache laid out on the disk: nothing is fetched here."""

import importlib
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from moezoo import InputError
from moezoo.__main__ import main
from moezoo_models import MoezooForCausalLM
from moezoo_models.checkpoints.directory import load_checkpoint, load_with_tokenizer
from moezoo_models.files import hub
from moezoo_models.files.hub import UNWANTED, WANTED, fetched
from moezoo_models.text.tokenizer import load_tokenizer
from moezoo_train.finetune.pretrained import default_tokenizer

httpx = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "89abcdef0123456789abcdef0123456789abcdef"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """Put an empty cache in the place of the user's, and allow no network."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub._snapshot.cache_clear()
    yield cache
    hub._snapshot.cache_clear()


@pytest.fixture
def cached(offline, ours):
    """Lay a model out as the cache has it: files in blobs, links to them in a snapshot."""
    place = offline / "models--org--name"
    for commit in (COMMIT, OTHER):
        snapshot = place / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (place / "blobs").mkdir(exist_ok=True)
        for number, file in enumerate(sorted(ours.iterdir())):
            blob = place / "blobs" / f"{commit[:4]}{number}"
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    (place / "refs" / "v1").write_text(OTHER)
    return place


def test_models_are_loaded_from_the_cache(cached, ours, capsys):
    before, _ = load_checkpoint(ours)
    for name, commit in (
        ("hf:org/name", COMMIT),
        ("hf:org/name@v1", OTHER),
        (f"hf:org/name@{OTHER}", OTHER),
    ):
        model, tokenizer = load_with_tokenizer(name)
        assert model.name_or_path == str(cached / "snapshots" / commit)
        assert tokenizer.encode("ab") == load_tokenizer(ours).encode("ab")
        for key, tensor in before.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[key])
        assert capsys.readouterr().err == f"{name}: {cached / 'snapshots' / commit}\n"


def test_python_takes_such_names(cached, ours):
    model = MoezooForCausalLM.from_pretrained("hf:org/name@v1")
    assert model.name_or_path == str(cached / "snapshots" / OTHER)


def test_runs_take_such_names(cached):
    assert default_tokenizer("hf:org/name") == str(cached / "snapshots" / COMMIT)
    assert default_tokenizer("elsewhere") is None
    assert load_tokenizer("hf:org/name@v1").encode("ab") == load_tokenizer(
        cached / "snapshots" / COMMIT
    ).encode("ab")


def test_commands_take_such_names(cached, place, capsys):
    words = ["--prompt", "some", "--max_new_tokens", "2"]
    assert main(["generate", "--checkpoint", "hf:org/name", *words]) == 0
    assert main(["export", "hf:org/name@v1", str(place / "stock")]) == 0
    assert (place / "stock" / "config.json").is_file()
    assert main(["upcycle", str(place / "stock"), str(place / "moe"), "--experts", "2"]) == 0
    capsys.readouterr()
    assert main(["upcycle", "hf:org/name", str(place / "again"), "--experts", "2"]) == 2
    assert "write a dense model as a stock one first" in capsys.readouterr().err


def answer(status):
    request = httpx.Request("GET", "https://huggingface.co/api/models/org/name")
    return httpx.Response(status, request=request)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (errors.GatedRepoError("x", response=answer(403)), "is gated; accept its terms"),
        (errors.RepositoryNotFoundError("x", response=answer(404)), "is not on the Hub, or is"),
        (errors.RevisionNotFoundError("x", response=answer(404)), "has no revision 'main'"),
        (errors.HfHubHTTPError("bad gateway", response=answer(502)), "fetched: bad gateway"),
        (httpx.ConnectError("no\nroute"), "cannot be fetched: no route"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_hub_refuses_is_one_line(error, said, monkeypatch, capsys):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert main(["generate", "--checkpoint", "hf:org/name", "--prompt", "x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert line.startswith("moezoo: error: checkpoint: hf:org/name ")


def test_offline_without_a_copy(capsys):
    with pytest.raises(InputError, match="hf:org/name@v2 is not in the cache as a whole"):
        fetched("hf:org/name@v2")


@pytest.mark.parametrize("name", ["hf:", "hf:../secret/x", "hf:a/b/c", "hf:org/name@", "hf:a b"])
def test_what_is_no_name(name):
    with pytest.raises(InputError, match="names no model of the Hub; write hf:ORG/NAME"):
        fetched(name)


def test_neither_code_nor_pickles_are_asked_for():
    wanted = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "chat_template.jinja",
        "LICENSE",
        "README.md",
    ]
    others = [
        "modeling_moezoo.py",
        "pytorch_model.bin",
        "training_args.bin",
        "onnx/config.json",
        "optimizer.pt",
        "LICENSE.py",
        "model.gguf",
    ]
    found = huggingface_hub.utils.filter_repo_objects(
        [*wanted, *others], allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)
    )
    assert list(found) == wanted
