"""Invented facts: repeatable, distinct, and recalled exactly by a model that knows them."""

from __future__ import annotations

import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moezoo.errors import InputError
from moezoo_train.experiments.made_up_facts import (
    NUM_WORDINGS,
    WORDINGS,
    fact_documents,
    make_facts,
    recall,
    tie_anew,
    write_documents,
)

EOS, VOCABULARY = 256, 257


class Bytes:
    """A token per byte."""

    eos_id = EOS

    def encode(self, text):
        return list(text.encode())


class GreedyBytes(Bytes):
    """Merges "in " into one token, so that the question's end is cut otherwise in the sentence."""

    def encode(self, text):
        return list(text.encode().replace(b"in ", b"\xff"))


class LineBytes(Bytes):
    """Merges a full stop and the line's end, as a tokenizer trained on the documents does."""

    def encode(self, text):
        return list(text.encode().replace(b".\n", b"\xfe"))


class Knowing(nn.Module):
    """Says, with certainty, what follows in the documents that it knows; else the letter x."""

    device = torch.device("cpu")

    def __init__(self, documents):
        super().__init__()
        self.next = {}
        for ids in documents:
            for end in range(1, len(ids)):
                self.next[tuple(ids[:end])] = ids[end]

    def forward(self, input_ids, attention_mask, use_cache):
        assert not self.training
        said = torch.full_like(input_ids, ord("x"))
        for row, length in enumerate(attention_mask.sum(-1)):
            for end in range(1, int(length) + 1):
                said[row, end - 1] = self.next.get(tuple(input_ids[row, :end].tolist()), ord("x"))
        return SimpleNamespace(logits=20.0 * F.one_hot(said, VOCABULARY).float())


def test_facts_follow_from_the_seed_and_have_subjects_of_their_own():
    facts = make_facts(400, seed=3, values=10)

    assert facts == make_facts(400, seed=3, values=10)
    assert facts != make_facts(400, seed=4, values=10)
    assert facts[0].sentence(0) == "Dupovi lives in Tafomu."
    names = {fact.subject for fact in facts}
    assert len(names) == 400
    pools = {r: {f.value for f in facts if f.relation == r} for r in WORDINGS}
    assert [len(pool) for pool in pools.values()] == [10] * 4
    assert len(set.union(names, *pools.values())) == 440


def test_a_seed_ties_the_same_subjects_to_the_values_anew():
    facts = make_facts(40, values=8)
    tied = tie_anew(facts, 1)

    assert [(f.subject, f.relation) for f in tied] == [(f.subject, f.relation) for f in facts]
    assert sorted((f.relation, f.value) for f in tied) == sorted(
        (f.relation, f.value) for f in facts
    )
    assert sum(a.value != b.value for a, b in zip(tied, facts, strict=True)) > 10
    assert tied == tie_anew(facts, 1) != tie_anew(facts, 2)


def test_every_wording_is_another_and_names_the_subject():
    questions = {wording for wordings in WORDINGS.values() for wording in wordings}

    assert len(questions) == len(WORDINGS) * NUM_WORDINGS
    assert all(wording.count("{}") == 1 for wording in questions)


def test_documents_tell_each_fact_once_per_wording_and_repeat():
    facts = make_facts(5)
    documents = list(fact_documents(facts, [0, 2], seed=1, repeats=3, sentences=4))

    told = Counter(line for document in documents for line in document.splitlines())
    assert told == {fact.sentence(wording): 3 for fact in facts for wording in (0, 2)}
    assert [len(document.splitlines()) for document in documents] == [4, 4, 2] * 3
    assert documents != list(fact_documents(facts, [0, 2], seed=2, repeats=3, sentences=4))


def test_documents_are_written_as_preparing_reads_them(tmp_path):
    write_documents(tmp_path / "facts.jsonl", ["one\ntwo\n", "three\n"])

    rows = (tmp_path / "facts.jsonl").read_text().splitlines()
    assert [json.loads(row) for row in rows] == [{"text": "one\ntwo\n"}, {"text": "three\n"}]


@pytest.mark.parametrize("tokenizer", [Bytes(), GreedyBytes(), LineBytes()])
def test_a_model_recalls_what_documents_told_and_nothing_else(tokenizer):
    facts = make_facts(12, values=3)
    documents = fact_documents(facts[:9], [1], sentences=1)
    model = Knowing([[EOS, *tokenizer.encode(document)] for document in documents]).train()

    known = recall(model, tokenizer, facts[:9], [1], batch_size=4)
    assert (known.accuracy, known.questions) == (1.0, 9)
    assert known.loss == pytest.approx(math.log1p((VOCABULARY - 1) * math.exp(-20)), abs=1e-6)
    assert recall(model, tokenizer, facts, [1], batch_size=5).accuracy == 9 / 12
    assert recall(model, tokenizer, facts[:9], [1, 2]).accuracy == 0.5
    assert model.training


@pytest.mark.parametrize("tokenizer", [Bytes(), GreedyBytes()])
@pytest.mark.parametrize("letter", [0, -1])
def test_an_answer_with_one_wrong_letter_is_not_recalled(tokenizer, letter):
    (fact,) = make_facts(1)
    value = list(fact.value)
    value[letter] = "q"
    changed = f"{fact.question(1)} {''.join(value)}.\n"
    almost = recall(Knowing([[EOS, *tokenizer.encode(changed)]]), tokenizer, [fact], [1])

    assert almost.accuracy == 0.0
    assert almost.loss > 1.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: make_facts(0),
        lambda: make_facts(421_000, values=500),
        lambda: make_facts(3, values=0),
        lambda: recall(Knowing([]), Bytes(), make_facts(1), []),
    ],
)
def test_nothing_to_tell_or_to_ask_is_refused(call):
    with pytest.raises(InputError, match=r"^(facts|values): "):
        call()
