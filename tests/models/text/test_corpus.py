import json
import sys
import sysconfig
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from moezoo.errors import InputError
from moezoo_models.text import corpus, rows
from moezoo_models.text.corpus import FileCorpus, open_corpus


def documents(source, **options):
    return list(open_corpus(str(source), **options).documents())


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_table(file, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), file)


def assert_one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


class TestStandardLibrary:
    def test_holds_modules_and_no_tests(self):
        library = open_corpus("stdlib")
        names = [file.relative_to(library.root).as_posix() for file in library.files]
        assert {"argparse.py", "json/decoder.py"} <= set(names)
        assert names == sorted(names)
        folders = {part for name in names for part in name.split("/")[:-1]}
        assert folders.isdisjoint({"test", "tests", "idle_test", "site-packages", "__pycache__"})

    def test_is_the_same_every_time(self):
        one, other = open_corpus("stdlib"), open_corpus("stdlib")
        assert one.manifest() == other.manifest()
        first = next(one.documents())
        assert first == next(other.documents())
        assert first == Path(one.files[0]).read_bytes().decode()

    def test_leaves_out_what_is_no_text(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
        (tmp_path / "a.py").write_text("a = 1\n")
        (tmp_path / "b.py").write_bytes(b"# \xe9 in Latin-1\n")
        (tmp_path / "c.py").write_bytes(b"c = '\0'\n")
        (tmp_path / "d.py").symlink_to(tmp_path / "nowhere")
        (tmp_path / "e.py").write_text("")
        (tmp_path / "f.py").write_text("f = 1\n")
        (tmp_path / "test").mkdir()
        (tmp_path / "test/test_a.py").write_text("assert a\n")
        assert documents("stdlib") == ["a = 1\n", "f = 1\n"]
        assert len(open_corpus("stdlib").manifest()) == 64


class TestText:
    def test_one_file_becomes_stretches_at_blank_lines(self, tmp_path):
        paragraph = "word " * 200 + "\n\n"
        text = paragraph * 20
        (tmp_path / "book.txt").write_text(text)
        stretches = documents(tmp_path / "book.txt")
        assert "".join(stretches) == text
        assert len(stretches) == 5
        assert all(stretch.endswith("\n\n") for stretch in stretches)

    @pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
    def test_every_character_is_kept(self, tmp_path, newline):
        text = f"one{newline}{newline}  two\t😀{newline}" * 3000
        (tmp_path / "a.txt").write_bytes(text.encode())
        stretches = documents(tmp_path / "a.txt")
        assert "".join(stretches) == text
        assert len(stretches) > 5

    def test_no_stretch_is_endless(self, tmp_path):
        text = "x" * 100_000
        (tmp_path / "a.txt").write_text(text)
        stretches = documents(tmp_path / "a.txt")
        assert "".join(stretches) == text
        assert max(map(len, stretches)) <= 2 * corpus.LONGEST_STRETCH

    def test_files_of_a_folder_are_one_document_each(self, tmp_path):
        (tmp_path / "sub").mkdir()
        (tmp_path / "b.txt").write_text("b\n\n" * 5000)
        (tmp_path / "sub/a.txt").write_text("a")
        (tmp_path / "c.txt").write_text("")
        (tmp_path / "image.png").write_bytes(b"\x89PNG")
        (tmp_path / ".hidden.txt").write_text("hidden")
        assert documents(tmp_path) == ["b\n\n" * 5000, "a"]

    def test_glob(self, tmp_path):
        for name in ("a/1.txt", "a/2.txt", "b/1.txt"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(name)
        assert documents(f"{tmp_path}/*/1.txt") == ["a/1.txt", "b/1.txt"]
        assert documents(f"{tmp_path}/**/*.txt") == ["a/1.txt", "a/2.txt", "b/1.txt"]

    def test_binary_file(self, tmp_path):
        (tmp_path / "nul.txt").write_bytes(b"text\0text")
        (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
        for name, reason in (("nul.txt", "binary"), ("latin.txt", "UTF-8")):
            with pytest.raises(InputError) as error:
                documents(tmp_path / name)
            assert_one_line(error, "source", name, reason)
        with pytest.raises(InputError, match=r"latin\.txt is not UTF-8"):
            documents(tmp_path)


class TestEncodings:
    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
    def test_a_byte_order_mark_is_no_text(self, tmp_path, name):
        text = "the cat" if name.endswith("txt") else '{"text": "the cat"}'
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert documents(tmp_path / name) == ["the cat"]
        assert documents(tmp_path) == ["the cat"]

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
    @pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
    def test_another_encoding_is_named(self, tmp_path, name, encoding):
        (tmp_path / name).write_bytes('{"text": "the cat"}'.encode(encoding))
        for source in (tmp_path / name, tmp_path):
            with pytest.raises(InputError) as error:
                documents(source)
            assert_one_line(error, f"it is {encoding.upper()}); convert it to UTF-8")

    def test_an_error_without_words_of_the_system_keeps_its_own(self, tmp_path, monkeypatch):
        def fail(*_):
            raise OSError("the page is damaged")
            yield

        monkeypatch.setattr(corpus, "read_jsonl", fail)
        (tmp_path / "a.jsonl").write_text("{}\n")
        with pytest.raises(InputError) as error:
            documents(tmp_path / "a.jsonl")
        assert_one_line(error, "a.jsonl cannot be read: the page is damaged")


class TestRows:
    def test_jsonl(self, tmp_path):
        write_rows(
            tmp_path / "a.jsonl", [{"text": "one\n\u2028"}, {"text": ""}, {"text": "\0 é😀"}]
        )
        assert documents(tmp_path / "a.jsonl") == ["one\n\u2028", "\0 é😀"]

    def test_parquet(self, tmp_path):
        write_table(tmp_path / "a.parquet", body=["one", None, "two"], n=[1, 2, 3])
        assert documents(tmp_path / "a.parquet", text_field="body") == ["one", "two"]

    def test_folder_of_several_kinds_is_read_by_name(self, tmp_path):
        write_table(tmp_path / "b.parquet", text=["3", "4"])
        write_rows(tmp_path / "a.jsonl", [{"text": "1"}, {"text": "2"}])
        (tmp_path / "c.txt").write_text("5")
        assert documents(tmp_path) == ["1", "2", "3", "4", "5"]

    def test_missing_field_proposes_the_nearest(self, tmp_path):
        write_rows(tmp_path / "a.jsonl", [{"text": "x"}, {"texts": "x", "id": 3}])
        write_table(tmp_path / "a.parquet", texts=["x"])
        with pytest.raises(InputError) as error:
            documents(tmp_path / "a.jsonl")
        assert_one_line(error, "text_field", "line 2", "did you mean 'texts'")
        with pytest.raises(InputError) as error:
            documents(tmp_path / "a.parquet")
        assert_one_line(error, "text_field", "a.parquet", "did you mean 'texts'")

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ('{"text": "cut', "line 1 is not JSON"),
            ('["text"]', "not an object"),
            ('{"text": 3}', "is a int, not text"),
            ('{"text": "\\ud800"}', "half a surrogate pair"),
            (f'{{"text": "a", "n": {"9" * 5000}}}', "line 1 is not JSON to be read: Exceeds"),
            ('{"text": "a", "text": "b"}', "line 1 is not JSON to be read: 'text' is given twice"),
        ],
    )
    def test_bad_row(self, tmp_path, line, reason):
        (tmp_path / "a.jsonl").write_text(line + "\n")
        with pytest.raises(InputError) as error:
            documents(tmp_path / "a.jsonl")
        assert_one_line(error, reason)

    def test_bad_parquet(self, tmp_path):
        (tmp_path / "a.parquet").write_bytes(b"PAR1 no, it is not")
        with pytest.raises(InputError) as error:
            documents(tmp_path / "a.parquet")
        assert_one_line(error, "a.parquet is not a parquet file")
        assert "None" not in str(error.value)
        write_table(tmp_path / "b.parquet", text=[1, 2])
        with pytest.raises(InputError, match="row 1 is a int, not text"):
            documents(tmp_path / "b.parquet")

    def test_a_deep_row_is_refused_as_python_refuses_it(self, tmp_path, monkeypatch):
        def too_deep(*args, **options):
            raise RecursionError("maximum recursion depth exceeded")

        monkeypatch.setattr(rows.json, "loads", too_deep)
        (tmp_path / "a.jsonl").write_text("[[]]\n")
        with pytest.raises(InputError) as error:
            documents(tmp_path / "a.jsonl")
        assert_one_line(error, "a.jsonl line 1 is not JSON to be read: maximum recursion depth")

    def test_a_damaged_page_of_a_table(self, tmp_path):
        """It carries a checksum where its writer made one."""
        file = tmp_path / "a.parquet"
        rows = pyarrow.table({"text": ["the cat sat", "on the mat"]})
        pyarrow.parquet.write_table(rows, file, write_page_checksum=True, compression="none")
        data = file.read_bytes()
        at = data.index(b"the cat sat")
        file.write_bytes(data[:at] + b"X" + data[at + 1 :])
        with pytest.raises(InputError) as error:
            documents(file)
        assert_one_line(error, "a.parquet is not a parquet file, or is damaged: ", "CRC")

    def test_missing_package(self, tmp_path, monkeypatch):
        write_table(tmp_path / "a.parquet", text=["x"])
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(InputError, match=r"moezoo\[data\].*pyarrow"):
            documents(tmp_path / "a.parquet")
        with pytest.raises(InputError, match=r"moezoo\[data\].*datasets"):
            open_corpus("hf:someone/something")


class TestHub:
    def test_local_dataset_folder(self, tmp_path):
        write_rows(tmp_path / "train.jsonl", [{"text": "one"}, {"text": ""}, {"text": "two"}])
        assert documents(f"hf:{tmp_path}") == ["one", "two"]
        before = open_corpus(f"hf:{tmp_path}").manifest()
        write_rows(tmp_path / "train.jsonl", [{"text": "three"}])
        assert open_corpus(f"hf:{tmp_path}").manifest() != before
        with pytest.raises(InputError, match=r"text_field: .* row 1 has no 'body'"):
            documents(f"hf:{tmp_path}", text_field="body")

    def test_streams_one_revision_of_the_train_split(self, monkeypatch):
        import datasets
        import huggingface_hub

        asked = {}

        class Info:
            sha = "abc"

        def load_dataset(name, config, **options):
            asked.update(name=name, config=config, **options)
            return [{"text": "one"}, {"text": "two"}]

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name: Info)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        one = open_corpus("hf:someone/something:small")
        assert list(one.documents()) == ["one", "two"]
        assert asked == {
            "name": "someone/something",
            "config": "small",
            "split": "train",
            "streaming": True,
            "revision": "abc",
        }
        before = one.manifest()
        assert open_corpus("hf:someone/something:large").manifest() != before
        Info.sha = "def"
        assert open_corpus("hf:someone/something:small").manifest() != before

    def test_failures_are_one_line(self, monkeypatch):
        import datasets
        import huggingface_hub

        def fail(*args, **options):
            raise ConnectionError("no route\nto host")

        with monkeypatch.context() as patch:
            patch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
            with pytest.raises(InputError) as error:
                open_corpus("hf:someone/something")
            assert_one_line(error, "hf:someone/something cannot be loaded: no route")

        class Info:
            sha = "abc"

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name: Info)
        monkeypatch.setattr(datasets, "load_dataset", fail)
        with pytest.raises(InputError, match="cannot be loaded: no route"):
            documents("hf:someone/something")

    def test_no_name(self):
        with pytest.raises(InputError, match="names no dataset"):
            open_corpus("hf:")


class TestSource:
    @pytest.mark.parametrize("source", ["", "missing.txt", "missing/", "stdlibs", "missing/*.txt"])
    def test_nothing_there(self, source, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError) as error:
            open_corpus(source)
        assert_one_line(error, "source")

    def test_unknown_kind(self, tmp_path):
        (tmp_path / "a.docx").write_bytes(b"PK")
        for source in (tmp_path / "a.docx", tmp_path / "*.docx", tmp_path):
            with pytest.raises(InputError) as error:
                open_corpus(str(source))
            assert_one_line(error, "source", ".jsonl")

    def test_total_bytes(self, tmp_path):
        (tmp_path / "a.txt").write_text("é" * 10)
        (tmp_path / "b.txt").write_text("x" * 5)
        assert open_corpus(str(tmp_path)).total_bytes == 25
        write_table(tmp_path / "c.parquet", text=["x"])
        assert open_corpus(str(tmp_path)).total_bytes is None


class TestManifest:
    def test_follows_content_and_names_but_not_the_place(self, tmp_path):
        def folder(name, **files):
            (tmp_path / name).mkdir()
            for stem, text in files.items():
                (tmp_path / name / f"{stem}.txt").write_text(text)
            return open_corpus(str(tmp_path / name)).manifest()

        original = folder("original", a="one", b="two")
        assert folder("copy", a="one", b="two") == original
        others = [
            folder("edited", a="one", b="twO"),
            folder("renamed", a="one", c="two"),
            folder("swapped", a="two", b="one"),
            folder("more", a="one", b="two", c=""),
        ]
        assert len({original, *others}) == 5

    def test_one_file_and_its_folder_differ_as_their_documents_do(self, tmp_path):
        (tmp_path / "a.txt").write_text("one")
        assert open_corpus(str(tmp_path)).manifest() != (
            open_corpus(str(tmp_path / "a.txt")).manifest()
        )

    def test_unreadable_file(self, tmp_path):
        missing = FileCorpus("x", tmp_path, [tmp_path / "gone.txt"])
        with pytest.raises(InputError, match=r"gone\.txt cannot be read: No such file"):
            missing.manifest()
        with pytest.raises(InputError, match=r"gone\.txt cannot be read: No such file"):
            list(missing.documents())
