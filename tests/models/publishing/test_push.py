"""`moezoo push`, against a stand-in for the Hub's interface: no network."""

import json

import huggingface_hub
import pytest
import yaml
from huggingface_hub.utils import filter_repo_objects

from moezoo.__main__ import main
from moezoo_models.export.standalone.export import export_with_code


class Hub:
    """Keeps what it is asked for, as the Hub would have it."""

    def __init__(self):
        self.calls = []
        self.files = {}

    def create_repo(self, name, *, private, exist_ok):
        self.calls.append(("repo", name, private, exist_ok))

    def create_branch(self, name, *, branch, exist_ok):
        self.calls.append(("branch", name, branch, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, revision, allow_patterns, commit_message):
        self.calls.append(("upload", repo_id, revision, commit_message))
        paths = [p.relative_to(folder_path).as_posix() for p in folder_path.rglob("*")]
        for path in filter_repo_objects(paths, allow_patterns=allow_patterns):
            if (folder_path / path).is_file():
                self.files[path] = (folder_path / path).read_bytes()


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    return found


@pytest.fixture
def litter(ours):
    """Files that lie in the model's directory and are nobody's business."""
    (ours / "checkpoints").mkdir()
    names = ["pytorch_model.bin", "last.ckpt", "own.py", ".secret.json", "checkpoints/a.json"]
    for name in names:
        (ours / name).write_text("no")
    (ours / "weird[1].json").write_text("{}")
    return names


MODEL_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def test_a_directory_is_sent(hub, ours, litter, capsys):
    assert main(["push", str(ours), "org/name"]) == 0
    assert hub.calls == [
        ("repo", "org/name", True, True),
        ("upload", "org/name", None, "Send a model by moezoo push"),
    ]
    assert set(hub.files) == {*MODEL_FILES, "weird[1].json", "README.md"}
    assert hub.files["model.safetensors"] == (ours / "model.safetensors").read_bytes()
    assert hub.files["README.md"] == (ours / "README.md").read_bytes()
    said = capsys.readouterr().out
    assert said.startswith("org/name, main, private if it is new: 7 files, ")
    assert all(name in said.partition("left here: ")[2] for name in litter)
    assert said.endswith("sent to https://huggingface.co/org/name\n")


def test_a_dry_run_sends_and_writes_nothing(ours, litter, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    before = {file.name for file in ours.iterdir()}
    assert main(["push", str(ours), "org/name", "--dry_run", "--private", "false"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("org/name, main, public if it is new: 7 files, ")
    assert "README.md" in said
    assert said.endswith("nothing was sent (dry_run)\n")
    assert {file.name for file in ours.iterdir()} == before


def test_options_are_handed_on(hub, ours):
    words = ["--private", "false", "--revision", "small", "--message", "A first try"]
    assert main(["push", str(ours), "org/name", *words]) == 0
    assert hub.calls == [
        ("repo", "org/name", False, True),
        ("branch", "org/name", "small", True),
        ("upload", "org/name", "small", "A first try"),
    ]


def test_the_card_says_what_is_known(hub, ours):
    report = {"val_loss": 3.25, "val_perplexity": None, "tokens": 12345, "train_loss": "much"}
    (ours.parent / "report.json").write_text(json.dumps(report))
    (ours / "LICENSE").write_text("Apache License\n  Version 2.0, January 2004\n")
    assert main(["push", str(ours), "org/name"]) == 0
    _, head, text = hub.files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "moezoo",
        "pipeline_tag": "text-generation",
        "tags": ["moezoo"],
        "license": "apache-2.0",
    }
    assert "whose feed-forward blocks are `moezoo.DenseFFN`" in text
    assert "| validation loss | 3.250 nats per token |" in text
    assert "| training tokens | 12,345 |" in text
    assert "perplexity" not in text
    assert "training loss" not in text
    assert "import moezoo_models" in text
    assert "LICENSE" in hub.files


def test_a_readme_is_sent_as_it_is(hub, ours):
    (ours / "README.md").write_text("My own words.\n")
    assert main(["push", str(ours), "org/name"]) == 0
    assert hub.files["README.md"] == b"My own words.\n"


def test_code_goes_along_where_it_was_written(hub, ours, tmp_path):
    coded = export_with_code(ours, tmp_path / "coded")
    (coded / "more.py").write_text("no")
    assert main(["push", str(coded), "org/name"]) == 0
    assert set(hub.files) == {*MODEL_FILES, "README.md", "modeling_moezoo.py"}
    card = hub.files["README.md"].decode()
    assert 'from_pretrained("org/name", trust_remote_code=True)' in card
    assert 'library_name: "transformers"' in card


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("name", "name: 'name' is no name of a repository; write ORG/NAME"),
        ("org/na me", "name: 'org/na me' is no name of a repository"),
    ],
)
def test_names_are_checked(hub, ours, name, said, capsys):
    assert main(["push", str(ours), name]) == 2
    assert said in capsys.readouterr().err
    assert not hub.calls


def test_nobody_is_logged_in(hub, ours, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main(["push", str(ours), "org/name"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("moezoo: error: token: there is none")
    assert not hub.calls
    assert not (ours / "README.md").exists()


def test_damaged_weights_are_not_sent(hub, ours, capsys):
    file = ours / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert main(["push", str(ours), "org/name"]) == 2
    assert "checkpoint:" in capsys.readouterr().err
    assert not hub.calls


def test_what_the_hub_refuses_is_one_line(hub, ours, monkeypatch, capsys):
    def refuse(*_, **__):
        raise huggingface_hub.errors.HFValidationError("no\nsuch name")

    monkeypatch.setattr(hub, "create_repo", refuse)
    assert main(["push", str(ours), "org/name"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the Hub did not take org/name: no such name" in line
    assert not (ours / "README.md").exists()
