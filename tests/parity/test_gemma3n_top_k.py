"""Statistical top-k against Gemma 3n's block in transformers, weights copied across."""

import pytest
import torch

from moezoo import TopKFFN

gemma3n = pytest.importorskip("transformers.models.gemma3n.modeling_gemma3n")


@pytest.mark.parametrize("sparsity", [0.95, 0.75])
def test_statistical_top_k_equals_gemma3n(sparsity):
    torch.manual_seed(0)
    config = gemma3n.Gemma3nTextConfig(
        hidden_size=32,
        intermediate_size=[400],
        num_hidden_layers=1,
        activation_sparsity_pattern=[sparsity],
    )
    theirs = gemma3n.Gemma3nTextMLP(config, layer_idx=0)
    ours = TopKFFN(
        32,
        d_ff=400,
        top_k=round(400 * (1 - sparsity)),
        selection="statistical",
        activation="gelu_tanh",
        gated=True,
    )
    ours.load_state_dict(theirs.state_dict())
    hidden = torch.randn(3, 50, 32)
    pairs = []
    for layer in (ours, theirs):
        x = hidden.clone().requires_grad_()
        y = layer(x)
        y = y if isinstance(y, torch.Tensor) else y.hidden
        y.square().sum().backward()
        pairs.append([y.detach(), x.grad, *(p.grad for _, p in sorted(layer.named_parameters()))])
    for mine, other in zip(*pairs, strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5 * scale)
