"""Classes of tokens that read alike, from a tokenizer."""

from moezoo_models.text.classes import token_classes, token_texts


def test_bytes_that_read_alike_are_one_class(byte_tokenizer):
    texts = token_texts(byte_tokenizer, 260)
    assert texts[ord("a")] == "a"
    assert texts[200:] == [None] * 60  # parts of characters, the end, and ids that nobody knows
    classes = token_classes(byte_tokenizer, 260).tolist()
    assert classes[ord("a")] == classes[ord("A")] != classes[ord("b")]
    assert len({classes[ord(blank)] for blank in " \t\n"}) == 1
    assert len(set(classes[200:])) == 60


def test_special_tokens_are_classes_of_their_own(byte_level_tokenizer):
    texts = token_texts(byte_level_tokenizer, 257)
    assert texts[0] is None
    assert sorted(text for text in texts if text and text.isalnum())[:3] == ["0", "1", "2"]
    classes = token_classes(byte_level_tokenizer, 257).tolist()
    upper, lower = (texts.index(letter) for letter in "Qq")
    assert classes[upper] == classes[lower]
    assert classes.count(classes[0]) == 1
