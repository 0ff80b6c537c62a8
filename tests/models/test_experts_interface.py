"""experts_implementation="moezoo" computes what transformers' own experts do, in every family."""

import ast
import importlib
import inspect
import sys
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import moezoo
import moezoo_models
from moezoo.stock_experts import forward, gates
from moezoo_kernels.activations import GLUOptions, activate

T, K, E, D, F = 63, 3, 6, 20, 12
MARK = "use_experts_implementation"

# Names under which configurations have sizes; whatever else a class reads keeps its default.
SIZES = {
    "num_experts": E,
    "num_local_experts": E,
    "n_routed_experts": E,
    "moe_num_experts": E,
    "hidden_size": D,
    "moe_hidden_size": D,
    "moe_latent_size": D,
    "intermediate_size": F,
    "moe_intermediate_size": F,
}

UNCOVERED: dict[tuple[str, str], str] = {}
"""Experts that cannot be built here, and why."""

SINGLE = {"BeamExperts", "Inkling2Experts", "MuseSparkExperts", "OpenAIPrivacyFilterExperts"}
"""Classes that compute a part in fp32, whatever they are given."""


@cache
def marked() -> dict[tuple[str, str], ast.ClassDef]:
    """Return every class that the decorator marks in the installed transformers, by module."""
    found = {}
    root = Path(transformers.__file__).parent / "models"
    for path in sorted(root.glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if MARK not in source:
            continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and any(
                MARK in ast.unparse(decorator) for decorator in node.decorator_list
            ):
                found[f"transformers.models.{path.parent.name}.{path.stem}", node.name] = node
    return found


def options_read(node: ast.ClassDef) -> set[str]:
    """Return the options of ``config`` that a class reads."""
    return {
        part.attr
        for part in ast.walk(node)
        if isinstance(part, ast.Attribute)
        and isinstance(part.value, ast.Name)
        and part.value.id == "config"
    }


def configuration(module: str, wanted: set[str]) -> SimpleNamespace:
    """Return the options that a class reads, at the defaults of its family, but small."""
    name = module.replace(".modeling_", ".configuration_")
    library = importlib.import_module(name)
    kinds = [
        kind
        for kind in vars(library).values()
        if inspect.isclass(kind)
        and issubclass(kind, transformers.PreTrainedConfig)
        and kind.__module__ == name
    ]
    for kind in kinds:
        config = kind()
        config.allow_global_per_layer_attribute_access = True
        if all(hasattr(config, option) for option in wanted):
            values = {option: SIZES.get(option, getattr(config, option)) for option in wanted}
            return SimpleNamespace(**values, _experts_implementation="eager")
    raise AssertionError(f"{module}: no configuration has {sorted(wanted)}")


def build(key, dtype=torch.float64) -> nn.Module:
    """Build one family's experts alone, with weights and biases none of which is zero."""
    module, name = key
    kind = getattr(importlib.import_module(module), name)
    # A softcap of None leaves an option out; the others compute more.
    config = configuration(module, options_read(marked()[key]) | extra_options(key))
    with torch.random.fork_rng():
        experts = kind(config)
        torch.manual_seed(1)
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.5)
    return experts.to(dtype)


def extra_options(key) -> set[str]:
    """Return options that a class hands on to parts of it."""
    return {"Inkling2Experts": {"mlp_gate_softcap", "mlp_up_softcap"}}.get(key[1], set())


def routed() -> tuple[torch.Tensor, torch.Tensor]:
    """Return skewed choices: each token's first is expert 0, nobody's is 2; and their weights."""
    generator = torch.Generator().manual_seed(2)
    scores = torch.rand(T, E, generator=generator, dtype=torch.float64)
    scores += torch.linspace(1, 0, E, dtype=torch.float64)
    scores[:, 0] += 5
    scores[:, 2] -= 9
    weights, indices = scores.softmax(-1).topk(K, dim=-1)
    return indices, weights + 0.1


def run(experts, implementation, x, indices, weights):
    """Return the output and all gradients, by what they are of."""
    experts.config._experts_implementation = implementation
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    output = experts(x, indices, weights)
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    named = dict(experts.named_parameters())
    found = torch.autograd.grad(output, [x, weights, *named.values()], grad)
    return dict(zip(["output", "x", "weights", *named], [output.detach(), *found], strict=True))


def error(actual, expected) -> float:
    """Return the largest relative error among tensors: norm by norm."""
    assert actual.keys() == expected.keys()
    worst = 0.0
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, name
        assert torch.isfinite(actual[name]).all(), name
        assert tensor.any(), name
        difference = (actual[name].double() - tensor.double()).norm()
        worst = max(worst, float(difference / tensor.double().norm()))
    return worst


def split(found):
    output = {"output": found["output"]}
    return output, {name: tensor for name, tensor in found.items() if name != "output"}


def tokens(dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(T, D, generator=generator, dtype=torch.float64).to(dtype)


KEYS = [key for key in marked() if key not in UNCOVERED]


def family(name):
    (key,) = (key for key in KEYS if key[1] == name)
    return key


def test_every_marked_class_is_covered_or_listed_with_a_reason():
    assert len(marked()) >= 60  # or the search finds nothing, and nothing is tested
    assert set(KEYS) | set(UNCOVERED) == set(marked())
    assert set(UNCOVERED) <= set(marked())
    assert all(UNCOVERED.values())


@pytest.mark.parametrize("key", KEYS, ids=[name for _, name in KEYS])
def test_output_and_gradients_equal_those_of_eager(key, monkeypatch):
    experts = build(key)
    indices, weights = routed()
    expected = run(experts, "eager", tokens(), indices, weights)
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        if name in expected:
            assert not expected[name][2].any()  # nobody's expert
            assert expected[name][0].any()
    actual = run(experts, "moezoo", tokens(), indices, weights)
    assert error(actual, expected) < (1e-6 if key[1] in SINGLE else 1e-13)

    # Which way it went, and that what is mapped computes the same.
    gate = gates.known_gate(experts)
    assert gate is not None
    # So large that most numbers are beyond a limit, and some not.
    inner = torch.randn(50, 2 * F if gate.gated else F, dtype=torch.float64) * 12
    own = experts._apply_gate if gate.gated else experts.act_fn
    rounding = 1e-6 if key[1] in SINGLE else 1e-14
    torch.testing.assert_close(activate(inner, *gate), own(inner), rtol=rounding, atol=rounding)

    # Inference, many tokens and few, with experts that are not here.
    absent, masked, there = indices.clone(), weights.clone(), indices.clone()
    absent[::4, 1], masked[::4, 1], there[::4, 1] = E, 0, 1
    experts = experts.float()
    with torch.no_grad():
        for rows in (slice(None), slice(0, 1), slice(1, 2), slice(4, 12)):
            x = tokens(torch.float32)[rows]
            experts.config._experts_implementation = "eager"
            wanted = experts(x, there[rows], masked[rows].float())
            experts.config._experts_implementation = "moezoo"
            # The weight of an absent expert says nothing.
            found = experts(x, absent[rows], weights[rows].float())
            assert error({"y": found}, {"y": wanted}) < 5e-7

    expected = run(experts, "eager", tokens(torch.float32), there, masked.float())
    actual = run(experts, "moezoo", tokens(torch.float32), absent, weights.float())
    assert not actual["weights"][::4, 1].any()
    expected["weights"][::4, 1] = 0
    outputs, others = zip(split(actual), split(expected), strict=True)
    assert error(*outputs) < 5e-7
    assert error(*others) < 2e-6


KINDS = ("MixtralExperts", "GptOssExperts", "MuseSparkExperts", "NemotronHExperts", "AriaExperts")
"""One class of each layout."""

BOUNDED = (
    "BeamExperts",
    "DeepseekV4Experts",
    "Glm5NextTextExperts",
    "GptOssExperts",
    "HYV4Experts",
    "Inkling2Experts",
    "MiniMaxM3VLExperts",
    "OpenAIPrivacyFilterExperts",
)
"""Classes with a gate of their own that the kernels have, too."""


@pytest.mark.parametrize("name", sorted({*KINDS, *BOUNDED}))
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_no_further_from_exact_than_theirs(name, autocast):
    experts = build(family(name), torch.float32)
    indices, weights = routed()
    if not autocast:
        experts = experts.bfloat16()
    x, weights = tokens(torch.float32 if autocast else torch.bfloat16), weights.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs = run(experts, "eager", x, indices, weights)
        # Biases in fp32 keep a part of eager in fp32 under autocast, and of batched_mm not.
        batched = run(experts, "batched_mm", x, indices, weights)
        ours = run(experts, "moezoo", x, indices, weights)
        with torch.no_grad():
            few = experts(x[:1], indices[:1], weights[:1])
    assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in theirs.items()}
    assert few.dtype == x.dtype
    exact = run(experts.double(), "eager", x.double(), indices, weights.double())
    for name_, tensor in exact.items():
        errors = [error({"y": each[name_]}, {"y": tensor}) for each in (theirs, batched)]
        assert error({"y": ours[name_]}, {"y": tensor}) < 1.25 * max(errors) + 1e-3, name_
    assert error({"y": few}, {"y": exact["output"][:1]}) < 2e-2


@pytest.mark.parametrize("name", sorted({*KINDS, *BOUNDED}))
def test_a_compiled_graph_is_whole_and_gives_the_same(name):
    experts = build(family(name), torch.float32)
    indices, weights = routed()
    indices[5, 1] = E
    expected = run(experts, "moezoo", tokens(torch.float32), indices, weights.float())
    torch._dynamo.reset()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    compiled.config = experts.config
    x = tokens(torch.float32).requires_grad_()
    output = compiled(x, indices, weights.float())
    assert error({"y": output.detach()}, {"y": expected["output"]}) < 1e-6
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).float()
    found = torch.autograd.grad(output, [x, experts.down_proj], grad)
    assert error({"x": found[0]}, {"x": expected["x"]}) < 2e-6
    assert error({"w": found[1]}, {"w": expected["down_proj"]}) < 2e-6


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("rows", [1, T])
def test_torch_func_has_the_derivatives_of_backward(name, rows):
    experts = build(family(name))
    indices, weights = (part[:rows] for part in routed())
    experts.config._experts_implementation = "moezoo"
    x, parameters = tokens()[:rows], dict(experts.named_parameters())
    values = {key: parameter.detach() for key, parameter in parameters.items()}

    def loss(x, weights, parameters):
        return torch.func.functional_call(experts, parameters, (x, indices, weights)).sin().sum()

    found = torch.func.grad(loss, argnums=(0, 1, 2))(x, weights, values)
    of_x, of_weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    loss(of_x, of_weights, parameters).backward()
    gradients = {key: parameter.grad for key, parameter in parameters.items()}
    expected = {"x": of_x.grad, "weights": of_weights.grad, **gradients}
    assert error({"x": found[0], "weights": found[1], **found[2]}, expected) < 1e-7
    _, tangent = torch.func.jvp(lambda x: loss(x, weights, values), (x,), (x,))
    torch.testing.assert_close(tangent, (of_x.grad * x).sum(), rtol=1e-6, atol=0)
    with torch.no_grad():
        both = torch.vmap(lambda x: experts(x, indices, weights))(torch.stack([x, -x]))
        for one, of_one in zip((x, -x), both, strict=True):
            assert error({"y": of_one}, {"y": experts(one, indices, weights)}) < 1e-6


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same(name, reentrant):
    experts = build(family(name))
    indices, weights = routed()
    expected = run(experts, "moezoo", tokens(), indices, weights)
    x = tokens().requires_grad_()
    call = partial(torch.utils.checkpoint.checkpoint, experts, use_reentrant=reentrant)
    output = call(x, indices, weights)
    generator = torch.Generator().manual_seed(3)
    output.backward(torch.randn(output.shape, generator=generator, dtype=torch.float64))
    assert torch.equal(x.grad, expected["x"])
    assert torch.equal(experts.down_proj.grad, expected["down_proj"])


def saved_bytes(experts, implementation):
    """Count what autograd keeps for the backward, but parameters and inputs."""
    experts.config._experts_implementation = implementation
    indices, weights = routed()
    x, weights = tokens(torch.float32).requires_grad_(), weights.float().requires_grad_()
    own = {t.untyped_storage().data_ptr() for t in (x, weights, indices, *experts.parameters())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        experts(x, indices, weights)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)


@pytest.mark.parametrize("name", KINDS)
def test_half_as_much_is_saved_for_the_backward(name):
    experts = build(family(name), torch.float32)
    ours = saved_bytes(experts, "moezoo")
    assert ours > 0
    assert ours <= 0.5 * saved_bytes(experts, "grouped_mm")
    assert ours <= 0.5 * saved_bytes(experts, "eager")


@pytest.mark.parametrize("name", ["MixtralExperts", *BOUNDED])
def test_a_token_goes_straight_to_the_kernel(name, monkeypatch):
    calls = []
    direct = forward.grouped_mlp_directly
    monkeypatch.setattr(
        forward, "grouped_mlp_directly", lambda *a, **o: (calls.append(1), direct(*a, **o))[1]
    )
    experts = build(family(name), torch.float32)
    experts.config._experts_implementation = "moezoo"
    indices, weights = routed()
    with torch.no_grad():
        experts(tokens(torch.float32)[:1], indices[:1], weights[:1].float())
    assert calls == [1]
    experts(tokens(torch.float32)[:1], indices[:1], weights[:1].float())
    assert calls == [1]


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


@pytest.mark.parametrize("name", sorted(set(ACT2FN)))
def test_activations_are_known_by_what_computes_them(name):
    function = ACT2FN[name]
    known = gates.known_activation(function)
    if known is None:
        assert name not in ACTIVATIONS
        return
    assert ACTIVATIONS.get(name) == known
    x = torch.linspace(-6, 6, 50, dtype=torch.float64)
    torch.testing.assert_close(activate(x, known, False), function(x), rtol=1e-14, atol=1e-14)


def changed_experts(change):
    """Return experts whose activation is not what its class says, or whose gate is another."""
    experts = build(family("MixtralExperts"))

    def double(gate_up):
        return 2 * gate_up[..., :F] + gate_up[..., F:]

    if change == "a gate of its own":
        experts._apply_gate = double
    elif change == "a class of its own":
        experts.__class__ = type("Mine", (type(experts),), {"_apply_gate": lambda s, x: double(x)})
    elif change == "another activation":
        del experts.act_fn
        experts.act_fn = torch.nn.functional.softplus
    elif change == "an activation of parameters":
        experts.act_fn = nn.PReLU().double()
    elif change == "a hook":
        experts.act_fn.register_forward_hook(lambda module, args, output: output.square())
    elif change == "a forward of its own":
        experts.act_fn.forward = torch.sin
    elif change == "a subclass":
        experts.act_fn = type("Mine", (nn.SiLU,), {"forward": lambda s, x: x.cos()})()
    return experts


HOOKS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_an_activation_are_called(kind):
    experts, seen = build(family("MixtralExperts")), []
    getattr(experts.act_fn, f"register_{kind}")(lambda *_: seen.append(kind))
    assert gates.known_gate(experts) is None
    indices, weights = routed()
    run(experts, "moezoo", tokens(), indices, weights)
    assert seen


@pytest.mark.parametrize(
    "change",
    [
        "a gate of its own",
        "a class of its own",
        "another activation",
        "an activation of parameters",
        "a hook",
        "a forward of its own",
        "a subclass",
    ],
)
def test_what_is_not_listed_is_run_as_it_is(change):
    experts = changed_experts(change)
    assert gates.known_gate(experts) is None
    indices, weights = routed()
    # Its eager forward asks neither a gate of the class nor one of the instance.
    implementation = "batched_mm" if "of its own" in change else "eager"
    expected = run(experts, implementation, tokens(), indices, weights)
    assert error(run(experts, "moezoo", tokens(), indices, weights), expected) < 1e-13


def squared(module, args, output):
    return output.square()


OTHER_NUMBERS = {
    "another factor": ("GptOssExperts", lambda e: setattr(e, "alpha", 1.5)),
    "another factor, in halves": ("MiniMaxM3VLExperts", lambda e: setattr(e, "swiglu_alpha", 2)),
    "a limit of infinity": ("DeepseekV4Experts", lambda e: setattr(e, "limit", float("inf"))),
    "a limit in a tensor": ("HYV4Experts", lambda e: setattr(e, "swiglu_limit", torch.tensor(2.0))),
    "another activation": ("DeepseekV4Experts", lambda e: setattr(e, "act_fn", nn.Softplus())),
    "another unit": ("Inkling2Experts", lambda e: setattr(e, "act_fn", nn.Bilinear(F, F, F))),
    "another part": ("Inkling2Experts", lambda e: setattr(e.act_fn, "up_softcap", nn.Tanh())),
    "a cap in a tensor": (
        "Inkling2Experts",
        lambda e: setattr(e.act_fn.up_softcap, "softcap", torch.tensor(3.0)),
    ),
    "a hook on a part": (
        "Inkling2Experts",
        lambda e: e.act_fn.gate_softcap.register_forward_hook(squared),
    ),
}


@pytest.mark.parametrize("change", sorted(OTHER_NUMBERS))
def test_a_gate_of_numbers_that_the_kernels_have_not_is_run_as_it_is(change):
    name, apply = OTHER_NUMBERS[change]
    experts = build(family(name), torch.float32)
    assert gates.known_gate(experts) is not None
    apply(experts)
    experts = experts.float()
    assert gates.known_gate(experts) is None
    indices, weights = routed()
    expected = run(experts, "eager", tokens(torch.float32), indices, weights.float())
    found = run(experts, "moezoo", tokens(torch.float32), indices, weights.float())
    assert error(found, expected) < 2e-6


@pytest.mark.parametrize(
    ("name", "change", "numbers"),
    [
        ("GptOssExperts", {"limit": 2.5}, {"limit": 2.5, "up_shift": 1.0}),
        ("GptOssExperts", {"alpha": 1.0, "limit": 3}, {"limit": 3, "up_shift": 1.0}),
        ("MiniMaxM3VLExperts", {"swiglu_limit": 1.5}, {"limit": 1.5, "up_shift": 1.0}),
        ("DeepseekV4Experts", {"limit": 0.5}, {"limit": 0.5}),
        ("DeepseekV4Experts", {"limit": 0.5, "act_fn": nn.GELU()}, {"limit": 0.5}),
        ("HYV4Experts", {"swiglu_limit": 4}, {"limit": 4}),
    ],
)
def test_numbers_are_those_of_the_instance(name, change, numbers):
    experts = build(family(name))
    for option, value in change.items():
        setattr(experts, option, value)
    gate = gates.known_gate(experts)
    assert gate.glu == GLUOptions(**numbers)
    assert gate.interleaved == (name == "GptOssExperts")
    indices, weights = routed()
    expected = run(experts, "eager", tokens(), indices, weights)
    assert error(run(experts, "moezoo", tokens(), indices, weights), expected) < 1e-13


def test_the_import_registers_it_and_so_does_the_function():
    registered = ALL_EXPERTS_FUNCTIONS._global_mapping
    for register in (partial(importlib.reload, moezoo_models), moezoo.register_experts):
        del registered["moezoo"]
        register()
        register()
        assert ALL_EXPERTS_FUNCTIONS["moezoo"] is forward.experts_forward


def test_without_the_interface_it_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    with pytest.raises(moezoo.InputError, match=r"pip install 'transformers>=5.23,<6'"):
        moezoo.register_experts()


SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MODELS = {
    "Mixtral": {"intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2},
    "Qwen3Moe": {"moe_intermediate_size": 16, "num_experts": 16, "num_experts_per_tok": 4},
    "Glm4Moe": {
        "intermediate_size": 24,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "GptOss": {"intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2},
}


def small_model(name):
    kind = getattr(transformers, f"{name}ForCausalLM")
    config = getattr(transformers, f"{name}Config")(**SMALL, **MODELS[name])
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture
def quiet_transformers():
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_models_take_it_by_either_way(name, tmp_path, quiet_transformers):
    model = small_model(name)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, experts_implementation="moezoo").eval()
    assert loaded.config._experts_implementation == "moezoo"
    ids = torch.randint(61, (2, 17))
    found = {}
    for implementation in ("eager", "moezoo"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        output = model(input_ids=ids, labels=ids, use_cache=False)
        output.loss.backward()
        gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            written = model.generate(ids, max_new_tokens=12, do_sample=False)
        found[implementation] = (output.logits.detach(), gradients, written)
    (theirs, of_theirs, reply), (ours, of_ours, own_reply) = found["eager"], found["moezoo"]
    assert error({"y": ours}, {"y": theirs}) < 1e-6
    assert error(of_ours, of_theirs) < 5e-6
    assert torch.equal(own_reply, reply)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids, use_cache=False).logits, ours)


def test_a_whole_model_compiles_into_one_graph():
    model = small_model("Mixtral")
    model.set_experts_implementation("moezoo")
    ids = torch.randint(61, (2, 17))
    expected = model(input_ids=ids, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(input_ids=ids, use_cache=False).logits
    assert error({"y": found.detach()}, {"y": expected.detach()}) < 1e-6
    found.sum().backward()
    assert model.model.layers[0].mlp.experts.down_proj.grad.any()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_of_stacked_weights_are_trained(quiet_transformers):
    peft = pytest.importorskip("peft")
    model = small_model("Mixtral")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, target_parameters=names, target_modules=[], lora_dropout=0.0)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(61, (2, 17))
    found = {}
    for implementation in ("eager", "moezoo"):
        model.set_experts_implementation(implementation)
        adapted.zero_grad()
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found[implementation] = {
            name: parameter.grad.clone()
            for name, parameter in adapted.named_parameters()
            if parameter.grad is not None
        }
    assert len(found["eager"]) == 2 * 2 * 2
    assert error(found["moezoo"], found["eager"]) < 5e-6
