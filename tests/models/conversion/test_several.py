"""Fine-tunes of one model as the experts of a mixture."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moezoo import InputError
from moezoo.__main__ import main
from moezoo_models.conversion.drift import load_any
from moezoo_models.conversion.upcycle import upcycle
from moezoo_models.text.encoding import encode_text
from moezoo_models.text.tokenizer import load_tokenizer

TARGETS = [
    ("llama", "mixtral"),
    ("llama", "glm4_moe"),
    ("llama", "granitemoe"),
    ("llama", "qwen2_moe"),
    ("llama", "moezoo"),
    ("qwen3", "qwen3_moe"),
]


def tune(directory, target, seed, size=0.1, parts=("",)):
    """Write a copy of a checkpoint whose tensors of these parts are changed a little."""
    target.mkdir()
    for file in directory.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(directory / "model.safetensors")
    torch.manual_seed(seed)
    for name, tensor in tensors.items():
        if any(part in name for part in parts):
            tensor += size * torch.randn_like(tensor)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture
def family(readable, tmp_path):
    """A model and two fine-tunes of it, of which only the blocks differ."""

    def write(name="llama", parts=(".mlp.",)):
        base = readable(name)
        return [base, *(tune(base, tmp_path / f"tuned{i}", i, parts=parts) for i in (1, 2))]

    return write


def tokens(count=24):
    return torch.randint(3, 290, (2, count), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens(), use_cache=False).logits


def by_hand(models, routers, top_k, sigmoid=False):
    """Return the logits of the first model with all blocks mixed, in plain torch.

    Weights are a softmax over the chosen, or the sigmoids of their logits over the sum of those.
    """
    mixed = copy.deepcopy(models[0]).double()
    routers = {layer: router.double() for layer, router in routers.items()}
    for layer, block in enumerate(mixed.model.layers):
        experts = [m.model.layers[layer].mlp.double() for m in models]

        def forward(x, experts=experts, router=routers[layer]):
            scores = F.linear(x, router)
            best = scores.topk(top_k, dim=-1)
            share = best.values.sigmoid() if sigmoid else best.values.softmax(-1)
            share = share / share.sum(-1, keepdim=True)
            weights = torch.zeros_like(scores).scatter(-1, best.indices, share)
            return sum(weights[..., e : e + 1] * expert(x) for e, expert in enumerate(experts))

        block.mlp.forward = forward
    return logits(mixed)


def routers_of(directory):
    found = {}
    for name, parameter in load_any(directory).named_parameters():
        if name.endswith((".mlp.gate.weight", ".block_sparse_moe.router.weight")):
            found[int(name.split(".")[2])] = parameter.detach()
    return found


@pytest.mark.parametrize(("name", "to"), TARGETS)
def test_each_model_is_one_expert(name, to, family, tmp_path):
    sources = family(name)
    done = upcycle([str(each) for each in sources], tmp_path / "out", to=to, router_std=0.5)
    assert not done.exact
    models = [AutoModelForCausalLM.from_pretrained(each).eval() for each in sources]
    sigmoid = to == "glm4_moe"
    expected = by_hand(models, routers_of(tmp_path / "out"), 2, sigmoid)
    found = logits(load_any(tmp_path / "out")).double()
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    # The experts differ enough for their order to show.
    swapped = by_hand([models[0], *models[:0:-1]], routers_of(tmp_path / "out"), 2, sigmoid)
    assert float((found - swapped).abs().max() / expected.abs().max()) > 1e-3


@pytest.mark.parametrize("to", ["mixtral", "glm4_moe", "moezoo"])
@pytest.mark.parametrize("options", [{}, {"granularity": 2, "top_k": 4}, {"router": "zeros"}])
def test_of_one_model_several_times_the_mixture_is_that_model(to, options, readable, tmp_path):
    source = readable()
    done = upcycle([str(source)] * 4, tmp_path / "out", to=to, **options)
    assert done.exact
    assert done.extra["fine_tunes"]["experts"] == 0
    expected, found = logits(load_any(source)), logits(load_any(tmp_path / "out"))
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-6


def test_granularity_cuts_every_model(family, tmp_path):
    sources = family()
    whole = upcycle([str(each) for each in sources], tmp_path / "whole", top_k=2, seed=3)
    upcycle([str(each) for each in sources], tmp_path / "cut", top_k=4, granularity=2, seed=3)
    assert whole.target["parameters"] < 200_000
    expected, found = (logits(load_any(tmp_path / name)) for name in ("whole", "cut"))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def test_what_is_not_kept_is_measured_part_by_part(readable, tmp_path, capsys):
    base = readable()
    tuned = tune(base, tmp_path / "tuned", 1, parts=("self_attn.q_proj", ".mlp."))
    more = tune(base, tmp_path / "more", 2, parts=("model.norm.weight",))
    done = upcycle([str(base), str(tuned), str(more)], tmp_path / "out")
    one, two, three = (load_file(d / "model.safetensors") for d in (base, tuned, more))

    def apart(other, part):
        return max(float((other[n] - one[n]).norm() / one[n].norm()) for n in one if part in n)

    found = done.extra["fine_tunes"]
    assert found["attention"] == pytest.approx(apart(two, "q_proj"), rel=1e-5)
    assert found["norms"] == pytest.approx(apart(three, "model.norm.weight"), rel=1e-5)
    assert found["experts"] == pytest.approx(apart(two, ".mlp."), rel=1e-5)
    assert found["embeddings"] == found["head"] == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("not kept"))
    assert f"attention {found['attention']:.1e}" in line
    # All but the experts is the base's.
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name in one:
        if ".mlp." not in name:
            assert torch.equal(written[name], one[name])


def test_the_base_may_be_none_of_the_experts(family, tmp_path):
    first, second, third = family(parts=("",))
    upcycle([str(second), str(third)], tmp_path / "out", base=str(first), to="mixtral")
    written, base = (load_file(d / "model.safetensors") for d in (tmp_path / "out", first))
    name = "model.layers.1.self_attn.v_proj.weight"
    assert torch.equal(written[name], base[name])
    for expert, source in enumerate((second, third)):
        own = load_file(source / "model.safetensors")["model.layers.2.mlp.down_proj.weight"]
        name = f"model.layers.2.block_sparse_moe.experts.{expert}.w2.weight"
        assert torch.equal(written[name], own)


TEXTS = [
    {"positive": ["def f(x):", "import os"], "negative": ["Once upon a time"]},
    {"positive": ["Once upon a time there was"]},
    {"positive": ["1 + 1 = 2"], "negative": ["import os"]},
]


@pytest.mark.parametrize("kind", ["hidden", "inputs"])
@pytest.mark.parametrize("name", ["llama", "olmo2"])
def test_routers_point_to_the_hidden_states_of_prompts(kind, name, family, tmp_path):
    sources = family(name)
    file = tmp_path / "prompts.yaml"
    file.write_text(yaml.safe_dump({"experts": TEXTS}))
    paths = [str(each) for each in sources]
    upcycle(paths, tmp_path / "out", router=kind, prompts=str(file))
    model = AutoModelForCausalLM.from_pretrained(sources[0]).eval()
    tokenizer = load_tokenizer(sources[0])
    inputs = {}
    for number, block in enumerate(model.model.layers):
        block.mlp.register_forward_pre_hook(
            lambda _, args, number=number: inputs.__setitem__(number, args[0])
        )

    def mean(text, layer):
        ids = torch.tensor([encode_text(tokenizer, text)])
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        return (states[layer] if kind == "hidden" else inputs[layer])[0].mean(0)

    for layer, found in routers_of(tmp_path / "out").items():
        for row, texts in zip(found, TEXTS, strict=True):
            expected = sum(mean(t, layer) for t in texts["positive"]) / len(texts["positive"])
            for text in texts.get("negative", ()):
                expected = expected - mean(text, layer) / len(texts["negative"])
            torch.testing.assert_close(row, F.normalize(expected, dim=0), rtol=1e-4, atol=1e-5)


def test_copies_of_one_model_take_routers_from_prompts_too(readable, tmp_path):
    source, file = readable(), tmp_path / "prompts.yaml"
    file.write_text(yaml.safe_dump({"experts": TEXTS}))
    done = upcycle(source, tmp_path / "out", experts=3, router="hidden", prompts=str(file))
    assert done.exact
    routers = routers_of(tmp_path / "out")
    for router in routers.values():
        torch.testing.assert_close(router.norm(dim=-1), torch.ones(3))
    assert len(routers) == 3


def change(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_models_that_do_not_belong_together_are_refused(readable, family, tmp_path):
    base, one, two = family()
    change(one, rms_norm_eps=1e-3, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with pytest.raises(InputError) as refusal:
        upcycle([str(base), str(one)], tmp_path / "out")
    said = str(refusal.value)
    assert "\n" not in said
    assert said.startswith(f"source: {one} is no fine-tune of {base}: ")
    assert "rms_norm_eps: 0.001, not 1e-06" in said
    assert "rope_parameters: " in said
    text = (two / "tokenizer.json").read_text()
    tokenizer = json.loads(text)
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (two / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match=f"{two} is no fine-tune of .*: tokenizer: they give"):
        upcycle([str(base), str(two)], tmp_path / "out")
    other = readable("qwen3")
    with pytest.raises(InputError, match="model_type: qwen3, not llama; give models of one"):
        upcycle([str(base), str(other)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_width_and_dtype_are_refused(readable, tmp_path):
    base = readable("llama")
    wide = tmp_path / "wide"
    base.rename(tmp_path / "base")
    base = tmp_path / "base"
    readable("llama", intermediate_size=64).rename(wide)
    half = readable("llama", dtype=torch.bfloat16)
    with pytest.raises(InputError, match="intermediate_size: 64, not 48"):
        upcycle([str(base), str(wide)], tmp_path / "out")
    with pytest.raises(InputError, match=r"embed_tokens.weight: .* in BF16, not .* in F32"):
        upcycle([str(base), str(half)], tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 3}, "experts: 3, but each of the 2 models gives one; leave it out"),
        ({"router": "hidden"}, "prompts: is missing; router hidden follows from texts"),
        ({"prompts": "x.yaml"}, "prompts: router random reads none; leave them out"),
        ({"router": "mean"}, "router: 'mean' is not known"),
        ({"router": "hidden", "prompts": "nowhere.yaml"}, "prompts: there is no file 'nowhere.y"),
        ({"to": "qwen3_moe"}, "to: qwen3_moe cannot hold the attention of a llama"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message, readable, tmp_path):
    source = str(readable())
    with pytest.raises(InputError) as refusal:
        upcycle([source, source], tmp_path / "out", **options)
    assert str(refusal.value).startswith(message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"experts": [{"positive": ["a"]}]}, "has 1 experts, and there are 2 models"),
        ({"prompts": []}, "has to hold a list named experts"),
        ({"experts": [{"positive": ["a"]}, {"positiv": ["a"]}]}, r"experts\[1\].positiv: no such"),
        ({"experts": [{"positive": []}, {"positive": ["a"]}]}, r"experts\[0\].positive: is miss"),
        ({"experts": [{"positive": "a"}, {"positive": ["a"]}]}, r"positive: give a list of texts"),
        ({"experts": [{"positive": ["a" * 300]}, {"positive": ["a"]}]}, "has 300 tokens; the mo"),
    ],
)
def test_prompts_of_another_form_are_refused(content, message, readable, tmp_path):
    source, file = str(readable()), tmp_path / "prompts.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=message):
        upcycle([source, source], tmp_path / "out", router="hidden", prompts=str(file))


def test_the_command_takes_several_directories(family, tmp_path, capsys):
    one, two, three = map(str, family())
    out = tmp_path / "out"
    assert main(["upcycle", one, two, "--to", "mixtral", three, "--check=layers", str(out)]) == 0
    assert json.loads((out / "config.json").read_text())["num_local_experts"] == 3
    assert "kept as experts" in capsys.readouterr().out
    # Of two words, the second is the target, which is there already.
    assert main(["upcycle", one, two]) == 2
    assert "target: " in capsys.readouterr().err
    with pytest.raises(InputError, match="layers: there is no layer 9"):
        upcycle([one, two], tmp_path / "refused", layers=[9], to="moezoo")
    assert main(["upcycle", one, two, three, "--router", "hidden", str(tmp_path / "no2")]) == 2
    assert "prompts: is missing" in capsys.readouterr().err


def test_the_drift_of_layers_is_of_the_plan(family, tmp_path):
    sources = [str(each) for each in family()]
    by_layers = upcycle(sources, tmp_path / "layers", check="layers")
    assert by_layers.drift["of"] == "layers"
    assert by_layers.drift["relative"] > 1e-3
    same = upcycle([sources[0]] * 3, tmp_path / "same", check="layers")
    assert same.drift["relative"] < 1e-6
