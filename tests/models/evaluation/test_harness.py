"""What lm-evaluation-harness is told, against tokens predicted one by one and without padding."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import MixtralConfig, MixtralForCausalLM

from moezoo import InputError
from moezoo_models.evaluation.perplexity import evaluate_text

REASON = "lm-eval is not installed (pip install 'moezoo[eval]')"
pytest.importorskip("lm_eval", reason=REASON)

from lm_eval.api.instance import Instance  # noqa: E402

from moezoo_models.evaluation.harness import Decoding, HarnessModel  # noqa: E402

PAIRS = [("one two", " three"), ("", "four"), ("f", "ive six seven eight"), ("nine ", "ten")]
PROMPTS = ["a long prompt to continue", "short", "middling one", ""]


def requests(kind, arguments):
    return [Instance(kind, {}, each, n, ("task", n, 1)) for n, each in enumerate(arguments)]


@pytest.fixture(params=["mixed", "batch_norm", "bigram", "capacity", "stock"])
def model(request, make, rules):
    """Layers that padding could reach: through masks, norms, earlier tokens, room in experts."""
    rule = rules["rule"]
    layers = {
        "mixed": rules["mixed"],
        "batch_norm": [rule("PEER", num_experts=64, num_heads=2, top_k=4)],
        "bigram": [
            rule("HashLayer", num_experts=5, d_expert=32, vocab_size=257, key="bigram"),
        ],
        "capacity": [
            rule("SparseMoE", num_experts=4, top_k=2, capacity={"factor": 1.0, "minimum": 1})
        ],
    }
    if request.param == "stock":
        torch.manual_seed(0)
        sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
        return MixtralForCausalLM(
            MixtralConfig(**sizes, **heads, num_local_experts=4, max_position_embeddings=128)
        )
    return make(ffn=layers[request.param], vocab_size=257)


@torch.no_grad()
def logits_after(model, ids):
    return model(torch.tensor([ids])).logits[0].double()


def scored_alone(model, context, targets):
    logits = logits_after(model, [*context, *targets][:-1])[-len(targets) :]
    wanted = torch.tensor(targets)
    nats = F.cross_entropy(logits, wanted, reduction="sum").item()
    return -nats, bool((logits.argmax(-1) == wanted).all())


def continued_alone(model, ids, count):
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": 256}
    prompt = torch.tensor([ids])
    mask = torch.ones_like(prompt)
    written = model.eval().generate(prompt, attention_mask=mask, pad_token_id=256, **options)
    return written[0, len(ids) :].tolist()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_log_probabilities(model, byte_tokenizer, batch_size):
    harness = HarnessModel(model, byte_tokenizer, batch_size=batch_size)
    found = harness.loglikelihood(requests("loglikelihood", PAIRS))
    for (context, continuation), (score, _) in zip(PAIRS, found, strict=True):
        # A space at the end of a context is counted with what follows.
        bare = context.rstrip()
        ids = byte_tokenizer.encode(bare) or [256]
        targets = byte_tokenizer.encode((context + continuation)[len(bare) :])
        assert score == pytest.approx(scored_alone(model, ids, targets)[0], rel=1e-5)


def test_the_likeliest_continuation_is_greedy(model, byte_tokenizer):
    harness = HarnessModel(model, byte_tokenizer)
    context = byte_tokenizer.encode("abc")
    likely = continued_alone(model, context, 3)
    other = [*likely[:2], (likely[2] + 1) % 256]
    # The model with a limit on capacity drops other tokens once there are more of them.
    expected = [scored_alone(model, context, targets) for targets in (likely, other)]
    found = harness._loglikelihood_tokens([(None, context, likely), (None, context, other)])
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert not found[1][1]
    if harness.batch_size != 1:
        assert found[0][1]


@pytest.mark.parametrize("length", [128, 16, 7])
def test_whole_texts(model, byte_tokenizer, length):
    harness = HarnessModel(model, byte_tokenizer, sequence_length=length, batch_size=3)
    texts = ["Über 素数: 2, 3, 5, 7.\n" * 2, "x", "", "für jede Zahl"]
    found = harness.loglikelihood_rolling(requests("loglikelihood_rolling", [(t,) for t in texts]))
    for text, score in zip(texts, found, strict=True):
        if not text:
            assert score == 0.0
            continue
        whole = evaluate_text(
            model, byte_tokenizer, text, sequence_length=length, stride=length, batch_size=1
        )
        assert score == pytest.approx(-whole.loss * whole.tokens, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_continuations(model, byte_tokenizer, batch_size):
    harness = HarnessModel(model, byte_tokenizer, batch_size=batch_size)
    ids = [byte_tokenizer.encode(prompt) or [256] for prompt in PROMPTS]
    written = [continued_alone(model, prompt, 9) for prompt in ids]
    texts = [byte_tokenizer.decode(row) for row in written]
    # A stop string that is known to come, in the middle of what the first prompt leads to.
    stop = texts[0][3:5]
    assert stop
    options = {"until": [stop], "max_gen_toks": 9, "do_sample": False}
    found = harness.generate_until(requests("generate_until", [(p, options) for p in PROMPTS]))
    assert found == [text.partition(stop)[0] for text in texts]
    assert len(found[0]) <= 3


def test_long_contexts_lose_their_beginning(make, byte_tokenizer):
    model = make(vocab_size=257)
    harness = HarnessModel(model, byte_tokenizer, sequence_length=8)
    ((score, _),) = harness.loglikelihood(requests("loglikelihood", [("0123456789", "ab")]))
    ids = byte_tokenizer.encode("3456789")
    assert score == pytest.approx(scored_alone(model, ids, [97, 98])[0], rel=1e-5)
    options = {"until": [], "max_gen_toks": 5}
    (text,) = harness.generate_until(requests("generate_until", [("0123456789", options)]))
    assert text == byte_tokenizer.decode(continued_alone(model, byte_tokenizer.encode("789"), 5))


def test_layers_that_mix_texts_get_one_at_a_time(make, rules, byte_tokenizer):
    rule = rules["rule"]
    limited = [rule("SparseMoE", num_experts=4, top_k=2, capacity={"factor": 1.0})]
    choosing = [rule("SparseMoE", num_experts=4, router={"choice": "expert", "normalize": False})]
    for layers, size in ((limited, 1), (choosing, 1), (rules["moe"], 5)):
        model = make(ffn=layers, vocab_size=257, allow_non_causal=True)
        assert HarnessModel(model, byte_tokenizer, batch_size=5).batch_size == size


def test_texts_begin_with_the_token_that_begins_texts(make, byte_tokenizer):
    model = make(vocab_size=257)
    byte_tokenizer.bos_id = 1
    harness = HarnessModel(model, byte_tokenizer)
    found = harness.loglikelihood(requests("loglikelihood", [("ab", "c"), ("", "c")]))
    for (score, _), context in zip(found, [[1, 97, 98], [1]], strict=True):
        assert score == pytest.approx(scored_alone(model, context, [99])[0], rel=1e-5)
    (whole,) = harness.loglikelihood_rolling(requests("loglikelihood_rolling", [("abc",)]))
    assert whole == pytest.approx(scored_alone(model, [1], [97, 98, 99])[0], rel=1e-5)
    options = {"max_gen_toks": 4}
    (text,) = harness.generate_until(requests("generate_until", [("ab", options)]))
    assert text == byte_tokenizer.decode(continued_alone(model, [1, 97, 98], 4))


def test_sampling_follows_the_seed(make, byte_tokenizer):
    harness = HarnessModel(make(vocab_size=257), byte_tokenizer)
    options = {"max_gen_toks": 12, "do_sample": True, "temperature": 2.0}

    def sample(seed):
        torch.manual_seed(seed)
        return harness.generate_until(requests("generate_until", [("ab", options)]))

    assert sample(1) == sample(1)
    assert len({tuple(sample(seed)) for seed in range(4)}) > 1


def test_options_of_generation():
    greedy = Decoding.of({"until": "\n", "temperature": 0.7, "do_sample": False})
    assert greedy == Decoding(("\n",), 256, 0.0, 0, 1.0)
    sampled = {"temperature": 0.7, "max_new_tokens": 5, "top_k": 3, "top_p": 0.5, "num_beams": 1}
    assert Decoding.of(sampled) == Decoding((), 5, 0.7, 3, 0.5)
    assert Decoding.of({"until": ["b", "c"]}).cut("abcb") == "a"
    with pytest.raises(InputError, match="num_beams: beams are not searched"):
        Decoding.of({"num_beams": 4})
    with pytest.raises(InputError, match="generation_kwargs: 'typical_p' is not known here"):
        Decoding.of({"typical_p": 0.9})


def test_what_does_not_fit_is_said(make, byte_tokenizer):
    model = make(vocab_size=257)
    harness = HarnessModel(model, byte_tokenizer)
    assert harness.length == 128
    with pytest.raises(InputError, match="max_gen_toks: 256 new tokens leave no room"):
        harness.generate_until(requests("generate_until", [("a", {})]))
    with pytest.raises(InputError, match="sequence_length: an answer has 129 tokens"):
        harness.loglikelihood(requests("loglikelihood", [("a", "b" * 129)]))
    with pytest.raises(InputError, match="batch_size: 0 is out of range"):
        HarnessModel(model, byte_tokenizer, batch_size=0)
    with pytest.raises(InputError, match="token id 106 is outside the model's vocabulary of 61"):
        HarnessModel(make(), byte_tokenizer).loglikelihood(requests("loglikelihood", [("j", "z")]))


def test_a_model_that_knows_nothing_is_uniform(make, byte_tokenizer):
    model = make(vocab_size=257)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    ((score, _),) = HarnessModel(model, byte_tokenizer).loglikelihood(
        requests("loglikelihood", [("a", "bcd")])
    )
    assert score == pytest.approx(-3 * math.log(257), rel=1e-6)
