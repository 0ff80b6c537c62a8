"""Addresses of n-grams: golden values of the public forms, what reaches what, collisions."""

import math

import pytest
import torch

from moezoo import InputError
from moezoo.routing import ngram
from moezoo.routing.ngram import NGramHash, distinct_primes, text_classes

QWEN = {"max_ngram": 3, "num_heads": 2, "num_rows": 500, "seed": 1234, "boundary_id": 2}
KINDS = ["splitmix", "numpy", "polynomial"]


def rows(hash_: NGramHash, ids: list[int], mask: torch.Tensor | None = None) -> list[list[int]]:
    """Return the rows of each token of one sequence."""
    tensor = torch.tensor([ids])
    return hash_(tensor, mask, len(ids))[:, 0].t().tolist()


def test_rows_are_those_of_qwen4_in_transformers():
    """Printed by transformers 5.23 with a vocabulary of 1000."""
    hash_ = NGramHash(1000, **QWEN)
    assert hash_.multipliers.tolist() == [
        5159850018220775, 4902196785138501, 6891410296393783,
    ]  # fmt: skip
    assert hash_.sizes == [503, 509, 521, 523]
    found = rows(hash_, [5, 7, 11, 2, 13, 17])
    assert found[0] == [160, 1001, 1358, 1676]
    assert found[-1] == [366, 598, 1435, 1584]
    changed = rows(hash_, [6, 7, 11, 2, 13, 17])
    assert [a != b for a, b in zip(found, changed, strict=True)] == [True] * 3 + [False] * 3
    # The end of a document still sees what precedes it, the token after it does not.
    changed = rows(hash_, [5, 7, 12, 2, 13, 17])
    assert [a != b for a, b in zip(found, changed, strict=True)] == [False] * 2 + [True] * 2 + [
        False
    ] * 2


def test_qwen4s_module_gives_the_same_rows():
    qwen4 = pytest.importorskip("transformers.models.qwen4_exp.modeling_qwen4_exp")
    config = qwen4.Qwen4ExpTextConfig(
        vocab_size=97, ngram_size=4, heads_per_ngram=3, ngram_vocab_size_base=50, eos_token_id=1,
        seed=7,
    )  # fmt: skip
    theirs = qwen4.Qwen4ExpTextNGramEmbedding(config, 9 * 2, 0, 1)
    seen = []
    theirs.ngram_embedding.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    ids = torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(0))
    theirs(ids, None)
    ours = NGramHash(
        97, max_ngram=4, num_heads=3, num_rows=50, index=1, seed=7, boundary_id=1
    )(ids, None, 40)  # fmt: skip
    assert torch.equal(ours.movedim(0, -1), seen[0])


def test_multipliers_are_those_of_the_demonstration():
    """Printed by the authors' code for seed 0, layer 1 and 1000 tokens."""
    assert ngram.numpy_multipliers(1000, 3, 0, 1) == [
        7593627661414631, 479593001838623, 3563315849468963,
    ]  # fmt: skip
    found = NGramHash(1000, num_rows=10, index=1, hash_function="numpy").multipliers
    assert found.tolist() == [7593627661414631, 479593001838623, 3563315849468963]


def expected(hash_: NGramHash, ids: list[int], t: int) -> list[int]:
    """The rows of one token of a document, in whole numbers of any size."""
    order = hash_.max_ngram
    tokens = [ids[t - i] if t >= i else hash_.vocab_size for i in range(order)]
    found = []
    for head, (size, offset) in enumerate(zip(hash_.sizes, hash_.offsets, strict=True)):
        n = 2 + head // hash_.num_heads
        if hash_.hash_function == "polynomial":
            value = sum(tokens[i] * hash_.vocab_size**i for i in range(n))
        else:
            value = 0
            for i in range(n):
                value ^= tokens[i] * int(hash_.multipliers[i])
        found.append(value % size + offset)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("vocab_size", "num_rows", "max_ngram"),
    [(7, 3, 2), (1000, 5001, 4), (131000, (1 << 18) - 100, 3), (131000, 20_000_000, 3)],
)
def test_rows_follow_the_formula_at_every_size(kind, vocab_size, num_rows, max_ngram):
    """Also where products of tokens and multipliers come close to 2^63."""
    hash_ = NGramHash(
        vocab_size, max_ngram=max_ngram, num_heads=2, num_rows=num_rows, hash_function=kind
    )
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocab_size, (300,), generator=generator).tolist()
    assert rows(hash_, ids) == [expected(hash_, ids, t) for t in range(300)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_n_places_later_is_not_reached(kind):
    hash_ = NGramHash(50, max_ngram=3, num_heads=3, num_rows=97, hash_function=kind)
    ids = torch.arange(20).unsqueeze(0) * 7 % 50
    before = hash_(ids, None, 20)
    for t in range(20):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % 50
        differs = (hash_(changed, None, 20) != before).any(0)[0]
        assert differs.nonzero().flatten().tolist() == list(range(t, min(t + 3, 20)))


@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_one_sequence_are_as_each_alone(kind):
    hash_ = NGramHash(50, num_heads=2, num_rows=101, boundary_id=3, hash_function=kind)
    first, second = [5, 9, 3], [8, 7, 6, 3]
    together = rows(hash_, first + second)
    assert together == rows(hash_, first) + rows(hash_, second)


@pytest.mark.parametrize("padding", [1, 2, 5])
def test_padding_is_no_token_and_hides_what_is_before_it(padding):
    hash_ = NGramHash(50, max_ngram=4, num_heads=2, num_rows=101)
    ids = [5, 9, 0, 7]
    for filler in (0, 49):
        mask = torch.tensor([[False] * padding + [True] * 4])
        assert rows(hash_, [filler] * padding + ids, mask)[padding:] == rows(hash_, ids)
    # A text that begins with token 0 is another than one that begins later.
    assert rows(hash_, [0, *ids])[1:] != rows(hash_, ids)


def test_earlier_tokens_may_stand_before_those_of_the_call():
    hash_ = NGramHash(50, max_ngram=4, num_heads=2, num_rows=101)
    ids = torch.arange(12).reshape(2, 6) * 11 % 50
    whole = hash_(ids, None, 6)
    for end in range(1, 7):
        assert torch.equal(hash_(ids[:, :end], None, 1), whole[..., end - 1 : end])
        assert torch.equal(hash_(ids[:, max(end - 4, 0) : end], None, 1), whole[..., end - 1 : end])


def test_primes_are_distinct_over_heads_and_tables():
    first, second = (NGramHash(50, num_rows=90, num_heads=3, index=i) for i in (0, 1))
    sizes = first.sizes + second.sizes
    assert len(set(sizes)) == len(sizes) == 12
    assert sizes == sorted(sizes)
    assert sizes[0] == 97
    for size in sizes:
        assert all(size % divisor for divisor in range(2, math.isqrt(size) + 1))
    assert distinct_primes(2, 5) == [2, 3, 5, 7, 11]
    assert not torch.equal(first.multipliers, second.multipliers)


def test_a_polynomial_of_a_multiple_of_the_vocabulary_is_warned_of():
    """It hardly mixes the token before: many pairs share a row that a random hash tells apart."""

    def collisions(num_rows: int) -> float:
        hash_ = NGramHash(
            1000, max_ngram=2, num_heads=1, num_rows=num_rows, hash_function="polynomial"
        )
        zipf = 1 / torch.arange(1, 1001, dtype=torch.float64)
        ids = torch.multinomial(zipf, 2 * 20000, True, generator=torch.Generator().manual_seed(0))
        pairs = ids.view(-1, 2).unique(dim=0)
        found = hash_(pairs, None, 2)[0, :, 1]
        return 1 - len(found.unique()) / len(pairs)

    with pytest.warns(UserWarning, match="num_rows: 5000 is a multiple of vocab_size 1000"):
        whole = collisions(5000)
    assert whole > 1.05 * collisions(5370)


def test_classes_of_tokens_are_hashed_in_their_place():
    texts = ["Apple", " apple", "\tÄpfel", "apfel ", None, " ", "  \n", "ﬁn", "fin", None, ""]
    classes = text_classes(texts)
    assert classes.tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 6]
    hash_ = NGramHash(len(texts), num_heads=2, num_rows=101)
    plain = rows(hash_, [0, 2, 7])
    assert plain != rows(hash_, [1, 3, 8])
    hash_.compress(classes)
    assert rows(hash_, [0, 2, 7]) == rows(hash_, [1, 3, 8]) != plain
    again = NGramHash(len(texts), num_heads=2, num_rows=101)
    again.load_state_dict(hash_.state_dict())
    assert rows(again, [0, 2, 7]) == rows(hash_, [0, 2, 7])
    hash_.reset_parameters()
    assert rows(hash_, [0, 2, 7]) == plain


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), r"classes: give 5 integers, not torch.int64 \(4,\)"),
        (torch.zeros(5), "classes: give 5 integers, not torch.float32"),
        (torch.arange(5) - 1, "classes: -1 to 3 are not numbers of classes; give 0 to 4"),
    ],
)
def test_classes_that_fit_no_vocabulary_are_refused(classes, message):
    with pytest.raises(InputError, match=message):
        NGramHash(5, num_rows=10).compress(classes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_ngram": 1}, "max_ngram: 1 is out of range"),
        ({"num_rows": 1}, "num_rows: 1 is out of range"),
        ({"boundary_id": 5}, "boundary_id: 5 is out of range"),
        ({"hash_function": "splitmx"}, "hash_function: 'splitmx' is not known; did you mean"),
    ],
)
def test_numbers_out_of_range_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        NGramHash(5, **{"num_rows": 10, **arguments})
