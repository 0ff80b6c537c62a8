"""Blocks with a ReLU are decoded without what zeros would multiply: the same texts, exactly."""

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList

from moezoo_kernels import native
from moezoo_models.decoding.decoder import Decoder
from moezoo_models.decoding.loop import continue_ids
from moezoo_models.generate import own_settings

BLOCKS = {
    "drelu": {"activation": "relu", "activation_up": "relu", "bias": True},
    "drelu_of_silu": {"activation": "silu", "activation_up": "relu"},
    "l1_reglu": {"activation": "relu", "l1": 1e-4},
    "reglu": {"activation": "relu", "glu": {"limit": 0.4, "up_shift": 0.3}},
    "mlp": {"activation": "relu2", "gated": False, "bias": True},
}
NEW = 20


@pytest.fixture(autouse=True)
def _kernels():
    if reason := native.unusable(torch.device("cpu"), torch.float32):
        pytest.skip(f"C++ kernels: {reason}")


@pytest.fixture
def build(make, rules):
    """Build a model whose next tokens differ enough, and of whose neurons some never answer."""

    def built(name, dtype=torch.float32, **fields):
        model = make(ffn=[rules["rule"]("DenseFFN", d_ff=40, **BLOCKS[name])], **fields)
        with torch.no_grad():
            model.lm_head.weight.mul_(20)
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.3)
        return model.to(dtype).eval()

    return built


def prompts(batch):
    ids = torch.randint(61, (batch, 7), generator=torch.Generator().manual_seed(2))
    return ids, torch.ones_like(ids)


def kernel_of(block):
    return block.feed._function.__name__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_steps_are_the_forward_pass(build, name, dtype):
    model = build(name, dtype)
    for batch in (1, 3):
        ids, mask = prompts(batch)
        decoder = Decoder(model, ids, mask, NEW)
        sparse = batch == 1 or name in ("drelu", "drelu_of_silu", "l1_reglu")
        kernel = "moezoo_selective_step" if sparse else "moezoo_dense_step"
        assert {kernel_of(block) for block in decoder._blocks} == {kernel}
        following = torch.randint(61, (batch, 9), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            found = [decoder.prefill(), *(decoder.step(tokens) for tokens in following.t())]
            whole = model(torch.cat([ids, following], 1), use_cache=False).logits
        expected = whole[:, ids.shape[1] - 1 :].float()
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype] * expected.abs().max()
        assert (torch.stack(found, 1).float() - expected).abs().max() <= tolerance


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["drelu", "l1_reglu"])
def test_texts_are_those_of_generate(build, name, batch):
    model = build(name, parallel="one_norm" if batch == 3 else "none")
    ids, mask = prompts(batch)
    config = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=[60], pad_token_id=60
    )
    ours = continue_ids(model, ids, mask, config, processors=LogitsProcessorList())
    with own_settings(model):
        theirs = model.generate(ids, attention_mask=mask, generation_config=config)
    assert torch.equal(ours, theirs)


def test_rows_of_silent_neurons_are_not_read_and_no_weight_moves(build):
    model = build("drelu")
    silent = torch.arange(0, 40, 3)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate_proj.bias[silent] = -100.0
    before = {name: tensor.stride() for name, tensor in model.named_parameters()}
    ids, mask = prompts(1)
    with torch.no_grad():
        expected = Decoder(model, ids, mask, NEW)
        decoder = Decoder(model, ids, mask, NEW)
        expected.prefill(), decoder.prefill()
        logits = expected.step(ids[:, 0])
        for block in model.model.layers:
            block.mlp.up_proj.weight[silent] = torch.nan
        assert torch.equal(decoder.step(ids[:, 0]), logits)
    assert {name: tensor.stride() for name, tensor in model.named_parameters()} == before


def test_a_few_tokens_are_not_worth_a_copy(build):
    ids, mask = prompts(1)
    blocks = Decoder(build("drelu"), ids, mask, 4)._blocks
    assert {kernel_of(block) for block in blocks} == {"moezoo_dense_step"}
