"""What the gate lets through, what it refuses beside damage, and how it says it."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from moezoo import InputError
from moezoo_models import MoezooForCausalLM
from moezoo_models.checkpoints.directory import load_checkpoint, read_tensor, save_checkpoint
from moezoo_models.checkpoints.stock import load_any_with_tokenizer
from moezoo_models.evaluation.evaluate import evaluate
from moezoo_models.files import gate, model_files
from moezoo_models.generate import generate

sys.path.insert(0, str(Path(__file__).parent))

from damages import AUTO, OURS, all_refuse, cast, change_config, change_tensors, flip_a_bit, poison


@pytest.mark.parametrize("layers", [None, 1.5, {"a": 1}, "every ²", f"every {'9' * 5000}", [None]])
def test_layers_of_a_rule_of_a_wrong_kind(layers, ours, place):
    config = json.loads((ours / "config.json").read_text())
    change_config(ffn=[config["ffn"][0] | {"layers": layers}])(ours)
    all_refuse(OURS, ours, place, r"ffn\[0\]: layers: ")


@pytest.mark.parametrize("value", [3, "x", []])
def test_options_of_a_layer_of_a_wrong_kind(value, ours, place):
    rule = {"layers": "all", "class_path": "moezoo.SparseMoE", "init_args": {"router": value}}
    change_config(ffn=[rule])(ours)
    all_refuse(OURS, ours, place, "router: .* is not a mapping of options")


def test_sizes_that_overflow_are_one_line(ours, place):
    rule = {"layers": "all", "class_path": "moezoo.DenseFFN", "init_args": {"d_ff": 10**19}}
    change_config(ffn=[rule])(ours)
    all_refuse(OURS, ours, place, r"config\.json: ")


def test_no_table_is_drawn_for_a_size_in_a_file(make, rules, place, monkeypatch):
    hashed = [rules["rule"]("HashLayer", num_experts=2, d_expert=8, vocab_size=61)]
    saved = save_checkpoint(place / "hashed", make(ffn=hashed))
    hashed[0]["init_args"]["vocab_size"] = 1000
    change_config(ffn=hashed)(saved)
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: pytest.fail("drawn"))
    with pytest.raises(InputError, match=r"mlp\.table' has shape \(1, 62\), by config\.json"):
        load_checkpoint(saved)


def test_a_table_names_experts_that_there_are(make, rules, place):
    hashed = [rules["rule"]("HashLayer", num_experts=2, d_expert=8, vocab_size=61)]
    saved = save_checkpoint(place / "hashed", make(ffn=hashed))

    def change(tensors):
        tensors["model.layers.1.mlp.table"][0, 5] = 2

    change_tensors(change)(saved)
    with pytest.raises(InputError, match=r"layers\.1\.mlp: table: it names the experts 0 to 2"):
        load_checkpoint(saved)


def test_both_fields_and_tensors_of_a_tied_head_may_be_there(make, place):
    saved = save_checkpoint(place / "tied", make(tie_word_embeddings=True))

    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change_tensors(repeat)(saved)
    for load in (lambda path: load_checkpoint(path)[0], *AUTO[:1]):
        model = load(saved)
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_flag_is_written_as_the_tensors_are(make, place):
    """Of tensors in the same memory only one is written, so they have to be tied again."""
    model = make()
    model.lm_head.weight = model.model.embed_tokens.weight
    saved = save_checkpoint(place / "tied", model)
    assert json.loads((saved / "config.json").read_text())["tie_word_embeddings"] is True
    assert not model.config.tie_word_embeddings
    loaded, _ = load_checkpoint(saved)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("read", [load_checkpoint, load_any_with_tokenizer])
@pytest.mark.parametrize("kind", ["ours", "llama"])
def test_settings_of_generation_are_written_back_as_they_were(kind, read, request, place):
    """Published ones contradict each other now and then, which transformers only warns of."""
    settings = {"output_hidden_states": True, "temperature": 0.5, "pad_token_id": -1}
    directory = request.getfixturevalue(kind)
    (directory / "generation_config.json").write_text(json.dumps(settings))
    model, _ = read(directory)
    saved = save_checkpoint(place / "again", model)
    written = json.loads((saved / "generation_config.json").read_text())
    assert written.items() >= settings.items()


def test_the_cache_of_the_hub_holds_links(ours, place):
    """Its files are in blobs, and snapshots hold links to them."""
    snapshot = place / "models--a--b" / "snapshots" / "0123"
    blobs = place / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(ours.iterdir())):
        shutil.move(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    load_any_with_tokenizer(snapshot)


def test_a_name_on_the_hub_is_fetched_and_then_read(ours, monkeypatch):
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options))
        return str(ours)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    MoezooForCausalLM.from_pretrained("someone/model", revision="main", local_files_only=True)
    ((name, options),) = asked
    assert name == "someone/model"
    assert (options["revision"], options["local_files_only"]) == ("main", True)
    flip_a_bit(ours)
    with pytest.raises(InputError, match="its checksum is wrong"):
        MoezooForCausalLM.from_pretrained("someone/model")


def test_paths_with_a_nul(place):
    readers = {name: OURS[name] for name in OURS if not name.startswith("inspect")}
    all_refuse(readers, "a\0b", place, "holds a NUL character")


def test_one_tensor_is_read_through_the_gate(ours):
    name = "model.norm.weight"
    assert torch.equal(read_tensor(ours, name), torch.ones(32))
    poison(float("nan"))(ours)
    with pytest.raises(InputError, match="holds NaN or infinity"):
        read_tensor(ours, name)
    cast(torch.int8)(ours)
    with pytest.raises(InputError, match="is I8; cast it to F32"):
        read_tensor(ours, name)


def test_what_the_system_forbids_is_not_called_damaged(ours, monkeypatch):
    def forbidden(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(model_files, "safe_open", forbidden)
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read: permission denied$"):
        load_checkpoint(ours)


def test_mistakes_in_this_code_stay_visible(ours, monkeypatch):
    def mistaken(*args):
        raise AssertionError("a mistake of ours")

    monkeypatch.setattr(gate, "check_heads", mistaken)
    with pytest.raises(AssertionError, match="a mistake of ours"):
        load_checkpoint(ours)


def test_large_files_of_json_are_not_read(ours, monkeypatch):
    monkeypatch.setattr(model_files, "_LARGEST_JSON", 100)
    with pytest.raises(InputError, match=r"config\.json has [\d,]+ bytes, more than any"):
        load_checkpoint(ours)


@pytest.mark.parametrize("value", [1e38, -1e38])
def test_losses_and_logits_that_are_no_numbers_are_refused(value, ours, place):
    change_tensors(lambda tensors: tensors["lm_head.weight"].fill_(value))(ours)
    with pytest.raises(InputError, match="loss is not a finite number"):
        evaluate(ours, place / "text.txt")
    with pytest.raises(InputError, match="logits are not finite"):
        generate(ours, "text", max_new_tokens=2, stream=False)
