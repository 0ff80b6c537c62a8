"""The selection bias keeps its bits where everything else is rounded: 238 values stay 238."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from moezoo_models import MoezooForCausalLM
from moezoo_models.checkpoints.directory import load_checkpoint, save_checkpoint
from moezoo_models.checkpoints.stock import load_as_it_is
from moezoo_models.model.config import MoezooConfig

VALUES = torch.cat([6.0 + 0.0007 * torch.arange(238.0), torch.full((18,), 6.0)])
DTYPES = ("float32", "bfloat16", "float16")


def model() -> MoezooForCausalLM:
    torch.manual_seed(0)
    mixture = {
        "num_experts": 256,
        "top_k": 4,
        "d_expert": 4,
        "router": {"score": "sigmoid", "selection_bias": True},
    }
    rule = {"layers": "all", "class_path": "moezoo.SparseMoE", "init_args": mixture}
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = MoezooForCausalLM(MoezooConfig(**sizes, ffn=[rule]))
    for layer in made.model.layers:
        layer.mlp.gate.selection_bias.copy_(VALUES)
    return made


def bias_of(made: MoezooForCausalLM) -> torch.Tensor:
    return made.model.layers[0].mlp.gate.selection_bias


def assert_whole(bias: torch.Tensor) -> None:
    assert bias.dtype == torch.float32
    assert torch.equal(bias.cpu(), VALUES)
    assert len(bias.unique()) == 238


def test_bf16_has_room_for_few_of_the_values():
    assert len(VALUES.unique()) == 238
    assert len(VALUES.bfloat16().unique()) < 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_no_cast_rounds_it(dtype):
    for cast in (
        lambda m: m.to(dtype),
        lambda m: m.to("cpu", dtype),
        lambda m: m.bfloat16().half(),
        lambda m: m.half().float(),
    ):
        assert_whole(bias_of(cast(model())))


@pytest.mark.parametrize("loaded", [None, "auto", *DTYPES])
@pytest.mark.parametrize("saved", DTYPES)
def test_saving_and_loading_keep_it(saved, loaded, tmp_path):
    made = model().to(getattr(torch, saved))
    save_checkpoint(tmp_path / "model", made)
    (file,) = (tmp_path / "model").glob("*.safetensors")
    tensors = load_file(file)
    assert_whole(tensors["model.layers.0.mlp.gate.selection_bias"])
    assert tensors["model.layers.0.mlp.gate.weight"].dtype == getattr(torch, saved)
    assert_whole(bias_of(load_checkpoint(tmp_path / "model", dtype=loaded)[0]))


def test_a_state_dict_keeps_it():
    other = model().bfloat16()
    bias_of(other).zero_()
    other.load_state_dict(model().state_dict())
    assert_whole(bias_of(other))
    assert_whole(bias_of(copy.deepcopy(other)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_widens_what_a_state_dict_assigned_in_16_bits(dtype):
    made = model()
    narrow = {name: tensor.to(dtype) for name, tensor in made.state_dict().items()}
    made.load_state_dict(narrow, assign=True)
    layer = made.model.layers[0].mlp
    layer.observe({"expert_counts": torch.arange(256)})
    layer.step()
    moved = VALUES.to(dtype).float() + 1e-3 * torch.where(torch.arange(256) < 127.5, 1.0, -1.0)
    assert bias_of(made).dtype == torch.float32
    assert torch.equal(bias_of(made), moved)


def test_autocast_chooses_by_the_whole_bias():
    layer = model().model.layers[0].mlp.eval()
    with torch.no_grad():
        layer.gate.weight.zero_()  # the bias alone chooses
        with torch.autocast("cpu", dtype=torch.bfloat16):
            chosen = layer.route(torch.randn(3, 32)).indices
    assert chosen.sort().values.tolist() == [[234, 235, 236, 237]] * 3


@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp2_in_mixed_precision_keeps_it(reshard, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        made = model()
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        mesh = init_device_mesh("cpu", (1,))
        for block in made.model.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
        fully_shard(made, mesh=mesh, mp_policy=policy)
        made(input_ids=torch.arange(6).unsqueeze(0)).logits.sum().backward()
        assert_whole(bias_of(made))
        assert_whole(made.state_dict()["model.layers.0.mlp.gate.selection_bias"])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("loaded", [None, *DTYPES])
def test_a_stock_mixture_keeps_its_correction_bias(loaded, tmp_path: Path):
    config = Glm4MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=4,
        first_k_dense_replace=1,
    )
    made = Glm4MoeForCausalLM(config).bfloat16()
    gate = made.model.layers[1].mlp.gate
    gate.e_score_correction_bias = VALUES.clone()
    save_checkpoint(tmp_path / "stock", made)
    again, _ = load_as_it_is(tmp_path / "stock", dtype=loaded)
    assert_whole(again.model.layers[1].mlp.gate.e_score_correction_bias)
