"""Exported with code, a model runs in transformers where moezoo is not there at all."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import moezoo
from moezoo import InputError
from moezoo_models.checkpoints.directory import load_checkpoint, quiet, save_checkpoint
from moezoo_models.checkpoints.stock import load_any_with_tokenizer
from moezoo_models.export.standalone.export import AUTO_MAP, MODULE, export_with_code
from moezoo_models.export.stock import export_stock

WITHOUT_MOEZOO = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0].startswith("moezoo"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

directory, output = sys.argv[1:]
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
ids = torch.arange(24).reshape(2, 12) % 61
with torch.no_grad():
    logits = model(ids).logits
said = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
found = {
    f"cached {cached}": model.generate(ids, use_cache=cached, **said) for cached in (True, False)
}
save_file({"logits": logits, **found}, output)
text = AutoTokenizer.from_pretrained(directory, trust_remote_code=True).decode([40, 41])
assert not [name for name in sys.modules if name.startswith("moezoo")], "it is there"
print(type(model).__module__, len(text))
"""

METHODS = ("mixtral", "peer", "memory_plus", "fast_feed_forward", "hash")


@pytest.fixture
def saved(make, tmp_path, byte_level_tokenizer):
    """A model of ours, one layer for each of a few methods."""
    methods = {method.name: method for method in moezoo.zoo()}
    rules = [{"layers": "all", "class_path": "moezoo.DenseFFN"}]
    for number, name in enumerate(METHODS):
        layer = methods[name].build(32).config()
        layer["init_args"].pop("d_model")
        rules.append({"layers": number, **layer})
    model = make(vocab_size=300, num_hidden_layers=len(METHODS), ffn=rules)
    return save_checkpoint(tmp_path / "model", model, byte_level_tokenizer)


def test_transformers_runs_it_without_moezoo(saved, tmp_path, capsys):
    directory = export_with_code(saved, tmp_path / "shared")
    assert "lines of code" in capsys.readouterr().out
    found = tmp_path / "found.safetensors"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MOEZOO, directory, found],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("transformers_modules.")
    model, _ = load_checkpoint(saved)
    ids = torch.arange(24).reshape(2, 12) % 61
    theirs = load_file(found)
    with torch.no_grad():
        assert (model(ids).logits - theirs["logits"]).abs().max() <= 1e-5
    ours = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(ours, theirs["cached True"])
    assert torch.equal(ours, theirs["cached False"])


def test_our_own_loaders_run_none_of_it(saved, tmp_path):
    directory = export_with_code(saved, tmp_path / "shared")
    code = directory / f"{MODULE}.py"
    code.write_text(f"raise SystemExit('it was run')\n{code.read_text()}")
    assert json.loads((directory / "config.json").read_text())["auto_map"] == AUTO_MAP
    before, _ = load_checkpoint(saved)
    again, tokenizer = load_any_with_tokenizer(directory)
    with quiet():
        automatic = AutoModelForCausalLM.from_pretrained(directory)
    assert tokenizer.decode([40, 41])
    for model in (again, automatic):
        assert type(model) is type(before)
        for name, tensor in before.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name])
    # What is made of it has no such code, and says so.
    copy = save_checkpoint(tmp_path / "copy", again)
    assert "auto_map" not in json.loads((copy / "config.json").read_text())


def test_stock_models_need_none(llama, place, tmp_path):
    with pytest.raises(InputError, match="with_code: transformers has the code of llama itself"):
        export_with_code(place / "model", tmp_path / "shared")
    assert not (tmp_path / "shared").exists()


def test_a_refused_export_names_the_way_out(saved, tmp_path):
    with pytest.raises(InputError, match=r"keep it as it is, or add --with_code$"):
        export_stock(saved, tmp_path / "stock")
    assert not (tmp_path / "stock").exists()
