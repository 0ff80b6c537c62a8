"""What can be refused is refused before anything is tokenized, and changes nothing."""

from functools import partial

import pytest
import torch
import yaml

from moezoo import InputError, SparseMoE
from moezoo_train.data import prepared_text as data
from moezoo_train.run.cli import run
from moezoo_train.run.module import LanguageModel

OPTIONS = {
    "output": "run",
    "checkpoint_every": 2,
    "loggers": ["csv"],
    "model": {"d_model": 16, "num_layers": 1, "num_heads": 2, "max_length": 64},
    "data": {"source": "text.txt", "data_dir": "data", "vocab_size": 300, "sequence_length": 32},
    "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 120},
}
HASH = ["--model.ffn=moezoo.HashLayer", "--model.ffn.vocab_size=300", "--model.ffn.num_experts=4"]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Return the YAML file of a run whose text must not be touched."""

    def prepare(**_):
        raise AssertionError("it has begun to prepare the text")

    monkeypatch.setattr(data, "prepare", prepare)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "folder").mkdir()
    (tmp_path / "damaged.ckpt").write_bytes(b"PK\3\4")
    foreign = {"state_dict": {}, "pytorch-lightning_version": "2.6.0"}
    torch.save(foreign, "foreign.ckpt")
    torch.save({**foreign, "moezoo": {"config": {"hidden_size": 8}}}, "other.ckpt")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(OPTIONS))
    return tmp_path / "recipe.yaml"


MISTAKES = [
    (["--ckpt_path=nowhere.ckpt"], "ckpt_path: there is no checkpoint nowhere.ckpt"),
    (["--ckpt_path=best"], r"ckpt_path: there is no run/checkpoints/best\.ckpt"),
    (["--ckpt_path=folder"], "ckpt_path: folder is a folder without rest.ckpt"),
    (["--ckpt_path=damaged.ckpt"], r"ckpt_path: damaged\.ckpt is damaged or not a checkpoint"),
    (["--ckpt_path=foreign.ckpt"], r"ckpt_path: foreign\.ckpt was not written by moezoo fit"),
    (["--ckpt_path=other.ckpt"], r"ckpt_path: model\.\w+ is .* in the checkpoint, but .* in this"),
    (["--data.sequence_length=128"], "sequence_length: 128 is more than model.max_length 64"),
    (["--ckpt_path=auto", "--overwrite=true"], "overwrite: ckpt_path auto never overwrites"),
    (["--sample_prompt=d\udcffef"], "sample_prompt: character 2 is not UTF-8 text"),
    (["--sample_tokens=-1"], "sample_tokens: -1 is out of range"),
    (["--model.initialize_from=nowhere"], "initialize_from: .*nowhere"),
    ([*HASH, "--model.ffn.hash_function=clustered"], "model.hash_embeddings_from: missing"),
    (
        [*HASH, "--model.ffn.hash_function=dispersed", "--model.hash_embeddings_from=nowhere"],
        "model.hash_embeddings_from: .*nowhere",
    ),
    (["--trainer.strategy=zero2", "--model.on_nan=skip"], "model.on_nan: ZeRO can ?not skip"),
    (["--trainer.strategy=zero2", "--trainer.precision=bf16-true"], "bf16-true does not go with"),
    (
        ["--model.compile=true", "--model.ffn=moezoo.MemoryPlus", "--model.ffn.sparse=true"],
        "model.compile: torch.compile has no sparse gradients",
    ),
    (["--model.router_input=pre"], "model.router_input: 'pre' is not one of ffn_input, pre_a"),
    (["--output=text.txt"], "output: text.txt is a file"),
    (["--output=text.txt/run"], "output: text.txt/run cannot be written: Not a directory"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_run_is_refused_before_its_text_is_prepared(recipe, tmp_path, options, message):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message) as error:
        run(["fit", "--config", str(recipe), *options])
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_of_another_optimizer_is_refused_before(recipe):
    """Made by a run of the same model, whose text is not touched either."""
    model = LanguageModel(300, **OPTIONS["model"])
    state = {"state_dict": {}, "pytorch-lightning_version": "2.6.0", "global_step": 0}
    model.on_save_checkpoint(state)
    torch.save(state, "same.ckpt")
    with pytest.raises(AssertionError, match="begun to prepare"):
        run(["fit", "--config", str(recipe), "--ckpt_path=same.ckpt"])
    with pytest.raises(InputError, match=r"optimizer\.lr is .* but 0.5 in this run"):
        run(["fit", "--config", str(recipe), "--ckpt_path=same.ckpt", "--model.optimizer.lr=0.5"])


@pytest.mark.parametrize("trained", ["ffn_input", "pre_attention"])
def test_a_checkpoint_whose_router_read_something_else_is_refused_before(recipe, trained):
    mixture = ["--model.ffn=moezoo.SparseMoE", "--model.ffn.num_experts=4"]
    model = LanguageModel(
        300, **OPTIONS["model"], ffn=partial(SparseMoE, num_experts=4), router_input=trained
    )
    state = {"state_dict": {}, "pytorch-lightning_version": "2.6.0", "global_step": 0}
    model.on_save_checkpoint(state)
    torch.save(state, "same.ckpt")
    command = ["fit", "--config", str(recipe), "--ckpt_path=same.ckpt", *mixture]
    with pytest.raises(AssertionError, match="begun to prepare"):
        run([*command, f"--model.router_input={trained}"])
    for other in {"ffn_input", "pre_attention", "post_attention"} - {trained}:
        saved = None if trained == "ffn_input" else trained
        now = None if other == "ffn_input" else other
        said = rf"model\.ffn\[0\]\.router_input is {saved} in the checkpoint, but {now} in this run"
        with pytest.raises(InputError, match=said):
            run([*command, f"--model.router_input={other}"])


def test_the_text_would_be_prepared_else(recipe):
    with pytest.raises(AssertionError, match="begun to prepare"):
        run(["fit", "--config", str(recipe)])


@pytest.mark.parametrize("command", ["validate", "test"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], r"ckpt_path: there is no run/checkpoints/last\.ckpt; .* run moezoo fit"),
        (["--ckpt_path=foreign.ckpt"], "was not written by moezoo fit"),
        (
            ["--ckpt_path=foreign.ckpt", "--data.sequence_length=128"],
            "sequence_length: 128 is more than model.max_length 64",
        ),
    ],
)
def test_an_evaluation_is_refused_before_the_text_is_prepared(recipe, command, options, message):
    with pytest.raises(InputError, match=message):
        run([command, "--config", str(recipe), *options])
