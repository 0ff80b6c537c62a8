"""A checkpoint's description against a run's: options that a layer has had since then."""

import copy

import pytest

import moezoo
from moezoo import InputError, SparseMoE
from moezoo_train.checkpoint import identity
from moezoo_train.checkpoint_structure import check_same


def _described(**arguments):
    config = SparseMoE(16, d_expert=8, **arguments).config()
    config["init_args"].pop("d_model")
    return identity.completed({"vocab_size": 40, "ffn": [{"layers": "all", **config}]})


def _older(description):
    """Take away what decoder and SparseMoE did not have before, and a field of an option."""
    older = copy.deepcopy(description)
    for name in ("norm", "norm_placement", "residual_multiplier", "attn_logit_softcapping"):
        del older[name]
    arguments = older["ffn"][0]["init_args"]
    del arguments["glu"], arguments["shared_glu"]
    del arguments["router"]["expert_dropout"]
    return older


def test_a_checkpoint_from_before_an_option_is_the_same_model():
    now = _described(router=moezoo.RouterOptions(scale=2.0))
    check_same("model", identity.completed(_older(now)), now)
    with pytest.raises(InputError):
        check_same("model", _older(now), now)


def test_another_value_than_the_default_differs():
    now = _described(glu=moezoo.GLUOptions(limit=7.0))
    with pytest.raises(InputError, match=r"init_args.glu.limit is None in the .*, but 7.0 in"):
        check_same("model", identity.completed(_older(now)), now)


def test_another_norm_than_the_default_differs():
    now = _described() | {"norm": "layer"}
    with pytest.raises(InputError, match=r"model.norm is rms in the checkpoint, but layer in"):
        check_same("model", identity.completed(_older(now)), now)


def test_an_option_that_is_no_longer_known_differs():
    now = _described()
    older = copy.deepcopy(now)
    older["ffn"][0]["init_args"]["gone"] = 3
    with pytest.raises(InputError, match=r"init_args.gone is 3 in the checkpoint"):
        check_same("model", identity.completed(older), now)


def test_a_stock_description_is_left_as_it_is():
    assert identity.completed({"hidden_size": 3}) == {"hidden_size": 3}
