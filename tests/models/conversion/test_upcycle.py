"""Upcycled checkpoints compute what the dense ones computed, in unmodified transformers too."""

import hashlib
import json
import os
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moezoo import InputError
from moezoo_models.conversion.drift import load_any
from moezoo_models.conversion.upcycle import upcycle

# Every pair that is exact.
HELD = {
    "llama": ("mixtral", "qwen2_moe", "glm4_moe", "granitemoe", "moezoo"),
    "llama_heads": ("mixtral", "glm4_moe", "moezoo"),
    "llama_linear": ("mixtral", "qwen2_moe", "glm4_moe", "granitemoe", "moezoo"),
    "llama_bias": ("granitemoe", "moezoo"),
    "mistral": ("mixtral", "glm4_moe", "granitemoe", "moezoo"),
    "mistral_window": ("mixtral", "moezoo"),
    "qwen2": ("qwen2_moe", "glm4_moe", "moezoo"),
    "qwen2_window": ("qwen2_moe", "moezoo"),
    "qwen3": ("qwen3_moe", "glm4_moe", "moezoo"),
    "olmo2": ("flex_olmo", "moezoo"),
}
PAIRS = [(source, target) for source, targets in HELD.items() for target in targets]
WITH_SHARED = [(s, t) for s, t in PAIRS if t in ("qwen2_moe", "glm4_moe", "moezoo")]


def logits(directory, tokens, dtype=torch.float32):
    with torch.no_grad():
        return load_any(directory).to(dtype)(input_ids=tokens, use_cache=False).logits.float()


def tokens(length=40):
    return torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(1))


def assert_same_logits(source, target):
    # Wider than a sliding window, so that losing it would show.
    expected, found = logits(source, tokens()), logits(target, tokens())
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("to", ["moezoo", "mixtral", "glm4_moe"])
def test_the_length_a_model_was_trained_on_is_kept(to, dense, tmp_path):
    source = dense("llama")
    fields = json.loads((source / "config.json").read_text())
    for length, kept in ((16, 16), (None, None)):
        (source / "config.json").write_text(json.dumps(fields | {"trained_length": length}))
        out = tmp_path / str(length)
        upcycle(source, out, experts=4, top_k=2, to=to)
        assert json.loads((out / "config.json").read_text()).get("trained_length") == kept
        assert getattr(load_any(out).config, "trained_length", None) == kept
    (source / "config.json").write_text(json.dumps(fields | {"trained_length": [16]}))
    with pytest.raises(InputError, match=r"trained_length: \[16\] is not a whole number"):
        upcycle(source, tmp_path / "refused", experts=4, top_k=2, to=to)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(("family", "to"), PAIRS)
def test_copies_compute_the_same(family, to, dense, tmp_path):
    source = dense(family)
    done = upcycle(source, tmp_path / "out", experts=4, top_k=2, to=to)
    assert done.exact
    assert done.drift["relative"] < 2e-6
    assert_same_logits(source, tmp_path / "out")


@pytest.mark.parametrize(("family", "to"), PAIRS)
@pytest.mark.parametrize(("granularity", "top_k"), [(2, 4), (4, 4)])
def test_shards_of_copies_compute_the_same(family, to, granularity, top_k, dense, tmp_path):
    source = dense(family)
    upcycle(source, tmp_path / "out", 4, top_k, granularity, to=to)
    assert_same_logits(source, tmp_path / "out")


@pytest.mark.parametrize(("family", "to"), WITH_SHARED)
def test_a_shared_copy_takes_half_of_the_output(family, to, dense, tmp_path):
    source = dense(family)
    upcycle(source, tmp_path / "out", 4, 4, 2, shared=True, to=to)
    assert_same_logits(source, tmp_path / "out")


@pytest.mark.parametrize("to", ["mixtral", "granitemoe", "glm4_moe", "qwen2_moe"])
def test_one_expert_per_token_is_exact_in_stock_formats(to, dense, tmp_path):
    source = dense("llama")
    upcycle(source, tmp_path / "out", experts=3, top_k=1, to=to)
    assert_same_logits(source, tmp_path / "out")


def test_one_expert_that_can_not_learn_is_refused_in_ours(dense, tmp_path):
    with pytest.raises(InputError, match="top_k: a single normalized weight is always 1"):
        upcycle(dense(), tmp_path / "out", experts=4, top_k=1, to="moezoo")


@pytest.mark.parametrize(
    ("family", "to"), [("llama", "mixtral"), ("qwen2", "qwen2_moe"), ("qwen3", "glm4_moe")]
)
def test_bf16_is_off_by_no_more_than_bf16_itself(family, to, dense, tmp_path):
    source = dense(family, torch.bfloat16)
    upcycle(source, tmp_path / "out", experts=4, top_k=2, to=to)
    expected = logits(source, tokens(), torch.bfloat16)
    found = logits(tmp_path / "out", tokens(), torch.bfloat16)
    rounding = (expected - logits(source, tokens())).abs().max()
    assert (found - expected).abs().max() <= rounding


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_all_of_transformers_kernels_agree(implementation, dense, tmp_path):
    source = dense("llama")
    upcycle(source, tmp_path / "out", experts=4, top_k=2, to="mixtral")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", experts_implementation=implementation
    )
    with torch.no_grad():
        found = model(input_ids=tokens()).logits
    expected = logits(source, tokens())
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize(("family", "to"), [("llama", "mixtral"), ("qwen3", "moezoo")])
def test_generation_is_the_same(family, to, dense, tmp_path):
    source = dense(family)
    upcycle(source, tmp_path / "out", experts=4, top_k=2, to=to)
    prompt = tokens(7)[:1]
    options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
    expected = load_any(source).generate(prompt, **options)
    assert torch.equal(load_any(tmp_path / "out").generate(prompt, **options), expected)


@pytest.mark.parametrize(
    ("family", "to", "layers"),
    [("llama", "qwen2_moe", "every 2"), ("qwen3", "glm4_moe", [1, 2]), ("mistral", "moezoo", 0)],
)
def test_some_layers_can_stay_dense(family, to, layers, dense, tmp_path):
    source = dense(family)
    done = upcycle(source, tmp_path / "out", experts=4, top_k=2, to=to, layers=layers)
    assert_same_logits(source, tmp_path / "out")
    names = list(load_file(tmp_path / "out" / "model.safetensors"))
    mixed = {int(n.split(".")[2]) for n in names if ".gate.weight" in n}
    assert sorted(mixed) == done.target["layers"]


def test_copies_may_start_where_the_paper_starts_them(dense, tmp_path):
    # Cube roots on all three projections, or weights that do not sum to one: not the same function.
    for options in ({"scale": "cbrt"}, {"weighting": "softmax"}):
        done = upcycle(
            dense("qwen3"), tmp_path / "out", 4, 4, 2, to="qwen3_moe", force=True, **options
        )
        assert not done.exact
        assert done.drift["relative"] > 1e-3
    spread = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.0.mlp.experts.7.gate_proj.weight" in spread
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["norm_topk_prob"]


def test_softmax_weights_are_scaled_for_even_routing(dense, tmp_path):
    source = dense("qwen3")
    options = {"to": "qwen3_moe", "weighting": "softmax", "router_std": 2**-14}
    upcycle(source, tmp_path / "out", 4, 4, 2, **options)
    expected, found = logits(source, tokens()), logits(tmp_path / "out", tokens())
    assert (found - expected).abs().max() <= 2e-3 * expected.abs().max()


def test_dropped_neurons_are_the_same_in_all_projections(dense, tmp_path):
    source = dense()
    upcycle(source, tmp_path / "out", experts=4, top_k=2, drop=0.3, to="mixtral")
    old = load_file(source / "model.safetensors")
    new = load_file(tmp_path / "out" / "model.safetensors")
    drawn = []
    for e in range(4):
        start = f"model.layers.1.block_sparse_moe.experts.{e}"
        changed = {
            w: (new[f"{start}.{w}.weight"] != old[f"model.layers.1.mlp.{p}_proj.weight"])
            for w, p in (("w1", "gate"), ("w3", "up"), ("w2", "down"))
        }
        rows = changed["w1"].any(1)
        assert rows.sum() == int(0.3 * 48)
        assert torch.equal(changed["w3"].any(1), rows)
        assert torch.equal(changed["w2"].any(0), rows)
        drawn.append(rows)
    assert not torch.equal(drawn[0], drawn[1])


def test_redrawn_weights_have_the_statistics_of_those_they_replace():
    from moezoo.convert import Expert

    torch.manual_seed(0)
    weight = torch.randn(4000, 50) * 0.3 + 0.7
    redrawn = torch.arange(0, 4000, 2)
    fresh = Expert(torch.arange(4000), redrawn=redrawn, seed=3).cut("gate", weight)[redrawn]
    assert fresh.mean().item() == pytest.approx(0.7, abs=5e-3)
    assert fresh.std().item() == pytest.approx(0.3, rel=1e-2)


def digests(directory):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.iterdir()
        if path.suffix == ".safetensors"
    }


def test_the_same_command_writes_the_same_bytes(dense, tmp_path):
    source = dense()
    options = {"experts": 4, "top_k": 2, "drop": 0.5}
    one = upcycle(source, tmp_path / "one", **options)
    torch.manual_seed(123)
    upcycle(source, tmp_path / "two", **options)
    assert digests(tmp_path / "one") == digests(tmp_path / "two") == one.target["sha256"]
    other = upcycle(source, tmp_path / "three", seed=1, **options)
    assert other.target["sha256"] != one.target["sha256"]


def test_shards_keep_a_block_together_and_their_index_is_right(dense, tmp_path):
    source = dense("llama", max_shard_size="40KB")
    assert (source / "model.safetensors.index.json").is_file()
    upcycle(source, tmp_path / "out", experts=4, top_k=2, max_shard_size="120KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = index["weight_map"]
    assert len(set(files.values())) > 2
    for layer in range(3):
        assert len({f for n, f in files.items() if n.startswith(f"model.layers.{layer}.")}) == 1
    total = 0
    for name in set(files.values()):
        with safe_open(tmp_path / "out" / name, framework="pt") as shard:
            assert set(shard.keys()) == {n for n, f in files.items() if f == name}
            total += sum(shard.get_tensor(n).nbytes for n in shard.keys())  # noqa: SIM118
    assert index["metadata"]["total_size"] == total
    assert_same_logits(source, tmp_path / "out")


def test_tokenizer_and_settings_are_copied_byte_for_byte(dense, tmp_path):
    source = dense()
    files = {
        "tokenizer.json": b'{"a": 1}\r\n',
        "chat_template.jinja": b"{{ x }}",
        "vocab.txt": b"v",
    }
    for name, content in files.items():
        (source / name).write_bytes(content)
    (source / "generation_config.json").write_bytes(b'{ "do_sample":   true }')
    (source / "README.md").write_text("the dense model's")
    (source / "code.py").write_text("raise SystemExit")
    upcycle(source, tmp_path / "out", experts=2, check="layers")
    for name in (*files, "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    readme = (tmp_path / "out" / "README.md").read_text()
    assert readme.startswith("the dense model's\n\n## Changes made by moezoo\n")
    assert not (tmp_path / "out" / "code.py").exists()


def test_the_report_says_what_was_done(dense, tmp_path):
    source = dense()
    done = upcycle(source, tmp_path / "out", experts=4, top_k=2, seed=7)
    report = json.loads((tmp_path / "out" / "moezoo_conversion.json").read_text())
    assert report["method"] == "upcycle"
    assert report["options"]["seed"] == 7
    assert report["source"]["sha256"] == done.source["sha256"]
    parameters = sum(t.numel() for t in load_file(tmp_path / "out" / "model.safetensors").values())
    assert report["target"]["parameters"] == parameters


def change_config(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def drop_a_tensor(directory):
    tensors = load_file(directory / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def add_a_tensor(directory):
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.bias"] = torch.zeros(48)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def poison(directory):
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lie_about_the_header(directory):
    path = directory / "model.safetensors"
    path.write_bytes((1 << 40).to_bytes(8, "little") + path.read_bytes()[8:])


DAMAGE = {
    "mlp_bias": (lambda d: change_config(d, mlp_bias=True), "mlp_bias: no stock mixture"),
    "unknown": (lambda d: change_config(d, model_type="bloom"), "model_type: 'bloom' cannot be"),
    "ours": (
        lambda d: change_config(d, model_type="moezoo"),
        "model_type: 'moezoo' is this library's own; .* first: moezoo export .*llama NEW_DIRECTORY",
    ),
    "mixture": (
        lambda d: change_config(d, model_type="mixtral"),
        "model_type: 'mixtral' is a mixture of experts already; give one of: llama, mistral, ",
    ),
    "quantised": (
        lambda d: change_config(d, quantization_config={"quant_method": "gptq"}),
        "quantization_config: quantised weights",
    ),
    "activation": (lambda d: change_config(d, hidden_act="gelu"), "hidden_act: 'gelu' is not silu"),
    "vocabulary": (lambda d: change_config(d, vocab_size=96), "has shape"),
    "layers": (lambda d: change_config(d, num_hidden_layers=2), "is not a tensor of this model"),
    "missing": (drop_a_tensor, "'model.layers.1.mlp.up_proj.weight' is missing"),
    "bias": (add_a_tensor, "'model.layers.0.mlp.up_proj.bias' is not a tensor"),
    "nan": (poison, "'model.norm.weight' in .* holds NaN or infinity"),
    "truncated": (truncate, "is truncated or damaged"),
    "header": (lie_about_the_header, "is truncated or damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_can_not_be_converted_is_refused_and_leaves_nothing(name, dense, tmp_path):
    damage, message = DAMAGE[name]
    source = dense()
    damage(source)
    with pytest.raises(InputError, match=message) as refusal:
        upcycle(source, tmp_path / "out", experts=4, top_k=2)
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"top_k": 5}, "top_k: 5 is out of range"),
        ("llama", {"granularity": 5}, "granularity: 5 does not divide the block's 48 neurons"),
        ("llama", {"granularity": 2, "top_k": 3}, "top_k: 3 is no multiple of granularity 2"),
        ("llama", {"drop": 1.5}, "drop: "),
        ("llama", {"to": "qwen3_moe"}, "to: qwen3_moe cannot hold the attention of a llama; "),
        ("llama", {"shared": True}, "shared: mixtral has no shared expert; choose --to qwen2_moe"),
        ("llama", {"layers": [9]}, "layers: there is no layer 9"),
        ("llama", {"layers": "every 9"}, "layers: 'every 9' selects none of 3 layers; give all, "),
        ("llama", {"layers": [1], "to": "mixtral"}, "layers: mixtral converts all layers; choose"),
        ("llama", {"max_shard_size": "much"}, "max_shard_size: 'much' is no size"),
        ("llama", {"weighting": "softmax"}, "weighting: mixtral has no 'softmax' weights"),
        ("llama_bias", {}, "attention_bias: mixtral has no bias in o_proj, and dropping it would"),
        ("llama_heads", {"to": "granitemoe"}, "head_dim: granitemoe derives it"),
        ("mistral_window", {"to": "glm4_moe"}, "sliding_window: glm4_moe attends to all positions"),
    ],
)
def test_what_a_format_can_not_hold_is_refused(family, options, message, dense, tmp_path):
    with pytest.raises(InputError) as refusal:
        upcycle(dense(family), tmp_path / "out", **{"experts": 4, **options})
    assert str(refusal.value).startswith(message)
    assert [path.name for path in tmp_path.iterdir()] == [family]


def test_a_directory_with_something_in_it_is_left_alone(dense, tmp_path):
    source, target = dense(), tmp_path / "out"
    target.mkdir()
    (target / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(InputError, match="is not empty; name a new directory, or add --force"):
        upcycle(source, target, experts=4)
    with pytest.raises(InputError, match="holds something that is no checkpoint"):
        upcycle(source, target, experts=4, force=True)
    assert (target / "thesis.txt").read_text() == "irreplaceable"


def test_too_little_room_is_known_before_the_first_byte(dense, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 1000}))
    with pytest.raises(
        InputError, match=r"target: .*out needs [\d.]+ kB, and .* has 1\.0 kB free; make"
    ):
        upcycle(dense(), tmp_path / "out", experts=4)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


KILLED = """
import os, sys
from moezoo_models.conversion import writer
original = writer.write_safetensors
def killed(path, outputs, progress):
    def step(count):
        if "model-00003-" in path.name:
            os.kill(os.getpid(), 9)
        progress(count)
    return original(path, outputs, step)
writer.write_safetensors = killed
from moezoo_models.conversion.upcycle import upcycle
upcycle(sys.argv[1], sys.argv[2], experts=4, top_k=2, drop=0.5, max_shard_size="120KB")
"""


@pytest.mark.slow
def test_after_a_kill_the_same_command_goes_on_to_the_same_bytes(server, dense, tmp_path):
    source, target = dense(), tmp_path / "out"
    options = {"experts": 4, "top_k": 2, "drop": 0.5, "max_shard_size": "120KB"}
    upcycle(source, tmp_path / "whole", **options)
    partial = tmp_path / ".out.partial"
    ended = server.run(source, target, folder=tmp_path, code=KILLED)
    assert ended.code == -signal.SIGKILL, ended.output
    kept = {p.name: p.stat().st_mtime_ns for p in partial.glob("model-*")}
    assert len(kept) >= 2
    assert not target.exists()
    upcycle(source, target, **options)
    assert digests(target) == digests(tmp_path / "whole")
    # What was complete is kept, not written again.
    assert {n: (target / n).stat().st_mtime_ns for n in kept} == kept
    assert not partial.exists()


def test_what_another_command_left_is_not_continued(dense, tmp_path):
    source = dense()
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "manifest.json").write_text('{"identity": "x", "done": {"model.safetensors": "y"}}')
    (partial / "model.safetensors").write_bytes(b"rubbish")
    upcycle(source, tmp_path / "out", experts=4)
    assert_same_logits(source, tmp_path / "out")


MEASURE = """
import sys, threading, time
from moezoo_models.conversion.upcycle import upcycle
def private():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(l.split()[1]) for l in lines if l.startswith("Anonymous:")) * 1024
peak, stop = [0], threading.Event()
def watch():
    while not stop.is_set():
        peak[0] = max(peak[0], private())
        time.sleep(0.005)
# Once for the modules that are imported on the way.
upcycle(sys.argv[3], sys.argv[2] + "-small", experts=2, check="layers")
before = private()
thread = threading.Thread(target=watch)
thread.start()
upcycle(sys.argv[1], sys.argv[2], experts=8, top_k=2, check="layers")
stop.set()
thread.join()
print(peak[0] - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux' /proc")
def test_memory_is_a_few_tensors_not_the_model(server, tmp_path):
    from transformers import LlamaConfig

    from .conftest import SIZES, write_dense

    wide = {"hidden_size": 512, "intermediate_size": 2048}
    small = write_dense(tmp_path / "small", LlamaConfig(**SIZES))
    source = write_dense(tmp_path / "wide", LlamaConfig(**(SIZES | wide)))
    ended = server.run(source, tmp_path / "out", small, folder=tmp_path, code=MEASURE)
    assert ended.code == 0, ended.output
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    tensor = 512 * 2048 * 4
    peak = int(ended.output.splitlines()[-1])
    assert written > 300e6
    assert peak < tensor + 50e6
