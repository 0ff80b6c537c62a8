"""Published sparse mixtures: settings of :class:`moezoo.SparseMoE`, each from its paper."""

from __future__ import annotations

from moezoo.feed_forward import Method, Paper, register
from moezoo.layers.sparse_moe import SparseMoE
from moezoo.routing import BalanceOptions, CapacityOptions, LogitOptions, RouterOptions

register(
    Method(
        "noisy_top_k",
        SparseMoE,
        Paper(
            "Shazeer et al.",
            2017,
            "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
            "1701.06538",
        ),
        {
            "num_experts": 16,
            "top_k": 4,
            "activation": "relu",
            "gated": False,
            "router": RouterOptions(noise=True),
            "balance": BalanceOptions(load_balancing=0.0, importance=0.1, load=0.1),
        },
    ),
    Method(
        "gshard",
        SparseMoE,
        Paper(
            "Lepikhin et al.",
            2020,
            "GShard: Scaling Giant Models with Conditional Computation",
            "2006.16668",
        ),
        {
            "activation": "relu",
            "gated": False,
            "balance": BalanceOptions(count="first_choice"),
            "capacity": CapacityOptions(factor=1.0, second_choice_threshold=0.2),
        },
    ),
    Method(
        "switch",
        SparseMoE,
        Paper("Fedus et al.", 2021, "Switch Transformers", "2101.03961"),
        {
            "top_k": 1,
            "activation": "relu",
            "gated": False,
            "router": RouterOptions(normalize=False, jitter=0.01),
            "capacity": CapacityOptions(factor=1.25),
        },
    ),
    Method(
        "st_moe",
        SparseMoE,
        Paper(
            "Zoph et al.",
            2022,
            "ST-MoE: Designing Stable and Transferable Sparse Expert Models",
            "2202.08906",
        ),
        {
            "activation": "gelu",
            "balance": BalanceOptions(z_loss=1e-3, count="first_choice"),
            "capacity": CapacityOptions(factor=1.25, eval_factor=2.0),
        },
    ),
    Method(
        "expert_choice",
        SparseMoE,
        Paper("Zhou et al.", 2022, "Mixture-of-Experts with Expert Choice Routing", "2202.09368"),
        {
            "activation": "relu",
            "gated": False,
            "router": RouterOptions(choice="expert", normalize=False),
            "balance": BalanceOptions(load_balancing=0.0),
        },
    ),
    Method(
        "mixtral",
        SparseMoE,
        Paper("Jiang et al.", 2024, "Mixtral of Experts", "2401.04088"),
        {"num_experts": 8, "top_k": 2, "balance": BalanceOptions(load_balancing=0.02)},
    ),
    Method(
        "deepseek_v2",
        SparseMoE,
        Paper("DeepSeek-AI", 2024, "DeepSeek-V2", "2405.04434"),
        {
            "num_experts": 64,
            "top_k": 6,
            "num_shared_experts": 2,
            "router": RouterOptions(normalize=False, num_groups=8, top_groups=3),
            "balance": BalanceOptions(load_balancing=0.003),
        },
    ),
    Method(
        "olmoe",
        SparseMoE,
        Paper(
            "Muennighoff et al.",
            2024,
            "OLMoE: Open Mixture-of-Experts Language Models",
            "2409.02060",
        ),
        {
            "num_experts": 64,
            "top_k": 8,
            "router": RouterOptions(normalize=False),
            "balance": BalanceOptions(load_balancing=0.01, z_loss=1e-3),
        },
    ),
    Method(
        "deepseek_v3",
        SparseMoE,
        Paper("DeepSeek-AI", 2024, "DeepSeek-V3 Technical Report", "2412.19437"),
        {
            "num_experts": 64,
            "top_k": 8,
            "num_shared_experts": 1,
            "router": RouterOptions(
                score="sigmoid", scale=2.5, num_groups=8, top_groups=4, selection_bias=True
            ),
            "balance": BalanceOptions(load_balancing=0.0, sequence=1e-4),
        },
    ),
    Method(
        "qwen3_moe",
        SparseMoE,
        Paper("Qwen Team", 2025, "Qwen3 Technical Report", "2505.09388"),
        {"num_experts": 128, "top_k": 8, "balance": BalanceOptions(load_balancing=0.001)},
    ),
    Method(
        "smallthinker",
        SparseMoE,
        Paper(
            "Song et al.",
            2025,
            "SmallThinker: A Family of Efficient Large Language Models Natively Trained for Local "
            "Deployment",
            "2507.20984",
        ),
        {
            "num_experts": 32,
            "top_k": 4,
            "activation": "relu",
            "router": RouterOptions(score="sigmoid"),
        },
        router_input="pre_attention",
    ),
    Method(
        "zaya",
        SparseMoE,
        Paper(
            "Anthony et al.",
            2025,
            "Training Foundation Models on a Full-Stack AMD Platform: Compute, Networking, and "
            "System Design",
            "2511.17127",
        ),
        {
            "num_experts": 16,
            "num_skip_experts": 1,
            "top_k": 1,
            "router": RouterOptions(
                normalize=False,
                selection_bias=True,
                logits=LogitOptions(mlp=64, norm_eps=1e-5, carry=True),
            ),
            "balance": BalanceOptions(load_balancing=0.0),
        },
    ),
    Method(
        "expert_threshold",
        SparseMoE,
        Paper(
            "Sun et al.",
            2026,
            "Expert Threshold Routing for Autoregressive Language Modeling with Dynamic "
            "Computation Allocation and Load Balancing",
            "2603.11535",
        ),
        {
            "num_experts": 16,
            "top_k": 2,
            "router": RouterOptions(choice="threshold", score="sigmoid", normalize=False),
            "balance": BalanceOptions(load_balancing=0.0),
        },
    ),
    Method(
        "remoe",
        SparseMoE,
        Paper(
            "Wang et al.",
            2024,
            "ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing",
            "2412.14711",
        ),
        {
            "router": RouterOptions(score="relu", normalize=False),
            "balance": BalanceOptions(load_balancing=0.0),
        },
    ),
)
