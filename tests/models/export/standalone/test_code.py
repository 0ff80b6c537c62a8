"""The code that is written for a model, run in this process: every method of the zoo."""

import ast
import importlib
import sys
import types

import pytest
import torch

import moezoo
from moezoo import InputError
from moezoo_models.export.standalone.assemble import _SUBSTITUTES
from moezoo_models.export.standalone.export import code_of
from moezoo_models.model.config import MoezooConfig

METHODS = {method.name: method for method in moezoo.zoo()}
CAUSAL = [name for name in METHODS if name != "expert_choice"]
TOLERANCE = 1e-9
"""In fp64, so that no token is routed otherwise for rounding."""


def ffn(*names):
    """Put methods, as small as they go, behind a dense block."""
    rules = [{"layers": "all", "class_path": "moezoo.DenseFFN", "init_args": {"d_ff": 48}}]
    for number, name in enumerate(names, 1):
        layer = METHODS[name].build(32).config()
        layer["init_args"].pop("d_model")
        rules.append({"layers": number, **layer})
    return {"num_hidden_layers": len(rules), "ffn": rules}


@pytest.fixture
def run():
    """Return a function that runs code as a module of its own name."""
    names = []

    def run_code(code, name):
        names.append(f"standalone_{name}")
        module = types.ModuleType(names[-1])
        sys.modules[names[-1]] = module
        exec(compile(code, f"{name}.py", "exec"), vars(module))
        return module

    yield run_code
    for name in names:
        sys.modules.pop(name)


def imports_of(code):
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(node.module.partition(".")[0])
    return found


def skewed(model):
    """Leave no weight at zero, where a mistake in its use would not be seen."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.any() and "count" not in name:
            torch.nn.init.normal_(tensor, std=0.1)
    return model.eval()


@pytest.mark.parametrize("names", [CAUSAL, ["expert_choice"]], ids=["causal", "expert_choice"])
def test_every_method_computes_the_same(names, make, ids, run):
    fields = ffn(*names) | {"allow_non_causal": names is not CAUSAL}
    model = skewed(make(**fields).double())
    code = code_of(model.config)
    libraries = {"numpy", "torch", "transformers"}  # the first is needed by the last
    assert imports_of(code) <= {*libraries, *sys.stdlib_module_names} - {"ctypes"}
    assert "# From moezoo_kernels/backends.py" not in code
    module = run(code, names[0])
    other = module.MoezooForCausalLM(module.MoezooConfig.from_dict(model.config.to_dict())).double()
    other.load_state_dict(model.state_dict())
    other.eval()
    assert not [part for part in other.modules() if type(part).__module__.startswith("moezoo")]
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        ours, theirs = (m(ids, attention_mask=mask, labels=ids) for m in (model, other))
    assert ours.logits.std() > 0.1
    assert (ours.logits - theirs.logits)[mask.bool()].abs().max() <= TOLERANCE
    assert torch.allclose(ours.loss, theirs.loss)
    assert ours.aux_losses.keys() == theirs.aux_losses.keys()
    if names is CAUSAL:
        said = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(ids, **said), other.generate(ids, **said))


def test_memories_beside_blocks_compute_the_same(make, ids, run):
    memory = [{"layers": [0, 2], "class_path": "moezoo.Engram", "init_args": {"num_rows": 40}}]
    memory[0]["init_args"] |= {"sparse": True, "offload": True}
    model = skewed(make(memory=memory).double())
    module = run(code_of(model.config), "memories")
    other = module.MoezooForCausalLM(module.MoezooConfig.from_dict(model.config.to_dict())).double()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        ours, theirs = (m.eval()(ids).logits for m in (model, other))
    assert (ours - theirs).abs().max() <= TOLERANCE
    said = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **said), other.generate(ids, **said))


def test_only_what_is_used_is_written():
    dense = code_of(MoezooConfig(num_hidden_layers=1))
    rule = {"layers": "all", "class_path": "moezoo.SparseMoE"}
    sparse = code_of(MoezooConfig(num_hidden_layers=1, ffn=[rule]))
    assert "class DenseFFN" in dense
    assert "class SparseMoE" not in dense
    assert "class SparseMoE" in sparse
    assert "class PEER" not in sparse
    for code in (dense, sparse):
        assert "Licensed under the Apache License, Version 2.0" in code
        assert "def cost(" not in code
        assert "custom_op" not in code
        assert "TokenTable" not in code


def test_layers_of_others_are_refused(make):
    config = make(ffn=[{"layers": "all", "class_path": "moezoo.LooksAhead"}], allow_non_causal=True)
    with pytest.raises(InputError, match=r"with_code: LooksAhead is defined in .*conftest"):
        code_of(config.config)


def test_what_is_replaced_is_there():
    for module, name in (*_SUBSTITUTES, *_SUBSTITUTES.values()):
        assert hasattr(importlib.import_module(module), name), (module, name)
