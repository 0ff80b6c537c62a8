"""Sirius: sparse tokens that the full model checks, against a loop without a cache."""

import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from moezoo import InputError
from moezoo import __main__ as command
from moezoo.convert.select.budget import read_share, work_share
from moezoo.convert.select.prompt import prompt_neurons
from moezoo.selection import Shares
from moezoo_kernels import native, token_step
from moezoo_models.checkpoints.directory import save_checkpoint
from moezoo_models.decoding.decoder import Decoder
from moezoo_models.decoding.loop import continue_ids
from moezoo_models.decoding.sirius import Corrections, Sirius, step_shares
from moezoo_models.generate import continue_text, generate

SPARSE = {"input": 0.8, "up_input": 0.8, "gate": 0.25, "hidden": 0.1}
KINDS = {
    "thresholds": {"selection": {"kind": "threshold", **SPARSE}},
    "mlp": {
        "selection": {"kind": "threshold", "input": 0.9, "hidden": 0.4},
        "gated": False,
        "activation": "relu",
        "bias": True,
    },
    "predictor": {"selection": {"kind": "predictor", "top_k": 16, "rank": 12}},
    "remainder": {"selection": {"kind": "threshold", "input": 0.9, "hidden": 0.3, "remainder": 3}},
}
HASHED = {"num_heads": 2, "num_rows": 40}
UNCONVOLVED = {"class_path": "Engram", "init_args": {**HASHED, "convolution": False}}
FIELDS = {
    "plain": {},
    "memories": {
        "memory": [
            {"layers": [1], "class_path": "L3"},
            {
                "layers": "all",
                "class_path": "Engram",
                "init_args": {**HASHED, "convolution": False},
            },
        ]
    },
    "window": {"sliding_window": 5},
    "some_windows": {
        "num_hidden_layers": 3,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qk_norm": {"qk_norm": True, "attention_bias": True},
    "beside": {"parallel": "one_norm", "num_key_value_heads": 1},
}
ENDS = [7, 60]


@pytest.fixture
def build(make):
    """Build a model whose blocks read a part, or all for ``whole``, with the same weights."""

    def built(kind="thresholds", dtype=torch.float64, whole=False, **fields):
        arguments = {"d_ff": 48, **KINDS[kind]}
        fields = {"num_hidden_layers": 2, **fields}
        layers = [{"layers": "all", "class_path": "SelectiveFFN", "init_args": arguments}]
        model = make(ffn=layers, **fields)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not parameter.any() or "norm" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
            model.lm_head.weight.mul_(12)
        if whole:
            sparse = model.state_dict()
            plain = {k: v for k, v in arguments.items() if k != "selection"}
            layers = [{"layers": "all", "class_path": "DenseFFN", "init_args": plain}]
            model = make(ffn=layers, **fields)
            model.load_state_dict({k: v for k, v in sparse.items() if ".selector." not in k})
        return model.to(dtype).eval()

    return built


@pytest.fixture
def torch_steps(monkeypatch):
    """Compute by torch's operators alone, as on devices without kernels of ours."""
    monkeypatch.setattr(token_step, "MOST_SEQUENCES", 0)


def settings(new_tokens=18, **options):
    options = {"do_sample": False, "eos_token_id": ENDS, "pad_token_id": 60} | options
    return GenerationConfig(max_new_tokens=new_tokens, **options)


def prompts(*lengths, vocabulary=61):
    """Draw prompts, padded on the left."""
    longest = max(lengths)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(vocabulary, (len(lengths), longest), generator=generator)
    mask = torch.stack([F.pad(torch.ones(n).long(), (longest - n, 0)) for n in lengths])
    return ids, mask


def corrected(model, ids, mask, config, options, griffin=None, criteria=None, counts=None):
    return continue_ids(
        model,
        ids,
        mask,
        config,
        processors=LogitsProcessorList(),
        criteria=criteria,
        griffin=griffin,
        sirius=options,
        corrections=counts,
    )


@torch.no_grad()
def by_hand(full, sparse, prompt, config, options):
    """Write a text from the definition: all tokens anew each time, nothing kept.

    ``full(ids)`` and ``sparse(ids, begin)`` return logits ``(S, V)``; the second computes what
    stands before ``begin`` with all of the model.
    """
    counts = Corrections()
    text = prompt.tolist()
    limit = len(text) + config.max_new_tokens

    def ends(ids):
        return len(ids) == limit or ids[-1] in config.eos_token_id

    text.append(int(full(text)[-1].argmax()))
    while not ends(text):
        drafts = []
        while len(drafts) < options.period - 1 and not (drafts and ends(text + drafts)):
            drafts.append(int(sparse(text + drafts, len(text) - 1)[-1].argmax()))
        counts.checks += 1
        counts.steps += len(drafts)
        counts.reread += len(drafts) + (not ends(text + drafts))
        logits = full(text + drafts)[len(text) - 1 :]
        for number, draft in enumerate(drafts):
            choice = int(logits[number].argmax())
            likely = (logits[number].double() / options.temperature).softmax(-1)[draft]
            if draft != choice and likely < options.threshold:
                counts.dropped += len(drafts) - number
                counts.own += 1
                text.append(choice)
                break
            text.append(draft)
            counts.kept += 1
        else:
            if not ends(text):
                text.append(int(logits[len(drafts)].argmax()))
                counts.own += 1
    return torch.tensor(text), counts


def selective_by_hand(model, whole):
    """Return both models as functions: the tokens that are dense say where a draft begins."""

    def sparse(ids, begin):
        for block in model.model.layers:
            block.mlp.first_tokens = begin
        logits = model(torch.tensor([ids])).logits[0]
        for block in model.model.layers:
            block.mlp.first_tokens = 1
        return logits

    return lambda ids: whole(torch.tensor([ids])).logits[0], sparse


def assert_text_is(written, expected, row=0):
    """Compare a row, whose prompt stands last of the padded ones, with a text."""
    expected = torch.cat([expected, expected.new_full((len(written) - row,), 60)])
    assert torch.equal(written[row:], expected[: len(written) - row])


@pytest.mark.parametrize(
    ("kind", "period", "threshold", "length"),
    [
        ("thresholds", 5, 0.2, 1),
        ("mlp", 5, 0.2, 7),
        ("predictor", 5, 0.2, 7),
        ("remainder", 5, 0.2, 7),
        ("thresholds", 2, 0.3, 7),
        ("thresholds", 5, 1.0, 7),
        ("thresholds", 16, 0.0, 7),
    ],
)
def test_texts_and_counts_are_those_of_the_definition(build, kind, period, threshold, length):
    model, whole = build(kind), build(kind, whole=True)
    options, config, counts = Sirius(period, threshold), settings(), Corrections()
    ids, mask = prompts(length)
    written = corrected(model, ids, mask, config, options, counts=counts)
    expected, found = by_hand(*selective_by_hand(model, whole), ids[0], config, options)
    assert_text_is(written[0], expected)
    found.step_work, found.step_read = counts.step_work, counts.step_read
    assert counts == found
    assert bool(counts.dropped) == (threshold > 0)


@pytest.mark.parametrize(
    ("name", "steps"), [*((name, "native") for name in FIELDS), ("some_windows", "torch")]
)
def test_every_kind_of_attention(build, name, steps, request):
    if steps == "torch":
        request.getfixturevalue("torch_steps")
    elif reason := native.unusable(torch.device("cpu"), torch.float32):
        pytest.skip(f"C++ kernels: {reason}")
    model = build(dtype=torch.float32, **FIELDS[name])
    whole = build(dtype=torch.float32, whole=True, **FIELDS[name])
    (ids, mask), config, options = prompts(9), settings(eos_token_id=[]), Sirius(6, 0.2)
    written = corrected(model, ids, mask, config, options)
    expected, found = by_hand(*selective_by_hand(model, whole), ids[0], config, options)
    assert_text_is(written[0], expected)
    assert found.dropped
    assert found.kept


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str
)
@torch.no_grad()
def test_a_check_leaves_the_full_model_s_keys_and_values(build, dtype, tolerance, monkeypatch):
    model, whole = build(dtype=dtype), build(dtype=dtype, whole=True)
    (ids, mask), caches = prompts(6), []
    go_on = Decoder.return_to

    def look(decoder, place):
        go_on(decoder, place)
        held = [block.attending for block in decoder._blocks]
        caches.append(
            [(e.keys[:, :, :place].clone(), e.values[:, :, :place].clone()) for e in held]
        )

    monkeypatch.setattr(Decoder, "return_to", look)
    config = settings(30, eos_token_id=[])
    written = corrected(model, ids, mask, config, Sirius(7, 0.1))
    assert len(caches) > 4
    for layers in caches[::2]:
        length = layers[0][0].shape[2]
        cache = DynamicCache(config=whole.config)
        whole(written[:, :length], past_key_values=cache, use_cache=True)
        for (keys, values), layer in zip(layers, cache.layers, strict=True):
            for ours, theirs in ((keys, layer.keys), (values, layer.values)):
                assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("sampled", [False, True])
def test_where_agreement_alone_passes_the_text_is_the_full_model_s(build, sampled):
    """Also where it is drawn, by the same seed; a threshold below 1 lets other texts pass."""
    sampling = {"do_sample": True, "temperature": 1.1, "top_k": 30, "top_p": 0.9}
    config = settings(28, eos_token_id=[], **(sampling if sampled else {}))
    model, whole = build(), build(whole=True)
    differ, kept = 0, Corrections()
    for length in (3, 8):
        ids, mask = prompts(length)
        texts = {}
        for threshold in (None, 0.02, 1.0):
            torch.manual_seed(4)
            sharp = 1e-3 if threshold == 1 else 0.6  # a probability of 1, and yet another is drawn
            checks = {} if threshold is None else {"sirius": Sirius(5, threshold, sharp)}
            texts[threshold] = continue_ids(
                model if checks else whole,
                ids,
                mask,
                config,
                processors=LogitsProcessorList(),
                corrections=kept if threshold == 1 else None,
                **checks,
            )
        assert torch.equal(texts[1.0], texts[None])
        differ += not torch.equal(texts[0.02], texts[None])
    assert differ
    assert kept.kept > kept.checks / 2  # drawn by the same numbers, most tokens are the same
    assert kept.dropped


def test_a_batch_is_its_texts(build):
    model, options = build(sliding_window=6), Sirius(5, 0.15)
    config = settings(22)
    ids, mask = prompts(8, 3, 1, 6)
    counts, every = Corrections(), Corrections()
    together = corrected(model, ids, mask, config, options, counts=counts)
    ends = set()
    for row, real in enumerate(mask.sum(-1).tolist()):
        alone, first = ids[row : row + 1, 8 - real :], 8 - real
        text = corrected(model, alone, torch.ones_like(alone), config, options, counts=every)
        assert_text_is(together[row], text[0], first)
        ends.add(text.shape[1] - real)
    assert len(ends) > 1
    assert counts == every
    assert together.shape[1] == 8 + max(ends)


@pytest.mark.parametrize("period", [3, 9])
def test_a_text_ends_inside_a_period(build, period):
    """By a token, by its length or by a criterion: at the same token for every length before."""
    model, (ids, mask) = build(), prompts(5)
    options = Sirius(period, 0.1)
    text = corrected(model, ids, mask, settings(12, eos_token_id=[]), options)[0]
    for new in range(1, 12):
        short = corrected(model, ids, mask, settings(new, eos_token_id=[]), options)[0]
        assert torch.equal(short, text[: 5 + new])
        end = int(text[4 + new])
        stop = 1 + text[5:].tolist().index(end)
        ended = corrected(model, ids, mask, settings(12, eos_token_id=[end]), options)[0]
        assert torch.equal(ended, text[: 5 + stop])
    criteria = StoppingCriteriaList([MaxLengthCriteria(11)])
    stopped = corrected(model, ids, mask, settings(12, eos_token_id=[]), options, criteria=criteria)
    assert torch.equal(stopped[0], text[:11])


@torch.no_grad()
def test_griffin_s_neurons_are_corrected_by_all_of_them(build):
    """Rows of a batch keep neurons of their own."""
    model = build(whole=True)
    config, options = settings(14, eos_token_id=[]), Sirius(6, 0.1)
    ids, mask = prompts(9, 5)
    together = corrected(model, ids, mask, config, options, griffin=0.3)
    for row, length in enumerate((9, 5)):
        prompt = ids[row, 9 - length :]
        chosen = {}

        def look(module, inputs, chosen=chosen):
            chosen[module] = prompt_neurons(inputs[0][0], 0.3)

        layers = [block.mlp.down_proj for block in model.model.layers]
        handles = [layer.register_forward_pre_hook(look) for layer in layers]
        model(prompt[None])
        [handle.remove() for handle in handles]

        def sparse(ids, begin, chosen=chosen, layers=layers):
            def cut(module, inputs):
                hidden = inputs[0].clone()
                dropped = torch.ones(hidden.shape[-1], dtype=torch.bool)
                dropped[chosen[module]] = False
                hidden[:, begin:, dropped] = 0
                return (hidden,)

            handles = [layer.register_forward_pre_hook(cut) for layer in layers]
            logits = model(torch.tensor([ids])).logits[0]
            [handle.remove() for handle in handles]
            return logits

        full = lambda ids: model(torch.tensor([ids])).logits[0]  # noqa: E731
        expected, counts = by_hand(full, sparse, prompt, config, options)
        assert_text_is(together[row], expected, 9 - length)
        assert counts.dropped


class Products(TorchDispatchMode):
    """Counts products with matrices one of whose sides is among widths, and their numbers."""

    def __init__(self, *widths):
        super().__init__()
        self.widths, self.products, self.numbers = set(widths), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            tokens, matrix = args[-2:]
            if self.widths & set(matrix.shape):
                self.products += len(tokens) * matrix.numel()
                self.numbers += matrix.numel()
        return func(*args, **(kwargs or {}))


def test_work_and_reading_are_what_is_counted(build):
    model, (ids, mask) = build(whole=True), prompts(7)
    config, counts = settings(21, eos_token_id=[]), Corrections()
    with Products(48, 12) as prompt:
        corrected(model, ids, mask, settings(1), Sirius(4, 0.2), griffin=0.25)
    with Products(48, 12) as sirius:
        corrected(model, ids, mask, config, Sirius(4, 0.2), griffin=0.25, counts=counts)
    with Products(48, 12) as full:
        continue_ids(model, ids, mask, config, processors=LogitsProcessorList())
    work, read = (
        (getattr(sirius, name) - getattr(prompt, name))
        / (getattr(full, name) - getattr(prompt, name))
        for name in ("products", "numbers")
    )
    assert counts.tokens == 20
    assert counts.work == pytest.approx(work)
    assert counts.read == pytest.approx(read)
    assert counts.advance == pytest.approx(20 / counts.checks)
    assert counts.rolled_back == counts.dropped / counts.steps


def test_the_paper_s_effective_density():
    """Llama-3-8B on GSM8K: 15.22 of 16 tokens at density .65 are .706, 15.37 at .76 .807."""
    for advance, density, effective in ((15.22, 0.65, 0.706), (15.37, 0.76, 0.807)):
        kept = round(advance * 100) - 100
        counts = Corrections(100, 1600, 1500, kept, 1500 - kept, 100, density, density)
        assert counts.advance == pytest.approx(advance)
        assert counts.read == pytest.approx(effective, abs=1e-3)


def test_shares_of_a_step_are_those_that_were_calibrated(build):
    model = build()
    shares = [Shares(0.5, 0.4, 0.7, 0.2), Shares(1, 0.3, 1, 0.3)]
    for block, found in zip(model.model.layers, shares, strict=True):
        block.mlp.selector.shares.copy_(torch.tensor(found))
    work, read = step_shares(model, None)
    assert work == pytest.approx(sum(map(work_share, shares)) / 2, abs=1e-3)
    assert read == pytest.approx(sum(map(read_share, shares)) / 2)
    predictor = build("predictor")
    assert step_shares(predictor, None) == pytest.approx(
        (1 / 3 + 12 * (32 + 48) / (3 * 32 * 48),) * 2
    )
    assert step_shares(build(whole=True), 0.25) == (0.25, 0.25)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"threshold": 0.2}, "sirius.period: no check is asked for; set it"),
        ({"period": 1}, "sirius.period: 1 "),
        ({"period": 4, "threshold": 1.5}, "sirius.threshold: 1.5 "),
        ({"period": 4, "threshold": -0.5}, "sirius.threshold: -0.5 "),
        ({"period": 4, "threshold": float("nan")}, "sirius.threshold: nan "),
        ({"period": 4, "temperature": 0.0}, "sirius.temperature: 0 is too little to divide by"),
    ],
)
def test_options_out_of_range_are_refused(build, byte_tokenizer, options, told):
    model = build(vocab_size=257)
    with pytest.raises(InputError, match=told.replace(".", r"\.")):
        continue_text(model, byte_tokenizer, "a", sirius=Sirius(**options), max_new_tokens=2)


def test_models_that_cannot_be_checked_are_refused(build, byte_tokenizer):
    def refused(model, match, **options):
        options = {"sirius": Sirius(4), "max_new_tokens": 6, **options}
        with pytest.raises(InputError, match=match):
            continue_text(model, byte_tokenizer, "abc", **options)

    refused(build(whole=True, vocab_size=257), "sirius: every token is computed whole by this")
    model = build(vocab_size=257)
    refused(model, "griffin: the model has no dense feed-forward block", griffin=0.5)
    model.set_attn_implementation("eager")
    refused(model, "sirius: its attention backend is eager, and only our own decoding is checked")
    config = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    refused(LlamaForCausalLM(config), "sirius: every token is computed whole by this model")
    refused(LlamaForCausalLM(config), "griffin: LlamaForCausalLM is computed by", griffin=0.5)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "factor": 8.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.5] * 4,
        "original_max_position_embeddings": 8,
    }
    refused(build(vocab_size=257, rope_parameters=rope), "sirius: its rotary embeddings turn")
    memory = [{"layers": "all", "class_path": "Engram", "init_args": HASHED}]
    refused(build(vocab_size=257, memory=memory), "sirius: its memories convolve over tokens")


def test_the_command_prints_a_line_of_figures(build, byte_level_tokenizer, tmp_path, capsys):
    model = build(dtype=torch.float32, vocab_size=257)
    place = str(save_checkpoint(tmp_path / "model", model, byte_level_tokenizer))
    given = {"max_new_tokens": 24, "temperature": 0}
    options, counts = Sirius(5, 0.2), Corrections()
    expected = continue_text(
        model, byte_level_tokenizer, "To be", sirius=options, corrections=counts, **given
    )
    assert generate(place, "To be", sirius=options, stream=False, **given) == "To be" + expected
    assert capsys.readouterr() == ("", "")
    line = ["generate", "--checkpoint", place, "--prompt", "To be", "--max_new_tokens", "24"]
    line += ["--temperature", "0", "--sirius.period", "5", "--sirius.threshold", "0.2"]
    assert command.main(line) == 0
    out, error = capsys.readouterr()
    assert out == "To be" + expected + "\n"
    assert error == counts.line() + "\n"
    assert f"{counts.checks} checks, {counts.advance:.2f} tokens each; " in error
    assert command.main([*line, "--sirius.period", "1"]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("moezoo: error: sirius.period: 1 ")
    assert error.count("\n") == 1


def test_the_script_of_the_page_compares_texts(build, byte_level_tokenizer, tmp_path, capsys):
    """With the full model as the sparse one all texts agree; a sparse one's do not all."""
    for name, whole in (("sparse", False), ("full", True)):
        model = build(dtype=torch.float32, vocab_size=257, whole=whole)
        save_checkpoint(tmp_path / name, model, byte_level_tokenizer)
    (tmp_path / "text").write_text("To be, or not to be, that is the question")
    script = Path(__file__).parents[3] / "docs" / "real_models" / "correcting.py"
    main = runpy.run_path(str(script))["main"]
    places = [str(tmp_path / name) for name in ("sparse", "full", "text")]
    main([*places, "--prompts", "2", "--prompt_tokens", "9", "--new", "8", "--thresholds", "1"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    names = ["full model", "{} alone", "period 16, threshold 1"]
    expected = [name.format(sparse) for sparse in ("thresholds", "GRIFFIN") for name in names]
    assert [row[0] for row in rows] == expected
    assert [row[1] for row in rows[::3] + rows[2::3]] == ["1.00"] * 4
    assert float(rows[1][1]) < 1
    assert [row[2] for row in rows[2::3]] == [rows[0][2]] * 2  # the same perplexity
    assert all(row[4:] == ["–"] * 4 for row in rows[:2])
