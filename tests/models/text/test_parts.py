"""Parts hold every document once, wherever files are cut."""

import json
import random

import pytest

from moezoo import InputError
from moezoo_models.text.corpus import open_corpus
from moezoo_models.text.parts import cut, files_of, measure, read_part


def documents(path, size, field="text"):
    """Return the documents of each part of about so many bytes."""
    corpus = files_of(open_corpus(str(path), field), str(path))
    parts = cut(corpus, measure(corpus), size)
    return [list(read_part(corpus, part)) for part in parts]


@pytest.fixture
def texts():
    chance = random.Random(0)
    words = ["naïve", "素数", "🦓", "bread", "x" * 40, 'quo"te', "\\"]
    return [f"{n} " + " ".join(chance.choices(words, k=chance.randint(1, 9))) for n in range(60)]


@pytest.mark.parametrize("size", [1, 7, 64, 300, 1 << 20])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_of_json_come_once_and_in_order(size, end, texts, tmp_path):
    rows = [json.dumps({"text": t}, ensure_ascii=n % 2 == 0) for n, t in enumerate(texts)]
    rows.insert(3, "")
    rows.insert(9, json.dumps({"text": ""}))
    file = tmp_path / "a.jsonl"
    file.write_bytes(("\ufeff" + end.join(rows)).encode())  # and no end behind the last
    found = documents(file, size)
    assert [text for part in found for text in part] == texts
    assert size > 64 or len(found) > len(texts) / 2
    assert list(open_corpus(str(file)).documents()) == texts


@pytest.mark.parametrize("size", [1, 50, 1 << 20])
def test_rows_of_a_table_come_once_and_in_order(size, texts, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"n": list(range(60)), "story": texts})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=17)
    found = documents(tmp_path / "a.parquet", size, "story")
    assert [text for part in found for text in part] == texts
    assert len(found) == {1: 60, 1 << 20: 4}.get(size, len(found))


@pytest.mark.parametrize("size", [1, 100, 5_000, 20_000])
def test_lines_of_text_come_once_and_in_order(size, tmp_path):
    chance = random.Random(1)
    lines = ["é" * chance.randint(0, 300) + "\n" * chance.randint(1, 2) for _ in range(150)]
    lines[40] = "素" * 40_000 + "\n"
    file = tmp_path / "a.txt"
    file.write_text("".join(lines), newline="")
    found = documents(file, size)
    assert "".join(text for part in found for text in part) == "".join(lines)
    assert max(len(text) for part in found for text in part) <= 2 * 16_000


def test_a_small_text_file_of_a_folder_stays_whole(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name}\n\n" * 3_000)
    assert documents(tmp_path, 10) == [["a\n\n" * 3_000], ["b\n\n" * 3_000]]
    assert len(documents(tmp_path / "a.txt", 1_000)) > 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": 3}\n', "a.jsonl at byte 14 is a int, not text"),
        (b'{"text": "a"}\n{"txt": "b"}\n', "a.jsonl at byte 14 has no 'text'"),
        (b'{"text": "a"}\n{"text": \n', "a.jsonl at byte 14 is not JSON"),
        (b'{"text": "a"}\n\xff\xfe\n', "a.jsonl is not UTF-8 text"),
    ],
)
def test_what_cannot_be_read_is_one_line(content, message, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        documents(tmp_path / "a.jsonl", 5)
    assert "\n" not in str(error.value)


def test_only_files_have_parts():
    with pytest.raises(InputError, match="source: stdlib is not made of files"):
        files_of(open_corpus("stdlib"), "stdlib")
