"""Statistics are computed at once in training, and otherwise when they are read."""

import copy
import pickle
import weakref

import pytest
import torch

import moezoo
from moezoo.routing.deferred import DeferredStats, statistics

D = 16
WITH_STATS = [m for m in moezoo.zoo() if m.name not in ("dense_mlp", "dense_glu", "finedeep")]
WITHOUT = [m.name for m in moezoo.zoo() if m.arguments.get("matrices") is not None]
WITH_STATS = [m for m in WITH_STATS if m.name not in ("persistent_memory", *WITHOUT)]


class Sums:
    """Counts how often the sum of a tensor is computed."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        assert not torch.is_grad_enabled()
        return {"sum": x.sum()}


def layer(training):
    return torch.nn.Linear(1, 1).train(training)


def test_training_computes_at_once_and_evaluation_when_read():
    for training in (True, False):
        compute = Sums()
        stats = statistics(layer(training), compute, torch.ones(3))
        assert compute.calls == training
        assert list(stats) == ["sum"]
        assert stats["sum"] == 3
        assert "sum" in stats
        assert "other" not in stats
        assert stats == {"sum": torch.tensor(3.0)}
        assert len(stats) == compute.calls == 1


def test_nothing_is_kept_once_it_is_computed():
    x = torch.ones(3, requires_grad=True)
    product = 2 * x
    detached = weakref.ref(product)
    stats = statistics(layer(False), lambda of: {"of": of + 0}, product)
    del product
    assert detached() is None, "the graph is kept"
    held = torch.ones(4)
    alive = weakref.ref(held.untyped_storage())
    stats = statistics(layer(False), lambda of: {"of": of.sum()}, held)
    del held
    assert stats["of"] == 4
    assert alive() is None


def test_what_would_take_much_memory_is_computed_at_once():
    compute = Sums()
    statistics(layer(False), compute, torch.ones(1 << 20))
    assert compute.calls == 0
    statistics(layer(False), compute, torch.ones((1 << 20) + 1))
    assert compute.calls == 1


def test_copies_are_plain_dictionaries():
    stats = statistics(layer(False), lambda of: {"sum": of.sum()}, torch.ones(3))
    assert repr(stats) == "{'sum': tensor(3.)}"
    for copied in (copy.deepcopy(stats), pickle.loads(pickle.dumps(stats)), dict(stats)):
        assert type(copied) is dict
        assert copied == {"sum": torch.tensor(3.0)}


@pytest.mark.parametrize("method", WITH_STATS, ids=lambda method: method.name)
def test_layers_defer_in_evaluation_what_they_compute_in_training(method):
    torch.manual_seed(0)
    layer = method.build(D)
    hidden, tokens = torch.randn(1, 5, D), torch.randint(50, (1, 5))
    mask = torch.tensor([[True, True, False, True, True]])
    trained = layer.train()(hidden, token_ids=tokens, mask=mask).stats
    found = layer.eval()(hidden, token_ids=tokens, mask=mask).stats
    assert type(trained) is dict
    assert isinstance(found, DeferredStats)
    # Training may ask more, as all nodes of a tree.
    assert set(found) <= set(trained)
    assert all(not value.requires_grad for value in found.values())
    assert found["tokens"] == trained["tokens"] == 4


def test_a_compiled_layer_gives_a_plain_dictionary():
    layer = moezoo.UltraFastFFF(D, depth=2).eval()
    hidden = torch.randn(5, D)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)(hidden).stats
        expected = layer(hidden).stats
    assert type(compiled) is dict
    assert compiled.keys() == expected.keys()
    assert all(compiled[name].equal(expected[name]) for name in expected)
