"""Rows of n-grams: every backend and instruction set gives the whole numbers of the formula."""

import pytest
import torch

import moezoo_kernels
from moezoo_kernels import ngram_rows
from moezoo_kernels.ngram_rows import cpu, plain

# Sizes on both sides of what doubles divide by, and next to the largest.
SIZES = {"small": [2, 3, 97, 8191], "large": [8209, 262139, 2147483629, 4294967291]}


def problem(sizes: list[int], orders: int, polynomial: bool, boundary: int | None, masked: bool):
    """Classes so large that products come close to 2^63, in sequences longer than asked for."""
    generator = torch.Generator().manual_seed(orders)
    vocabulary = 2000
    ids = torch.randint(vocabulary, (2, 3, 37), generator=generator)
    ids[:, :, ::5] = 3
    mask = torch.rand(2, 3, 37, generator=generator) < 0.8 if masked else None
    classes = torch.arange(vocabulary + 1)
    most = ((1 << 63) - 1) // (vocabulary + 1)
    factors = torch.randint(most - 1000, most, (orders + 1,), generator=generator)
    if polynomial:
        factors = factors[:0]
    return {
        "token_ids": ids,
        "mask": mask,
        "classes": classes,
        "multipliers": factors,
        "sizes": sizes,
        "offsets": [sum(sizes[:head]) for head in range(len(sizes))],
        "orders": orders,
        "boundary": boundary,
        "length": 35,
    }


@pytest.mark.parametrize("polynomial", [False, True])
@pytest.mark.parametrize("orders", [1, 2, 4])
@pytest.mark.parametrize("kind", SIZES)
def test_rows_in_cpp_are_those_of_whole_numbers(
    native_library, poison_empty, kind, orders, polynomial
):
    for heads, boundary, masked in ((1, None, False), (2, 3, False), (11, 3, True)):
        sizes = (SIZES[kind] * 12)[: heads * orders]
        given = problem(sizes, orders, polynomial, boundary, masked)
        with moezoo_kernels.use("cpu"):
            found = ngram_rows(**given)
        with moezoo_kernels.use("reference"):
            assert torch.equal(found, ngram_rows(**given))


@pytest.mark.parametrize("polynomial", [False, True])
def test_plain_torch_gives_the_same_rows(polynomial):
    for boundary, masked, length in ((None, False, 37), (3, True, 35), (3, False, 1)):
        given = problem(SIZES["small"] + SIZES["large"], 2, polynomial, boundary, masked)
        given["length"] = length
        found = []
        for backend in ("torch", "reference"):
            with moezoo_kernels.use(backend):
                found.append(ngram_rows(**given))
        assert torch.equal(*found)


def test_the_rows_depend_on_no_number_of_threads(native_library, poison_empty):
    """Also where there are so many that their memory is asked for ahead."""
    given = problem(SIZES["large"], 2, False, 3, False)
    given["token_ids"] = given["token_ids"].repeat(1, 1, 4000)[..., :140001].to(torch.int32)
    given["length"] = 140001
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(ngram_rows(**given))
    torch.set_num_threads(before)
    assert torch.equal(*found)
    with moezoo_kernels.use("torch"):
        assert torch.equal(found[0], ngram_rows(**given))


def test_nothing_has_no_rows_and_what_is_no_token_is_named(native_library):
    given = problem(SIZES["small"], 2, False, None, False)
    nothing = {**given, "token_ids": given["token_ids"][:0], "length": 5}
    assert ngram_rows(**nothing).shape == (0, 3, 5, 4)
    for wrong in (-1, 2000):
        given["token_ids"][1, 1, 4] = wrong
        with pytest.raises(ValueError, match=f"token_ids: {wrong} is not a token; give 0 … 1999"):
            ngram_rows(**given)


def test_the_ops_are_whole(native_library):
    given = problem(SIZES["small"], 2, False, 3, True)
    names = ("token_ids", "mask", "classes", "multipliers", "sizes", "offsets", "orders")
    arguments = [given[name] for name in names]
    torch.library.opcheck(cpu._ngram_rows, (*arguments, 3, 35))


def test_remainders_are_those_of_whole_numbers_at_every_size(poison_empty):
    """At the least and the largest mixes, next to multiples of a prime, in more than one block."""
    for size in (2, 262139, 33554393, 2147483629):
        near = ((1 << 63) - 1) - torch.arange(1000)
        some = torch.randint((1 << 63) - 1, (20000,), generator=torch.Generator().manual_seed(size))
        mixes = torch.cat([torch.arange(2000), near, some]).unsqueeze(0)
        found = plain.remainders(mixes, [size, 7], [5, 0])
        for row, (modulus, offset) in enumerate(((size, 5), (7, 0))):
            assert found[row].tolist() == [mix % modulus + offset for mix in mixes[0].tolist()]
    torch.library.opcheck(plain.remainders, (mixes[:, :9], [7, 11], [0, 7]))


@pytest.mark.parametrize("size", [2, 8191, 8209, 4294967291])
def test_numbers_next_to_multiples_are_divided_exactly(native_library, size):
    """A token alone, times one: the mix of the first order is the class itself."""
    multiple = ((1 << 63) - 1) // size * size
    ends = torch.tensor([0, 1, size - 1, size, size + 1, multiple - 1, multiple, (1 << 63) - 1])
    classes = torch.cat([ends, ends[:1]])
    given = {
        "token_ids": torch.arange(8),
        "mask": None,
        "classes": classes,
        "multipliers": torch.tensor([1, 0]),
        "sizes": [size],
        "offsets": [0],
        "orders": 1,
        "boundary": None,
        "length": 8,
    }
    assert ngram_rows(**given)[:, 0].tolist() == [number % size for number in ends.tolist()]
