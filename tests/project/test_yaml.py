"""YAML that is valid and yet not to be read: refused in one line, with its place."""

import pytest

from moezoo import __main__ as command
from moezoo.command import settings
from moezoo.command.messages import printable, size
from moezoo.command.parser import function_parser
from moezoo.command.settings import load_yaml, read_settings
from moezoo.errors import InputError


def refusal(tmp_path, text) -> str:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        read_settings(str(file))
    message = str(error.value)
    assert message.startswith(f"{file}: ")
    assert "\n" not in message
    return message.removeprefix(f"{file}: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3, column 1: 'a' is given twice, first at line 1; remove one"),
        ("a:\n  b: 1\n  b: 1\n", "line 3, column 3: 'b' is given twice, first at line 2"),
        ("a: [{b: 1, 'b': 2}]\n", "line 1, column 12: 'b' is given twice"),
        ("a: &x\n  b: *x\n", "line 2, column 6: '*x' holds itself"),
        ('a: "b\\0"\n', "line 1, column 4: a value holds a NUL character"),
        (f"a: {'9' * 5000}\n", "Exceeds the limit (4300 digits)"),
        ("a: !!python/name:os.system\n", "not valid YAML at line 1, column 4: could not determine"),
    ],
)
def test_refused(tmp_path, text, expected):
    assert refusal(tmp_path, text).startswith(expected)


def test_what_aliases_repeat_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "MOST_VALUES", 20)
    assert load_yaml("a: &x [1, 2, 3]\nb: [*x, *x]\n") == {"a": [1, 2, 3], "b": [[1, 2, 3]] * 2}
    doubled = "a: &x [1, 2, 3]\nb: &y [*x, *x]\nc: [*y, *y]\n"
    assert refusal(tmp_path, doubled).startswith("line 3, column ")
    assert refusal(tmp_path, doubled).endswith("it stands for more than 20 values")


def test_depth_and_length_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "DEEPEST", 3)
    assert load_yaml("{a: [[1]]}") == {"a": [[1]]}
    assert refusal(tmp_path, "a: [[[1]]]") == "line 1, column 6: nested more than 3 deep"
    monkeypatch.setattr(settings, "LARGEST", 20)
    assert refusal(tmp_path, f"a: {'b' * 30}") == "it has 21 characters, more than 20"


def test_what_is_harmless_stays(tmp_path):
    merged = "a: &x {k: 1, l: 2}\nb: {<<: *x, k: 3}\nc: *x\n"
    assert load_yaml(merged)["b"] == {"k": 3, "l": 2}
    assert load_yaml("1: a\n'1': b\n") == {1: "a", "1": "b"}
    assert load_yaml("9" * 4000) == int("9" * 4000)
    file = tmp_path / "a.yaml"
    file.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_settings(str(file)) == {"a": 1}


def build(sizes: dict[str, int], name: str = "") -> None:
    """Build it."""


def test_every_value_of_an_option_is_read_so():
    """Text stays text, whatever it looks like."""
    parser = function_parser(build, "moezoo build")
    assert parser.parse_args(["--name={a: 1, a: 2}", "--sizes={a: 1}"]).name == "{a: 1, a: 2}"
    with pytest.raises(InputError) as error:
        parser.parse_args(["--sizes={a: 1, a: 2}"])
    assert str(error.value).startswith("sizes: '{a: 1, a: 2}' is not")


def test_commands_read_files_so(tmp_path, capsys):
    file = tmp_path / "a.yaml"
    file.write_text("d_model: 8\nd_model: 16\n")
    assert command.main(["zoo", f"--config={file}"]) == 2
    assert capsys.readouterr().err == (
        f"moezoo: error: {file}: line 2, column 1: 'd_model' is given twice, first at line 1; "
        "remove one\n"
    )


@pytest.mark.parametrize("arguments", [["--config", "a\0b"], ["--config=a\0b"]])
def test_nul_in_an_argument(arguments, capsys):
    assert command.main(["zoo", *arguments]) == 2
    assert "it holds a NUL character; remove it\n" in capsys.readouterr().err


def test_messages_are_short_and_do_not_steer_the_terminal(capsys):
    assert command.main(["x\x1b[31m" + "y" * 5000]) == 2
    error = capsys.readouterr().err
    assert error.startswith("moezoo: error: there is no command 'x\\x1b[31myyy")
    assert len(error) < 1100
    assert printable("a\tb") == "a\\tb"
    assert printable("ü " * 3) == "ü " * 3


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e6, "2.5 MB"), (12e12, "12,000.0 GB")],
)
def test_sizes_are_never_rounded_to_nothing(count, text):
    assert size(count) == text
