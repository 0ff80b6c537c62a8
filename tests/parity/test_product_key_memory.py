"""ProductKeyMemory against the product-key-memory package, weights copied across.

Where the paper normalises queries over the batch, the package puts a LayerNorm on each half of a
query, one for all heads. Ours has none of that kind, so it stands here as a hook on our queries;
what is compared is all the rest, and with the package's norm taken out, everything.
"""

import pytest
import torch
from torch import nn

from moezoo import ProductKeyMemory

package = pytest.importorskip("product_key_memory", reason="pip install product-key-memory")

D, HEADS, HALF, KEYS = 24, 3, 10, 11


def pair(top_k: int, normed: bool) -> tuple[ProductKeyMemory, nn.Module, nn.LayerNorm]:
    """Build ours, theirs, and the norm that ours is lent."""
    torch.manual_seed(0)
    theirs = package.PKM(D, heads=HEADS, num_keys=KEYS, topk=top_k, dim_head=HALF)
    ours = ProductKeyMemory(
        D, num_keys=KEYS, num_heads=HEADS, top_k=top_k, d_key=2 * HALF, query_norm="none"
    )
    norm = nn.LayerNorm(HALF)
    with torch.no_grad():
        for own, other in ((norm.weight, theirs.norm.weight), (norm.bias, theirs.norm.bias)):
            own.copy_(other.normal_())  # a gain of one and a shift of zero would hide a mix-up
        ours.memory.query.proj.weight.copy_(by_head(theirs.to_queries.weight))
        ours.memory.keys.keys.copy_(theirs.keys.transpose(1, 2))
        ours.memory.values.weight.copy_(theirs.values.weight)
    if normed:
        ours.memory.query.register_forward_hook(
            lambda module, args, queries: norm(queries.unflatten(-1, (2, HALF))).flatten(-2)
        )
    else:
        theirs.norm = nn.Identity()
    return ours.double(), theirs.double(), norm.double()


def by_head(weight: torch.Tensor) -> torch.Tensor:
    """Reorder rows (half, head, width) to (head, half, width)."""
    return weight.view(2, HEADS, HALF, D).transpose(0, 1).reshape(-1, D)


@pytest.mark.parametrize("top_k", [1, 5, KEYS])
@pytest.mark.parametrize("normed", [True, False])
def test_output_and_gradients_agree(top_k, normed):
    ours, theirs, norm = pair(top_k, normed)
    hidden, direction = torch.randn(2, 3, 43, D, dtype=torch.float64)
    found = []
    for call in (lambda x: ours(x).hidden, theirs):
        x = hidden.clone().requires_grad_()
        output = call(x)
        (output * direction).sum().backward()
        found.append((output.detach(), x.grad))
    (output, grad), (their_output, their_grad) = found
    pairs = {
        "output": (output, their_output),
        "hidden": (grad, their_grad),
        "query": (ours.memory.query.proj.weight.grad, by_head(theirs.to_queries.weight.grad)),
        "keys": (ours.memory.keys.keys.grad, theirs.keys.grad.transpose(1, 2)),
        "values": (ours.memory.values.weight.grad, theirs.values.weight.grad),
    }
    if normed:
        pairs["gain"] = (norm.weight.grad, theirs.norm.weight.grad)
        pairs["shift"] = (norm.bias.grad, theirs.norm.bias.grad)
    for name, (mine, other) in pairs.items():
        through_scores = name not in ("output", "values")
        if top_k == 1 and through_scores:  # the softmax over one score is one
            assert not mine.any(), name
            assert not other.any(), name
        else:
            assert other.abs().max() > 0, name
            assert (mine - other).abs().max() <= 1e-12 * other.abs().max(), name


def test_the_package_forgets_the_weights_when_it_concatenates_heads():
    """Why ours has no such option: nothing teaches its queries and keys which slots to read."""
    theirs = package.PKM(D, heads=HEADS, num_keys=KEYS, topk=5, concat_values_and_combine=True)
    theirs(torch.randn(1, 7, D)).sum().backward()
    assert theirs.values.weight.grad.any()
    assert theirs.to_queries.weight.grad is None
    assert theirs.keys.grad is None
