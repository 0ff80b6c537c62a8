"""What test_parallel.py runs in two processes: layers whose experts these share."""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from moezoo import (
    L3,
    PEER,
    STEM,
    BalanceOptions,
    CarvedMoE,
    Engram,
    ExpertNormOptions,
    FeedForward,
    GLUOptions,
    HashLayer,
    InputError,
    MemoryPlus,
    MoLE,
    ProductKeyMemory,
    SigmaMoE,
    SparseMoE,
)
from moezoo.experts.row_shares import share_of
from moezoo.parallel import shard_experts, whole
from moezoo.routing import LogitOptions, RouterOptions, WeightOptions

WIDTH, VOCABULARY = 12, 30
LAYERS = {
    "mixture": partial(SparseMoE, num_experts=4, top_k=2, d_expert=8, num_shared_experts=1),
    "biases": partial(SparseMoE, num_experts=6, top_k=3, d_expert=5, gated=False, bias=True),
    "expert choice": partial(
        SparseMoE, num_experts=4, d_expert=8, router=RouterOptions(choice="expert", normalize=False)
    ),
    "weighed inputs": partial(
        SparseMoE,
        num_experts=4,
        top_k=2,
        router=RouterOptions(
            score="sigmoid", normalize=False, weights=WeightOptions(apply_to="input")
        ),
    ),
    "weighed shared": partial(
        SparseMoE,
        num_experts=4,
        top_k=2,
        num_shared_experts=2,
        router=RouterOptions(
            score="sigmoid",
            logits=LogitOptions(norm=True),
            weights=WeightOptions(with_shared=True, learned_scale=True, expert_scale=True),
        ),
    ),
    "norms": partial(
        SparseMoE,
        num_experts=4,
        top_k=2,
        d_expert=8,
        d_latent=7,
        expert_norms=ExpertNormOptions(input=True, output=True),
    ),
    "thresholds": partial(
        SparseMoE,
        num_experts=4,
        d_expert=8,
        router=RouterOptions(choice="threshold", score="sigmoid", normalize=False),
    ),
    "relu": partial(
        SparseMoE,
        num_experts=4,
        d_expert=8,
        router=RouterOptions(score="relu", normalize=False),
        balance=BalanceOptions(load_balancing=0.0),
    ),
    "rounding": partial(
        SparseMoE, num_experts=4, top_k=2, d_expert=8, router=RouterOptions(rounding=2)
    ),
    "rows in turn": partial(SparseMoE, num_experts=4, d_expert=8, bias=True, interleaved=True),
    "latent": partial(SparseMoE, num_experts=4, top_k=2, d_expert=8, d_latent=7),
    "identity": partial(
        SparseMoE,
        num_experts=4,
        num_identity_experts=3,
        top_k=4,
        d_expert=8,
        glu=GLUOptions(limit=0.5, up_shift=1.0),
        router=RouterOptions(normalize=False, scale=6.0, selection_bias=True),
    ),
    "sigma": partial(SigmaMoE, num_experts=4),
    "hash": partial(HashLayer, num_experts=4, vocab_size=VOCABULARY),
    "multi hash": partial(HashLayer, num_experts=4, vocab_size=VOCABULARY, num_hashes=2),
    "weighed hash": partial(
        HashLayer, num_experts=4, vocab_size=VOCABULARY, top_k=2, weights="learned"
    ),
    "token rows": partial(STEM, d_ff=7, vocab_size=VOCABULARY + 1),
    "sparse token rows": partial(STEM, d_ff=7, vocab_size=VOCABULARY + 1, sparse=True),
    "n-grams": partial(
        Engram, d_ff=6, num_heads=2, num_rows=20, d_memory=16, vocab_size=VOCABULARY
    ),
    "own rows": partial(L3, vocab_size=VOCABULARY, max_rows=5, d_up=6),
    "keys and values": partial(L3, vocab_size=VOCABULARY, max_rows=3, d_value=6),
    "sparse keys and values": partial(
        L3, vocab_size=VOCABULARY, max_rows=3, num_rows=71, d_value=5, sparse=True
    ),
    "lookup experts": partial(MoLE, num_experts=4, d_expert=6, vocab_size=VOCABULARY),
    "folded experts": partial(MoLE, num_experts=4, vocab_size=VOCABULARY, folded=True),
    "sparse folded experts": partial(
        MoLE, num_experts=3, vocab_size=VOCABULARY, folded=True, sparse=True
    ),
    "carved": partial(CarvedMoE, num_experts=4, top_k=2),
    "peer": partial(PEER, num_experts=64, top_k=4),
    "gated peer": partial(PEER, num_experts=64, top_k=4, gated=True),
    "memory": partial(ProductKeyMemory, num_keys=8, top_k=4),
    "memory plus": partial(MemoryPlus, num_keys=8, top_k=4),
}
# Tokens of the two ranks, and whether all are the same token, which some experts never see.
SIZES = {"uneven": (7, 4, False), "none on one": (6, 0, False), "one expert": (5, 3, True)}
Outcome = dict[str, torch.Tensor]


def build(name: str) -> FeedForward:
    """Build a layer, the same every time."""
    torch.manual_seed(0)
    layer = LAYERS[name](WIDTH).double().train(name == "rounding")
    with torch.no_grad():
        for key, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            if key.endswith("norm.weight"):
                tensor.normal_()
            elif key.endswith("threshold"):
                tensor.fill_(0.5)
    return layer


def inputs(sizes: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return all tokens, their ids, and the gradient of what they become."""
    first, second, same = SIZES[sizes]
    generator = torch.Generator().manual_seed(1)
    shape = (first + second, WIDTH)
    hidden, upstream = (torch.randn(shape, generator=generator).double() for _ in range(2))
    ids = torch.randint(VOCABULARY, shape[:1], generator=generator)
    if same:
        hidden, ids = hidden[:1].expand(shape), ids[:1].expand(shape[0])
    return hidden, ids, upstream


def compute(layer: FeedForward, sizes: str, tokens: slice, recompute: bool = False) -> Outcome:
    """Run a layer forward and backward on some of the tokens."""
    hidden, ids, upstream = (x[tokens].clone() for x in inputs(sizes))
    hidden.requires_grad_()
    run = partial(layer, token_ids=ids)
    output = checkpoint(run, hidden, use_reentrant=False) if recompute else run(hidden)
    assert output is not None
    (output.hidden * upstream).sum().backward()
    assert hidden.grad is not None
    return {"output": output.hidden.detach(), "gradient of the input": hidden.grad}


def gradients(layer: FeedForward, ranks: int) -> Outcome:
    """Return the sums over ranks of the parameters' gradients, by name."""
    total = {}
    for name, parameter in layer.named_parameters():
        share, gradient = share_of(parameter), parameter.grad
        if share is not None:
            assert gradient.is_sparse
            gradient = share.dtensor(gradient.to_dense())
        if isinstance(gradient, DTensor):  # a mean over the ranks already
            total[name] = whole(gradient) * ranks
        else:
            total[name] = torch.zeros_like(parameter) if gradient is None else gradient.clone()
            dist.all_reduce(total[name])
    return total


def main(folder: Path) -> None:
    """Leave what the ranks computed."""
    mesh = init_device_mesh("cpu", (2,))
    for name in LAYERS:
        for sizes, (first, second, _) in SIZES.items():
            tokens = slice(first) if dist.get_rank() == 0 else slice(first, first + second)
            layer = build(name)
            shard_experts(layer, mesh)
            outcome = compute(layer, sizes, tokens, recompute=sizes == "uneven")
            outcome |= gradients(layer, ranks=2)
            hidden, ids, _ = inputs(sizes)
            outcome["reference"] = layer.reference(hidden[tokens], token_ids=ids[tokens]).hidden
            outcome = {key: value.detach() for key, value in outcome.items()}
            torch.save(outcome, folder / f"{name}, {sizes}, {dist.get_rank()}.pt")
    refused = (
        SparseMoE(8, num_experts=3),
        PEER(8, num_experts=16, top_k=2, sparse=True),
        STEM(8, vocab_size=9, sparse=True, offload=True),
    )
    for layer in refused:
        try:
            shard_experts(layer, mesh)
        except InputError as error:
            with (folder / f"refused {dist.get_rank()}.txt").open("a") as file:
                file.write(f"{error}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    main(Path(sys.argv[1]))
    dist.destroy_process_group()
