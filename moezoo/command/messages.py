"""Turn the parser's multi-line complaints into one line that names the key and the fix.

jsonargparse nests its messages as deeply as the configuration is nested, and prints Python types.
A reader wants the full key, what is wrong with it, and the nearest thing that would be right:
``model.ffn.init_args.num_expert: SparseMoE has no option 'num_expert'; did you mean …``.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from moezoo.errors import closest

_NESTED = re.compile(r'Parser key "(?P<key>[^"]+)":\s*(?P<rest>.*)', re.DOTALL)
_CALLABLE = re.compile(
    r"Type \S.*?(?P<base>[\w.]+)\] expects a function or a callable class: (?P<inner>.*)"
    r"\. Got value: (?P<value>.*)",
    re.DOTALL,
)
_IN_CLASS = re.compile(
    r"Problem with given class_path '(?P<path>[^']+)':\s*(?P<inner>.*)", re.DOTALL
)
_UNION = re.compile(
    r"Errors:\n(?P<errors>.*)\n\s*Given value type: .*?\n\s*Given value: (?P<value>.*)", re.DOTALL
)
_EXPECTED = re.compile(r"Expected an? (?P<type>.*?)(?:\. Got value: (?P<value>.*))?", re.DOTALL)
_UNKNOWN = re.compile(
    r"(?:Subcommand '[^']+' does not accept option|Option) '(?P<key>[^']+)'.*", re.DOTALL
)
_UNKNOWN_IN_GROUP = re.compile(r"Group '(?P<group>[^']+)' does not accept option '(?P<key>[^']+)'")
_UNRECOGNIZED = re.compile(r"unrecognized arguments: (?P<arguments>.*)", re.DOTALL)
_LINKED = re.compile(r'Linked "(?P<key>[^"]+)" must be given via "(?P<source>[^"]+)"\.')
_NO_VALUE = re.compile(r"argument (?P<option>--\S+): expected .*")
_REQUIRED = re.compile(r"the following arguments are required: (?P<keys>.*)", re.DOTALL)
_NO_CLASS = re.compile(r"module '(?P<module>[^']+)' has no attribute '(?P<name>[^']+)'")
_NO_MODULE = re.compile(r"No module named '(?P<name>[^']+)'")
_NO_PATH = re.compile(r"Expected a dot import path string: (?P<name>.+)")
_SUBCLASS_OF = re.compile(r"Subtypes: .*<class '(?P<path>[\w.]+)'>, <class 'NoneType'>\]")
_NO_CONFIG = re.compile(r"Unable to load config '(?P<value>[^']*)'\s+- .*", re.DOTALL)

_TYPE_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "NoneType": "null",
    "list": "a list",
    "dict": "a mapping",
}


def render(message: str, known: Iterable[str] = (), prefix: str = "", owner: str = "") -> str:
    """Return the one line that says what a parser's ``message`` says.

    Args:
        message: what jsonargparse raised, over several lines.
        known: dotted names of the options that exist where the message arose.
        prefix: dotted key under which the message arose.
        owner: name of the class whose options they are; empty for the command itself.

    Returns:
        ``KEY: problem; fix``; a message of unknown form comes back on one line, unchanged.
    """
    text = inspect.cleandoc(message).strip()
    known = list(known)
    if match := _NESTED.fullmatch(text):
        return _problem(_join(prefix, match["key"]), match["rest"])
    if match := _UNRECOGNIZED.fullmatch(text):
        return _unrecognized(match["arguments"], known, prefix, owner)
    if match := _UNKNOWN_IN_GROUP.fullmatch(text):
        return _unknown(f"{match['group']}.{match['key']}", known, prefix, owner)
    if match := _UNKNOWN.fullmatch(text):
        return _unknown(match["key"], known, prefix, owner)
    if match := _NO_VALUE.fullmatch(text):
        option = match["option"]
        return f"{_join(prefix, option[2:])}: a value is missing; write {option} VALUE"
    if match := _REQUIRED.fullmatch(text):
        key = match["keys"].split(",")[0].strip()
        fix = "add it" if prefix else f"give --{key}"
        return f"{_join(prefix, key)}: is required; {fix}"
    if match := _LINKED.fullmatch(text):
        return f"{match['key']}: follows from {match['source']}; set that instead"
    if prefix:
        return _problem(prefix, text)
    return one_line(text)


def one_line(text: str) -> str:
    """Join the lines of a message with single spaces."""
    return " ".join(text.split())


def _problem(key: str, rest: str) -> str:
    """Return what is wrong with the value of ``key``."""
    rest = inspect.cleandoc(rest).strip()
    if match := _CALLABLE.fullmatch(_without_bullets(rest)):
        return _in_value(key, match["inner"], match["value"], match["base"])
    if match := _IN_CLASS.fullmatch(rest):
        return _in_class(key, match["inner"], match["path"])
    if match := _UNION.search(rest):
        return _none_of(key, rest, match["errors"], match["value"])
    if match := _NO_CLASS.search(rest):
        return _no_class(key, match["module"], match["name"])
    if match := _NO_PATH.fullmatch(rest):
        from moezoo import FeedForward  # not above: it imports torch

        return _no_path(key, match["name"], FeedForward)
    if match := _NO_CONFIG.fullmatch(rest):
        return f"{key}: {shorten(match['value'])} is neither options nor a YAML file of them"
    if match := _EXPECTED.fullmatch(rest):
        return _wrong_value(key, [match["type"]], match["value"] or "")
    return f"{key}: {one_line(rest)}"


def _in_value(key: str, inner: str, value: str, base: str) -> str:
    """Render a complaint about the class, derived from ``base``, that ``value`` chooses."""
    if "init_args=Namespace(class_path=" in value and (match := _UNKNOWN.fullmatch(inner)):
        # An unknown key beside class_path: the parser took the whole mapping for arguments.
        beside = match["key"].partition(".")[0]
        return f"{key}.{beside}: no such key{suggest(beside, ['class_path', 'init_args'])}"
    chosen = re.search(r"class_path='([^']+)'", value)
    return _in_class(key, inner, chosen[1] if chosen else "", _import(base))


def _in_class(key: str, inner: str, path: str, base: type = object) -> str:
    """Render a complaint about the class ``path`` or its arguments."""
    if match := _NO_CLASS.search(inner):
        return _no_class(key, match["module"], match["name"], base)
    if match := _NO_MODULE.search(inner):
        return f"{key}: there is no module '{match['name']}'"
    if inner.startswith("Expected '"):
        return f"{key}: {one_line(inner)}"
    cls = _import(path)
    # The fields of a dataclass stand directly under its key; arguments of other classes do not.
    prefix = key if dataclasses.is_dataclass(cls) else f"{key}.init_args"
    name = path.rpartition(".")[2]
    return render(inner, option_names(cls) if cls else (), prefix, owner=name)


def _none_of(key: str, rest: str, errors: str, value: str) -> str:
    """Pick from the complaints of a union's members the one that is about this value."""
    members = [
        inspect.cleandoc(e)
        for e in re.split(r"^\s{0,6}- ", errors, flags=re.MULTILINE)
        if e.strip()
    ]
    for member in members:
        if "Problem with given class_path" in member or "Parser key" in member:
            return _problem(key, member)
        if (match := _NO_CLASS.search(member)) is not None:
            return _no_class(key, match["module"], match["name"])
        match = _NO_PATH.fullmatch(member)
        if match and "class_path" in value and (base := _SUBCLASS_OF.search(rest)):
            return _no_path(key, match["name"], _import(base["path"]))
    # The list of subtypes names choices that the complaints leave out.
    subtypes = re.search(r"Subtypes: \[(.*)\]", rest)
    choices = re.findall(r"(?:typing\.)?Literal\[[^\]]*\]", subtypes[1]) if subtypes else []
    types = [m["type"] for member in members if (m := _EXPECTED.fullmatch(member))]
    if not choices and re.fullmatch(r"[A-Za-z]\w*", value.strip()) and (cls := _base(rest)):
        return _no_path(key, value.strip(), cls)
    if types or choices:
        return _wrong_value(key, types + choices, value)
    return f"{key}: {shorten(value)} is not accepted; {one_line(members[0])}"


def _base(rest: str) -> type | None:
    """Return the class of which a union takes one, or a list; None if it takes no classes."""
    subtypes = re.search(r"Subtypes: \[(.*)\]", rest)
    names = re.findall(r"(?<![\w.])((?:\w+\.)+\w+)", subtypes[1]) if subtypes else []
    for name in names:
        if inspect.isclass(found := _import(name)) and not found.__module__.startswith("typing"):
            return found
    return None


def _wrong_value(key: str, types: list[str], value: str) -> str:
    """Return which values ``key`` takes, and which of them is nearest to ``value``."""
    value = re.sub(r"\['(\w*)'\]", r"\1", value.strip())  # one that stands alone in a list
    choices = [choice for name in types for choice in _literals(name)]
    wanted = list(dict.fromkeys(_describe(name) for name in types if not _literals(name)))
    if choices:
        close = closest(value, choices)
        fix = f"; did you mean '{close}'?" if close else ""
        also = [each for each in wanted if each == "true or false"]
        named = ", ".join(dict.fromkeys(choices + also))
        return f"{key}: {shorten(value)} is not one of {named}{fix}"
    return f"{key}: {shorten(value)} is not {' or '.join(wanted)}"


def _unrecognized(arguments: str, known: list[str], prefix: str, owner: str) -> str:
    first = arguments.split()[0]
    if not first.startswith("-"):
        return f"unexpected argument '{first}'; options are written --name value"
    return _unknown(first.lstrip("-").partition("=")[0], known, prefix, owner)


_ELSEWHERE = {
    "model.preset": (
        "fit, validate, test and plan take presets; compare puts layers into a decoder of "
        "model.d_model, num_layers and num_heads, so give those, and the preset as a row of methods"
    )
}
"""Options of other commands that one may look for, and why they are not here."""


def _unknown(key: str, known: list[str], prefix: str, owner: str) -> str:
    if key in known:
        return f"{_join(prefix, key)}: cannot be given here; it follows from the model"
    if (reason := _ELSEWHERE.get(_join(prefix, key))) is not None:
        return f"{_join(prefix, key)}: {reason}"
    subject = f"{owner} has no option '{key}'" if owner else "no such option"
    return f"{_join(prefix, key)}: {subject}{suggest(key, known)}"


def _no_class(key: str, module: str, name: str, base: type = object) -> str:
    members = vars(importlib.import_module(module))
    classes = {n: value for n, value in members.items() if inspect.isclass(value)}
    names = [n for n, value in classes.items() if issubclass(value, base) and value is not base]
    return f"{key}: there is no '{module}.{name}'{suggest(name, names, f'{module}.')}"


def _no_path(key: str, name: str, base: type) -> str:
    names = {cls.__name__ for cls in _subclasses(base)}
    return f"{key}: {shorten(name)} is not a known class{suggest(name, names)}"


def _subclasses(base: type) -> Iterator[type]:
    direct: list[type] = base.__subclasses__()
    for subclass in direct:
        yield subclass
        yield from _subclasses(subclass)


def suggest(name: str, choices: Iterable[str], prefix: str = "") -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest choice, a list, or a pointer to help."""
    choices = sorted(choices)
    close = closest(name, choices)
    if close is None:
        last = {choice.rpartition(".")[2]: choice for choice in reversed(choices)}
        match = closest(name.rpartition(".")[2], last, cutoff=0.7)
        close = last[match] if match else None
    if close:
        return f"; did you mean '{prefix}{close}'?"
    if 0 < len(choices) <= 12:
        return f"; choose from: {', '.join(prefix + choice for choice in choices)}"
    return "; --help lists the options"


def option_names(cls: Any, depth: int = 3) -> Iterator[str]:
    """Yield the dotted names of a class's arguments, descending into options dataclasses."""
    constructor = cls.__init__ if inspect.isclass(cls) else cls
    hints = typing.get_type_hints(constructor)
    for name in inspect.signature(cls).parameters:
        yield name
        hint = hints.get(name)
        for member in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(member) and depth:
                yield from (f"{name}.{inner}" for inner in option_names(member, depth - 1))


def shorten(value: str, limit: int = 60) -> str:
    """Quote a value, cut to ``limit`` characters."""
    value = one_line(value)
    return f"'{value}'" if len(value) <= limit else f"'{value[: limit - 1]}…'"


def printable(message: str, limit: int = 1_000) -> str:
    """Cut a long message in its middle, and write characters that a terminal would obey as codes.

    What a file holds may be as long as the file, and steer the terminal.
    """
    if len(message) > limit:
        message = f"{message[: limit // 2]} … {message[-limit // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)


def size(count: float) -> str:
    """Write a number of bytes with its unit, such as ``0 B``, ``1.5 kB`` or ``20.0 GB``."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def _without_bullets(text: str) -> str:
    """Keep the complaint about the class when a path was tried first."""
    parts = [part for part in re.split(r"^- ", text, flags=re.MULTILINE) if part.strip()]
    callables = [part for part in parts if part.startswith("Type ")]
    return callables[0].strip() if len(parts) > 1 and callables else text


def _literals(type_name: str) -> list[str]:
    match = re.fullmatch(r"(?:typing\.)?Literal(\[.*\])", type_name.strip())
    return [str(choice) for choice in ast.literal_eval(match[1])] if match else []


def _describe(type_name: str) -> str:
    if type_name.startswith("dot import path"):
        return "a group of options"
    name = re.sub(r"<class '([\w.]+)'>", r"\1", type_name.strip())
    if match := re.fullmatch(r"tuple with (\d+) elements", name):
        return f"a list of {match[1]}"
    if name.rpartition(".")[2] in ("Iterable", "Sequence"):
        return "a list"
    return _TYPE_NAMES.get(name, one_line(name.replace("typing.", "")))


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key
