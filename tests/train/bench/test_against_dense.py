"""Cheaper copies of a dense model: what they are made of, and that they are compared."""

import dataclasses

import pytest
import torch

from moezoo.bench.case import PLAIN, Peer
from moezoo.bench.end_to_end import Job, Spent, run_whole
from moezoo.bench.runner import Options
from moezoo_models.decoding.decoder import Decoder
from moezoo_train.bench import CASES, against_dense, carved

QUICK = Options(quick=True, runs=2)
BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("name", ["decode-carved", "decode-selective"])
def test_copies_write_what_torch_writes(name):
    case = BY_NAME[name]
    wanted = {
        peer: case.peers[peer]
        for peer in ("dense", PLAIN, "one read of the weights")
        if peer in case.peers
    }

    def wrong(parts):
        def answer():
            tokens = against_dense._by_operators(parts).answer()["the tokens"]
            return {"the tokens": tokens.roll(1)}

        return Job(lambda: Spent(1e-9), answer)

    peers = {**wanted, "wrong": Peer(wrong)}
    *right, caught = run_whole(dataclasses.replace(case, peers=peers), QUICK)
    assert [result.outcome for result in right] == ["measured"] * len(wanted)
    assert caught.outcome == "differs"


def task(name, folder):
    case = BY_NAME[name]
    torch.manual_seed(0)
    with torch.no_grad():
        return case.build(case.setting(True, None), folder)


def test_a_cut_model_with_all_parts_active_is_the_dense_one(tmp_path):
    parts = task("decode-carved", tmp_path).parts
    dense = parts.dense.architecture.ours().eval()
    dense.load_state_dict(parts.dense.weights, assign=True)
    folder = tmp_path / "whole"
    folder.mkdir()
    whole = carved.cut(dense, 8, 8, 16, folder)
    ids = torch.randint(63, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, dense(ids).logits, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(parts.model(ids).logits, dense(ids).logits, atol=1e-2)
    blocks = Decoder(parts.model, ids, torch.ones_like(ids), 4)._blocks
    assert all(block.attend and block.feed for block in blocks)


def test_llama_cpp_writes_the_same_tokens_of_a_carved_model(tmp_path):
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    made = task("decode-carved", tmp_path)
    theirs = carved.CASES[0].peers["llama.cpp F32, carved"].build(made.parts)
    assert torch.equal(made.ours.answer()["the tokens"], theirs.answer()["the tokens"])
