"""`moezoo.use_fast_products`: which linear maps it takes, and that nothing else changes."""

import copy
import io

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import moezoo
from moezoo_kernels import product_libraries
from moezoo_kernels.linear import Linear

VOCABULARY = 300


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads))


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=256, n_layer=2, n_head=4, n_positions=128)
    config.attn_pdrop = config.resid_pdrop = config.embd_pdrop = 0.0
    model = GPT2LMHeadModel(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def losses_and_gradients(model):
    tokens = torch.randint(VOCABULARY, (2, 67), generator=torch.Generator().manual_seed(1))
    loss = model(input_ids=tokens, labels=tokens).loss
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return [loss.detach(), *gradients]


@pytest.mark.parametrize(("make", "count"), [(llama, 15), (gpt2, 9)])
def test_a_stock_model_computes_the_same_with_the_same_state(onednn, make, count):
    model = make()
    exact = losses_and_gradients(copy.deepcopy(model).double())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done = moezoo.use_fast_products(model)
    assert len(done.taken) == count
    assert done.left == {}
    found = losses_and_gradients(model)
    assert len(onednn) >= 3 * count - 3
    for a, b in zip(found, exact, strict=True):
        assert (a.double() - b).norm() <= 1e-4 * b.norm()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_classes_are_given_back(onednn, make):
    model = make()
    kinds = [type(module) for module in model.modules()]
    taken = moezoo.use_fast_products(model).taken
    assert [type(module) for module in model.modules()] != kinds
    assert moezoo.use_fast_products(model).taken == ()
    assert moezoo.use_fast_products(model, on=False).taken == taken
    assert [type(module) for module in model.modules()] == kinds
    losses_and_gradients(model)
    assert onednn == []


class Scaled(nn.Linear):
    def forward(self, input):
        return 2.0 * super().forward(input)


def test_maps_with_a_forward_of_their_own_are_left_and_named():
    model = nn.Sequential(nn.Linear(4, 4), Scaled(4, 4), nn.Linear(4, 4), nn.ReLU())
    model[2].forward = lambda input: input
    done = moezoo.use_fast_products(model)
    assert done.taken == ("0",)
    assert done.left == {"1": "Scaled", "2": "Linear with another forward"}
    assert isinstance(model[1], Scaled)


def test_a_model_without_linear_maps_is_refused():
    with pytest.raises(moezoo.InputError, match="model: ReLU has no linear map"):
        moezoo.use_fast_products(nn.ReLU())


def test_hooks_and_copies_stay():
    model, seen = nn.Sequential(nn.Linear(3, 5)), []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    moezoo.use_fast_products(model)
    again = io.BytesIO()
    torch.save(copy.deepcopy(model).state_dict(), again)
    model(torch.randn(2, 3))
    assert seen == [1]
    assert type(copy.deepcopy(model)[0]) is Linear


def test_our_layers_can_have_torchs_class_back():
    layer = moezoo.DenseFFN(16)
    assert {type(part) for part in layer.projections().values()} == {Linear}
    moezoo.use_fast_products(layer, on=False)
    assert {type(part) for part in layer.projections().values()} == {nn.Linear}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_of_peft_wrap_them(onednn):
    peft = pytest.importorskip("peft")
    model = llama().requires_grad_(False)
    moezoo.use_fast_products(model)
    options = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, init_lora_weights=False)
    adapted = peft.get_peft_model(model, options)
    tokens = torch.randint(VOCABULARY, (2, 64))
    loss = adapted(input_ids=tokens, labels=tokens).loss
    learnt = [p for p in adapted.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, learnt)
    assert onednn
    moezoo.use_fast_products(adapted, on=False)
    loss = adapted(input_ids=tokens, labels=tokens).loss
    expected = torch.autograd.grad(loss, learnt)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()
    with torch.no_grad():
        merged = adapted.merge_and_unload()(input_ids=tokens, labels=tokens).loss
    torch.testing.assert_close(merged, loss.detach())


def test_sharded_weights_give_the_same_gradients(onednn, tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(Linear(256, 300), nn.GELU(), Linear(300, 256))
    expected = copy.deepcopy(model)
    x = torch.randn(64, 256)
    expected(x).square().sum().backward()
    alone = list(onednn)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for part in (model[0], model[2], model):
            fully_shard(part, mesh=mesh)
        model(x).square().sum().backward()
        found = [p.grad.full_tensor() for p in model.parameters()]
    finally:
        dist.destroy_process_group()
    assert onednn == [*alone, *alone]
    for a, b in zip(found, expected.parameters(), strict=True):
        assert torch.equal(a, b.grad)


def steps(model, optimizer, numbers):
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        # Another number of rows at each step, as texts of all lengths have.
        x = torch.randn(64 + 7 * number, 256, generator=generator)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_a_resumed_run_has_the_same_bits(onednn, monkeypatch):
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(Linear(256, 300), nn.GELU(), Linear(300, 256))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    whole, optimizer = make()
    steps(whole, optimizer, range(6))
    first, optimizer = make()
    steps(first, optimizer, range(3))
    state = copy.deepcopy((first.state_dict(), optimizer.state_dict()))
    monkeypatch.setattr(product_libraries, "_known", {})
    second, optimizer = make()
    second.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    steps(second, optimizer, range(3, 6))
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
