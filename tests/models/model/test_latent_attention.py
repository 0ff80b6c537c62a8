"""Multi-head latent attention: against the paper's equations, and its cache of latents."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import StaticCache

from moezoo import InputError
from moezoo_models import MoezooConfig
from moezoo_models.decoding.eligible import ineligible
from moezoo_models.model.latent_options import cached_numbers, latent_of

SMALL = {
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
HEADS = {"num_key_value_heads": None}
DENSE = [{"layers": "all", "class_path": "moezoo.DenseFFN", "init_args": {"d_ff": 48}}]
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}
KINDS = {
    "plain": {},
    "query latents": {"q_lora_rank": 7, "bias": True},
    "halves": {"rope_interleave": False, "rope_parameters": YARN},
    "wide values": {"v_head_dim": 13, "nope_layers": [1], "norm": "rms_offset"},
    "capped": {"attn_logit_softcapping": 0.5, "attention_multiplier": 0.7},
}


def fields(q_lora_rank=None, v_head_dim=5, rope_interleave=True, bias=False, **more):
    latent = {"q_lora_rank": q_lora_rank, "rope_interleave": rope_interleave}
    biases = {"attention_bias": bias, "attention_output_bias": bias}
    latent = SMALL | latent | {"v_head_dim": v_head_dim}
    return {"latent_attention": latent, "ffn": DENSE, **HEADS, **biases, **more}


@pytest.fixture
def build(make):
    """Return a function that builds a model in fp64, none of whose weights is zero."""

    def build_model(**changes):
        model = make(**fields(**changes)).double().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "self_attn" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        return model

    return build_model


def turned(x, position, config, options):
    """Turn the pairs of a vector one by one."""
    rope, width = config.rope_parameters, len(x)
    frequencies = [rope["rope_theta"] ** (-2 * i / width) for i in range(width // 2)]
    out, scale = x.clone(), 1.0
    if rope["rope_type"] == "yarn":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        found, scale = ROPE_INIT_FUNCTIONS["yarn"](config)
        frequencies = found.tolist()
    for i, frequency in enumerate(frequencies):
        one, other = (2 * i, 2 * i + 1) if options["rope_interleave"] else (i, i + width // 2)
        cos, sin = math.cos(position * frequency) * scale, math.sin(position * frequency) * scale
        out[one], out[other] = x[one] * cos - x[other] * sin, x[other] * cos + x[one] * sin
    return out


def by_equations(attention, config, hidden):
    """Attend token by token, by equations 9 to 19 of arXiv:2405.04434, with every head's keys."""
    options, heads = config.latent_attention, config.num_attention_heads
    rank, plain = options["kv_lora_rank"], options["qk_nope_head_dim"]
    value_width = options["v_head_dim"]
    weights = dict(attention.named_parameters())

    def project(name, x):
        return weights[f"{name}.weight"] @ x + weights.get(f"{name}.bias", 0.0)

    def normed(name, x):
        factor = weights[f"{name}.weight"] + (1.0 if config.norm == "rms_offset" else 0.0)
        return x * factor / (x.square().mean() + 1e-6).sqrt()

    def head(x, number):
        return x.view(heads, -1)[number]

    def rotated(x, position):
        if attention.layer_idx in config.nope_layers:
            return x
        return turned(x, position, config, options)

    scale = (plain + options["qk_rope_head_dim"]) ** -0.5
    if config.rope_parameters["rope_type"] == "yarn":
        scale *= (0.1 * YARN["mscale_all_dim"] * math.log(YARN["factor"]) + 1) ** 2
    scale = config.attention_multiplier or scale
    rows = []
    for t, x in enumerate(hidden):
        if options["q_lora_rank"] is None:
            query = project("q_proj", x)
        else:
            query = project("q_b_proj", normed("q_a_layernorm", project("q_a_proj", x)))
        answers = []
        for h in range(heads):
            own = head(query, h)
            own = torch.cat((own[:plain], rotated(own[plain:], t)))
            scores, values = [], []
            for s in range(t + 1):
                compressed = project("kv_a_proj_with_mqa", hidden[s])
                latent = normed("kv_a_layernorm", compressed[:rank])
                made = head(project("kv_b_proj", latent), h)
                key = torch.cat((made[:plain], rotated(compressed[rank:], s)))
                score = own @ key * scale
                if (cap := config.attn_logit_softcapping) is not None:
                    score = cap * torch.tanh(score / cap)
                scores.append(score)
                values.append(made[plain:])
                assert len(values[-1]) == value_width
            answers.append(torch.stack(scores).softmax(0) @ torch.stack(values))
        rows.append(project("o_proj", torch.cat(answers)))
    return torch.stack(rows)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_papers_with_all_gradients(kind, backend, build):
    model = build(**KINDS[kind], num_hidden_layers=2, attn_implementation=backend)
    attention, config = model.model.layers[1].self_attn, model.config
    hidden = torch.randn(1, 5, 32, dtype=torch.double, requires_grad=True)
    seed = torch.randn(5, 32, dtype=torch.double)
    inputs = [hidden, *attention.parameters()]
    positions = torch.arange(5)[None]
    # The fp32 of the model's own angles would hide what is compared here.
    rotary = tuple(x.double() for x in model.model.rotary_emb(hidden, positions))
    mask = None
    if backend == "eager":
        mask = torch.full((5, 5), -1e9, dtype=torch.double).triu(1)[None, None]
    found = attention(hidden, rotary, mask)[0][0]
    expected = by_equations(attention, config, hidden[0])
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=3e-6)  # norms are in fp32
    close(found, expected)
    gradients = [torch.autograd.grad((y * seed).sum(), inputs) for y in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        close(one, other)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_on_latents_give_the_logits_of_the_whole(kind, backend, build, ids):
    model = build(**KINDS[kind], attn_implementation=backend)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :4], use_cache=True)
        steps, cache = [first.logits], first.past_key_values
        for position in range(4, 9):
            one = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            steps.append(one.logits)
        steps.append(model(ids[:, 9:], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-6, atol=1e-6)
    kept = cache.layers[1]
    assert kept.keys.shape == (2, 1, 12, 10)
    assert kept.values.shape == (2, 1, 12, 4)
    assert kept.keys[0].numel() + kept.values[0].numel() == 12 * cached_numbers(model.config)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_padded_batches_are_continued_as_alone_and_without_a_cache(cache, backend, build, ids):
    model = build(**KINDS["query latents"], attn_implementation=backend)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    alone = [model.generate(row[None], use_cache=False, **options) for row in (ids[0, :5], ids[1])]
    batch = torch.stack([F.pad(ids[0, :5], (7, 0)), ids[1]])
    mask = torch.stack([F.pad(torch.ones(5).long(), (7, 0)), torch.ones(12).long()])
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    together = model.generate(batch, attention_mask=mask, **options)
    assert torch.equal(together[0, 7:], alone[0][0])
    assert torch.equal(together[1], alone[1][0])


def test_what_makes_keys_is_called_where_it_is_no_plain_map(build, ids):
    """An adapter's numbers are not in the weight that a step would read."""

    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return 2.0 * super().forward(x)

    model = build()
    for block in model.model.layers:
        weight = block.self_attn.kv_b_proj.weight
        block.self_attn.kv_b_proj = Adapted(10, 44, bias=False, dtype=torch.double)
        block.self_attn.kv_b_proj.weight = weight
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with_cache, without = (model.generate(ids, use_cache=u, **options) for u in (True, False))
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_what_a_static_cache_has_not_been_given_is_not_seen(backend, build, ids):
    model = build(attn_implementation=backend)
    with torch.no_grad():
        whole, cache = model(ids).logits, StaticCache(model.config, max_cache_len=20)
        model(ids[:, :7], past_key_values=cache)
        steps = [model(ids[:, n : n + 1], past_key_values=cache).logits for n in range(7, 12)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole[:, 7:], rtol=1e-6, atol=1e-6)


def test_it_runs_under_autocast_and_leaves_weights_to_the_caller(build, ids):
    model = build(attn_implementation="eager").float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = model(ids, output_attentions=True)
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        last = model(ids[:, -1:], past_key_values=cache).logits
    assert whole.attentions[0].shape == (2, 4, 12, 12)
    torch.testing.assert_close(last, whole.logits[:, -1:], rtol=0.05, atol=0.05)


def test_products_are_counted_as_torch_counts_them(make, ids):
    from moezoo_train.measure.throughput import forward_flops_per_token

    model = make(**fields(q_lora_rank=7), attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, use_cache=False)
    assert forward_flops_per_token(model, 12) * 24 == counter.get_total_flops()


def test_its_configuration_stays_what_it_is():
    config = MoezooConfig(**fields(q_lora_rank=7), num_hidden_layers=2)
    again = MoezooConfig.from_dict(config.to_dict())
    assert latent_of(again) == latent_of(config)
    assert again.latent_attention == {**SMALL, "q_lora_rank": 7, "rope_interleave": True}
    assert again.head_dim == 4
    whole = MoezooConfig(latent_attention={}, hidden_size=2048, num_attention_heads=16)
    assert cached_numbers(whole) == 576
    assert cached_numbers(MoezooConfig()) == 2 * 512


def test_steps_of_our_decoder_are_left_to_transformers(build):
    assert ineligible(build().float()) == "its latent_attention is not a Llama's"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_attention": 3}, "latent_attention: 3 is not a mapping"),
        ({"latent_attention": {"rank": 3}}, "latent_attention: unknown option 'rank'"),
        ({"latent_attention": {"kv_lora_rank": 0}}, "latent_attention.kv_lora_rank: 0 is out of"),
        ({"latent_attention": {"q_lora_rank": 2.5}}, "latent_attention.q_lora_rank: 2.5 is not a"),
        ({"latent_attention": {"qk_rope_head_dim": 5}}, "qk_rope_head_dim: 5 is odd"),
        ({"latent_attention": {"rope_interleave": 1}}, "rope_interleave: 1 is not true or false"),
        ({"sliding_window": 4}, "sliding_window: latent attention has no such option"),
        ({"qk_norm": True}, "qk_norm: latent"),
        ({"positions": "learned"}, "positions: latent"),
        ({"num_key_value_heads": 2}, "num_key_value_heads: latent"),
        ({"head_dim": 6}, "head_dim: latent"),
        (
            {"rope_parameters": {"rope_theta": 10.0, "partial_rotary_factor": 0.5}},
            "rope_parameters: latent",
        ),
        (
            {"ffn": [{"layers": "all", "class_path": "moezoo.PersistentMemoryAttention"}]},
            r"ffn\[0\]: class_path: moezoo.PersistentMemoryAttention joins attention whose heads",
        ),
    ],
)
def test_what_does_not_go_with_it_is_refused_in_one_line(changes, message, make):
    with pytest.raises(InputError, match=message) as refused:
        make(**fields() | changes)
    assert "\n" not in str(refused.value)
