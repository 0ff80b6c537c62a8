"""Parsers whose errors are one clear line."""

from __future__ import annotations

import argparse
import inspect
import itertools
import os
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import docstring_parser
import jsonargparse
import yaml

from moezoo.command.keys import full_keys
from moezoo.command.messages import render
from moezoo.command.names import check_names, with_methods
from moezoo.command.precedence import ordered, unmixed, without_middle
from moezoo.command.settings import load_yaml, read_settings
from moezoo.errors import InputError

MANY_OPTIONS = 30

jsonargparse.set_loader("yaml", lambda text: with_methods(load_yaml(text)), (yaml.YAMLError,))


class ClearErrors:
    """Mix into a jsonargparse parser: mistakes raise :class:`InputError`, with a suggestion.

    Put it before the parser class: ``class Parser(ClearErrors, LightningArgumentParser)``.
    """

    more = ""
    """Text behind the options in the help, line by line as it is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviated option is a typo that happens to work, until another option is added.
        super().__init__(*args, **{"allow_abbrev": False, "prog": "moezoo", **kwargs})

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Write the help; the usage line of a command with very many options names none."""
        parser: Any = self
        parser.prog = parser.prog.replace(" [options]", "")
        if parser.usage is None and len(parser._actions) > MANY_OPTIONS:
            parser.usage = " ".join(["%(prog)s [options]", *_places(parser)])
        return str(super().format_help(*args, **kwargs)) + self.more  # type: ignore[misc]

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse as the parser class does, but options win over files wherever they stand.

        A class that replaces another begins from its own defaults. A group of options must hold
        options, and only what may be null is.

        Raises:
            InputError: any mistake in the options.
        """
        given = kwargs.pop("args", None) if not args else args[0]
        words = self.arranged(sys.argv[1:] if given is None else given)
        with unmixed():
            options = super().parse_args(words, *args[1:], **kwargs)  # type: ignore[misc]
        parser: Any = self
        for group in parser.groups:
            value = options[group] if group in options else jsonargparse.Namespace()
            if not isinstance(value, jsonargparse.Namespace):
                members = (n for n in option_names(parser) if n.startswith(f"{group}."))
                example = next(members, f"{group}.option")
                shown = "null" if value is None else repr(value)
                self.error(f"{group}: {shown} is not a group of options; give e.g. {example}")
        for action in parser._actions:
            name = action.dest
            if name in options and options[name] is None and not _may_be_null(action):
                self.error(f"{name}: null is not a value of it; leave it out for its default")
        for name, value in options.items():
            if _holds_nul(value):
                raise InputError(f"{name}: holds a NUL character, which no path has; leave it out")
            _check_argument(options, name, value)
        return options

    def arranged(self, words: Sequence[str]) -> list[str]:
        """Return the words of a command line as they are to be applied, one after the other."""
        return ordered(words)

    def instantiate(self, *args: Any, **kwargs: Any) -> Any:
        """Build the classes of parsed options, whose mistakes then name the full key.

        Raises:
            InputError: a class refuses its arguments.
        """
        options = args[0] if args else kwargs["namespace"]
        command = options.get("subcommand")
        with full_keys(options[command] if command else options):
            return super().instantiate(*args, **kwargs)  # type: ignore[misc]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message as one line.

        Parsers of nested classes hand theirs on as they are, for the outermost one to render.

        Raises:
            InputError: always, from the outermost parser.
        """
        parser: Any = self
        if not parser.exit_on_error:
            super().error(message, ex)  # type: ignore[misc]
        text = render(message, option_names(parser))
        places = _places(parser)
        for place in places:
            usage = f"write {parser.prog} {' '.join(each.upper() for each in places)}"
            text = text.replace(f"give --{place}", usage)
        raise InputError(text) from ex


class CommandParser(ClearErrors, jsonargparse.ArgumentParser):
    """The parser of one `moezoo` command."""


def _places(parser: Any) -> list[str]:
    """Return the names of arguments that are given by position."""
    return [a.dest for a in parser._actions if not a.option_strings and a.choices is None]


def _may_be_null(action: Any) -> bool:
    """Return whether null is a value of an option; jsonargparse takes it for any without a word."""
    hint = getattr(action, "_typehint", None)
    if hint is None or action.default in (None, argparse.SUPPRESS):
        return True
    return hint is Any or type(None) in typing.get_args(hint)


def _check_argument(options: Any, name: str, value: Any) -> None:
    """Refuse a plain value where a layer's argument is a group of options.

    jsonargparse takes it, and fails when it builds the layer.
    """
    owner, found, key = name.rpartition(".init_args.")
    if found and "." not in key:
        from moezoo.arguments import as_argument  # not above: it imports torch
        from moezoo.feed_forward import registered

        try:
            layer = registered(options[f"{owner}.class_path"])
        except InputError:
            return
        with full_keys(options):
            as_argument(layer, key, value)


def _holds_nul(value: Any) -> bool:
    """Return whether text holds a NUL, which ends a path, and which YAML can write as an escape."""
    if isinstance(value, dict):
        return any(_holds_nul(each) for each in (*value, *value.values()))
    if isinstance(value, list | tuple | set):
        return any(_holds_nul(each) for each in value)
    return isinstance(value, str | os.PathLike) and "\0" in str(value)


def subparsers(parser: Any) -> Iterator[Any]:
    """Yield the parsers of a parser's subcommands."""
    for action in parser._actions:
        if isinstance(action.choices, dict):
            yield from action.choices.values()


def option_names(parser: Any) -> Iterator[str]:
    """Yield the dotted names of every option, subcommands' without the subcommand's name.

    ``--name+``, by which lists are appended to, is no option of its own.
    """
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for subparser in action.choices.values():
                yield from option_names(subparser)
        else:
            flags = (flag for flag in action.option_strings if flag.startswith("--"))
            # "--name+" appends to a list, and goes without saying.
            yield from (flag[2:] for flag in flags if not flag.endswith((".help", "+")))


def run_function(
    function: Callable[..., Any],
    prog: str,
    arguments: Sequence[str],
    positional: bool = False,
    several: bool = False,
) -> None:
    """Call ``function`` with options parsed after its signature and docstring.

    If ``several``, its first argument is by position and may be a list: of more than two words,
    all but the last.
    """
    more: list[str] = []
    if several:
        flags = _expand_flags(function_parser(function, prog, positional), arguments)
        more, arguments = without_middle(flags)
    parser, options = parse(function, prog, arguments, positional)
    options.pop("config", None)
    if more:
        first = _places(parser)[0]
        options[first] = [options[first], *more]
    function(**parser.instantiate(options))


def parse(
    function: Callable[..., Any],
    prog: str,
    arguments: Sequence[str],
    positional: bool = False,
    more: str = "",
) -> tuple[CommandParser, Any]:
    """Parse options after a function's signature and docstring; ``--help`` prints and exits.

    ``more`` ends the help.

    Returns:
        The parser, and the options.
    """
    parser = function_parser(function, prog, positional)
    parser.more = more
    return parser, parser.parse_args(_expand_flags(parser, arguments))


def function_parser(
    function: Callable[..., Any], prog: str, positional: bool = False
) -> CommandParser:
    """Build the parser of a function: an option per argument, help from the docstring.

    If ``positional``, arguments without a default are given by position.
    """
    documentation = docstring_parser.parse(function.__doc__ or "")
    texts = (documentation.short_description, documentation.long_description)
    parser = CommandParser(
        prog=prog, description="\n\n".join(text for text in texts if text), print_config=None
    )
    if inspect.signature(function).parameters:
        parser.add_argument("--config", action="config", help="YAML file with values for these.")
    parser.add_function_arguments(function, as_group=False, as_positional=positional)
    return parser


def _expand_flags(parser: Any, arguments: Sequence[str]) -> list[str]:
    """Write a bare ``--flag`` of a true-or-false option as ``--flag=true``.

    ``--no_flag`` is ``--flag=false``.

    An option's name may be written with dashes.
    """
    flags = {f"--{a.dest}" for a in parser._actions if getattr(a, "_typehint", None) is bool}
    dashed = {f"--{name.replace('_', '-')}": f"--{name}" for name in option_names(parser)}
    arguments = ["=".join((dashed.get(n, n), *v)) for n, *v in (a.split("=", 1) for a in arguments)]
    expanded = []
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue="--"):
        bare = argument in flags and following.startswith("--")
        negation = argument.replace("-", "_").replace("__no_", "--", 1)
        if negation in flags and argument not in flags:
            expanded.append(f"{negation}=false")
        else:
            expanded.append(f"{argument}=true" if bare else argument)
    return expanded


def check_config_files(arguments: Sequence[str]) -> None:
    """Check that every ``--config`` file holds settings in YAML.

    Raises:
        InputError: a file is missing, is not text, is not YAML or not to be read, holds no
            mapping, or a layer's name that is unknown.
    """
    for path in _config_files(arguments):
        check_names(read_settings(path))


def _config_files(arguments: Sequence[str]) -> Iterator[str]:
    for option, following in itertools.zip_longest(arguments, arguments[1:]):
        name, _, value = option.partition("=")
        if name in ("--config", "-c"):
            path = value or following
            if not path:
                raise InputError("config: a file name is missing; write --config FILE")
            if "://" not in path:
                yield path
