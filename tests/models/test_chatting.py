"""Conversations turn after turn, with an answer that repeats what it was given."""

import io

import pytest
import tokenizers
import transformers

from moezoo.errors import InputError
from moezoo_models.chatting import Chat, talk
from moezoo_models.text.tokenizer import HuggingFaceTokenizer

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def words():
    vocabulary = {c: i for i, c in enumerate(tokenizers.pre_tokenizers.ByteLevel.alphabet())}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|eos|>", "<|end|>"])
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>")
    hf.chat_template = TEMPLATE
    return HuggingFaceTokenizer(hf)


@pytest.fixture
def chat(words):
    asked = []

    def answer(ids, ends, on_text):
        assert ends == [words.hf.convert_tokens_to_ids("<|end|>")]
        asked.append(words.hf.decode(ids))
        text = f"answer {len(asked)}"
        if on_text is not None:
            on_text(text)
        return text

    chat = Chat(answer, words, "Be brief.")
    chat.asked = asked
    return chat


def test_each_question_knows_those_before(chat, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    assert talk(chat, "", stream=True) == "answer 2"
    assert capsys.readouterr().out == "answer 1\nanswer 2\n"
    begin = "<|system|>Be brief.<|end|><|user|>one<|end|><|assistant|>"
    assert chat.asked == [
        begin,
        f"{begin}answer 1<|end|><|user|>two<|end|><|assistant|>",
    ]


def test_a_refused_question_leaves_the_conversation(chat, capsys):
    before = list(chat.messages)
    with pytest.raises(InputError, match="prompt: message 2 spells the special token"):
        talk(chat, "x<|end|>", stream=True)
    assert chat.messages == before
    assert talk(chat, "y", stream=False) == "answer 1"
    assert capsys.readouterr().out == ""
