"""How rows of a table are allotted to tokens."""

import itertools

import torch

from moezoo.routing.row_allocation import frequent_rows, uniform_rows, word_rows


def test_rows_are_dealt_out_evenly():
    assert uniform_rows(5, 13).tolist() == [3, 3, 3, 2, 2]
    assert uniform_rows(3, 3).tolist() == [1, 1, 1]


def test_frequent_tokens_get_rows_such_that_the_least_served_is_served_best():
    counts = torch.tensor([9, 0, 40, 3, 14])
    for num_rows, most in itertools.product((5, 8, 11), (3, 9)):
        found = frequent_rows(counts, num_rows, most)
        assert (int(found.sum()), int(found.min())) == (num_rows, 1)
        assert int(found.max()) <= most
        # Of all allotments, none has fewer occurrences per row where a row may still be added.
        open_ = [t for t in range(5) if found[t] < most]
        worst = max(float(counts[t] / found[t]) for t in open_)
        for other in itertools.product(range(1, most + 1), repeat=5):
            if sum(other) == num_rows and all(
                o == most for t, o in enumerate(other) if t not in open_
            ):
                assert max(float(counts[t] / other[t]) for t in open_) >= worst - 1e-12
    assert frequent_rows(counts, 15, 3).tolist() == [3] * 5


def test_frequent_words_give_their_last_token_a_row():
    # 0 1|0 1 2|0 1 2 3|0 1 2 3 4: each word is one that is known, and a token behind it.
    text = [0, 1, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4]
    # 01, 012 and 0123 count twice, once as new ones and once as known ones; 0 and 01234 once.
    assert word_rows(text, 6, 6, 9).tolist() == [1] * 6
    assert word_rows(text, 6, 7, 9).tolist() == [1, 2, 1, 1, 1, 1]
    rows = word_rows(text, 6, 10, 9).tolist()
    assert (rows, sum(rows)) == ([2, 2, 2, 2, 1, 1], 10)
    # What no word asks for is dealt out by frequency: 0, 1 and 2 occur thrice or more.
    assert word_rows(text, 6, 14, 3).tolist() == [3, 3, 3, 2, 2, 1]


def test_words_end_with_documents():
    text = [0, 5, 1, 5] * 30
    # 05 and 15 count 30 times, 0 and 1 once; longer words of this text end with 5 more often.
    assert word_rows(text, 6, 9, 99, end=5).tolist() == [2, 1, 1, 1, 1, 3]
    assert word_rows(text, 6, 9, 99).tolist() == [1, 1, 1, 1, 1, 4]
