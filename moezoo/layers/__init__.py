"""The zoo's members; a method is added by listing it here once."""

from moezoo.feed_forward import Method, Paper, register
from moezoo.layers.carved_moe import CarvedMoE
from moezoo.layers.dense import DenseFFN
from moezoo.layers.fast_feed_forward import FastFeedForward
from moezoo.layers.hash import HashLayer
from moezoo.layers.memory_plus import MemoryPlus
from moezoo.layers.peer import PEER
from moezoo.layers.persistent_memory import PersistentMemoryAttention
from moezoo.layers.product_key_memory import ProductKeyMemory
from moezoo.layers.sigma_moe import SigmaMoE
from moezoo.layers.sparse_moe import SparseMoE
from moezoo.layers.top_k_ffn import TopKFFN
from moezoo.layers.ultra_fast_fff import UltraFastFFF
from moezoo.routing import BalanceOptions, CapacityOptions, RouterOptions

register(
    Method(
        "dense_mlp",
        DenseFFN,
        Paper("Vaswani et al.", 2017, "Attention Is All You Need", "1706.03762"),
        {"gated": False, "activation": "relu"},
    ),
    Method(
        "dense_glu",
        DenseFFN,
        Paper("Shazeer", 2020, "GLU Variants Improve Transformer", "2002.05202"),
    ),
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
        "fast_feed_forward",
        FastFeedForward,
        Paper("Belcak & Wattenhofer", 2023, "Fast Feedforward Networks", "2308.14711"),
    ),
    Method(
        "efff",
        FastFeedForward,
        Paper(
            "Charalampopoulos et al.",
            2024,
            "Enhancing Fast Feed Forward Networks with Load Balancing and a Master Leaf Node",
            "2405.16836",
        ),
        {"load_balancing": 0.01, "d_master": 8},
    ),
    Method(
        "ultra_fast_fff",
        UltraFastFFF,
        Paper(
            "Belcak & Wattenhofer", 2023, "Exponentially Faster Language Modelling", "2311.10770"
        ),
    ),
    Method(
        "persistent_memory",
        PersistentMemoryAttention,
        Paper(
            "Sukhbaatar et al.",
            2019,
            "Augmenting Self-attention with Persistent Memory",
            "1907.01470",
        ),
    ),
    Method(
        "product_key_memory",
        ProductKeyMemory,
        Paper("Lample et al.", 2019, "Large Memory Layers with Product Keys", "1907.05242"),
    ),
    Method(
        "memory_plus",
        MemoryPlus,
        Paper("Berges et al.", 2024, "Memory Layers at Scale", "2412.09764"),
        {"value_pool": "memory"},
    ),
    Method("peer", PEER, Paper("He", 2024, "Mixture of A Million Experts", "2407.04153")),
    Method(
        "hash",
        HashLayer,
        Paper("Roller et al.", 2021, "Hash Layers For Large Sparse Models", "2106.04426"),
    ),
    Method(
        "hash_bigram",
        HashLayer,
        Paper("Roller et al.", 2021, "Hash Layers For Large Sparse Models", "2106.04426"),
        {"key": "bigram"},
    ),
    Method(
        "multi_hash",
        HashLayer,
        Paper("Roller et al.", 2021, "Hash Layers For Large Sparse Models", "2106.04426"),
        {"num_hashes": 4},
    ),
    Method(
        "sigma_moe",
        SigmaMoE,
        Paper(
            "Csordás et al.",
            2023,
            "Approximating Two-Layer Feedforward Networks for Efficient Transformers",
            "2310.10837",
        ),
    ),
    Method(
        "cmoe",
        CarvedMoE,
        Paper(
            "Pei et al.",
            2025,
            "Analytical FFN-to-MoE Restructuring via Activation Pattern Analysis",
            "2502.04416",
        ),
    ),
    Method(
        "top_k_ffn",
        TopKFFN,
        Paper(
            "Li et al.",
            2022,
            "The Lazy Neuron Phenomenon: On Emergence of Activation Sparsity in Transformers",
            "2210.06313",
        ),
    ),
    Method(
        "spark_ffn",
        TopKFFN,
        Paper(
            "You et al.",
            2025,
            "Spark Transformer: Reactivating Sparsity in FFN and Attention",
            "2506.06644",
        ),
        {
            "selection": "statistical",
            "activation": "gelu_tanh",
            "gated": True,
            "split_input": True,
        },
    ),
)

__all__ = [
    "PEER",
    "CarvedMoE",
    "DenseFFN",
    "FastFeedForward",
    "HashLayer",
    "MemoryPlus",
    "PersistentMemoryAttention",
    "ProductKeyMemory",
    "SigmaMoE",
    "SparseMoE",
    "TopKFFN",
    "UltraFastFFF",
]
