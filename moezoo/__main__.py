"""The `moezoo` command: looks up the first word, and says every mistake in one line."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from moezoo.command.explanations import explain
from moezoo.command.help_groups import FLAG as HELP_OF_THE_TRAINER
from moezoo.errors import InputError, nearest


class Command(NamedTuple):
    """One word of the command line: where its function is, and what it does.

    Arguments without a default are named options, or, if ``positional``, given by position. A
    first word without dashes is the value of the option ``first``, which has a default. ``more`` is
    where a function is whose text ends the help. Where ``several``, all words but the last are a
    list, and the value of the first argument. Where the first word has no dashes, the function of
    ``words`` is meant, if there is one; all such words are the list of its first argument.
    """

    function: str
    summary: str
    lightning: bool = False
    positional: bool = False
    first: str | None = None
    more: str | None = None
    several: bool = False
    words: str | None = None


GROUPS: dict[str, dict[str, Command]] = {
    "Train and use models": {
        "demo": Command(
            "moezoo_train.run.demo:demo", "train a small sparse MoE on real text, on a CPU"
        ),
        "prepare": Command(
            "moezoo_train.data.prepare:prepare", "turn text into a tokenizer and tokens"
        ),
        "fit": Command("moezoo_train.run.cli:run", "train a model as a YAML file says", True),
        "plan": Command(
            "moezoo_train.plan:run", "memory, traffic and time of a run on many GPUs", True
        ),
        "compare": Command(
            "moezoo_train.experiments.compare:compare",
            "methods side by side at equal active FLOPs; or runs: RUN RUN",
            more="moezoo.command.runs:help_of_runs",
            words="moezoo_train.experiments.overlay:compare_runs",
        ),
        "compare upcycling": Command(
            "moezoo_train.experiments.upcycling:compare_upcycling",
            "a dense model trained on, and mixtures of its copies",
        ),
        "compare carving": Command(
            "moezoo_train.experiments.carving:compare_carving",
            "groupings of a dense model's neurons, carved and tuned",
        ),
        "compare hardening": Command(
            "moezoo_train.experiments.hardening:compare_hardening",
            "trees of decisions, soft and hard with the same weights",
        ),
        "compare facts": Command(
            "moezoo_train.experiments.facts:compare_facts",
            "methods that learn made-up facts, at equal active FLOPs",
        ),
        "compare forgetting": Command(
            "moezoo_train.experiments.forgetting:compare_forgetting",
            "new facts learned and old ones forgotten",
        ),
        "validate": Command(
            "moezoo_train.run.cli:run", "measure a checkpoint on validation data", True
        ),
        "test": Command("moezoo_train.run.cli:run", "measure a checkpoint on test data", True),
        "generate": Command("moezoo_models.generate:generate", "continue a prompt"),
        "evaluate": Command(
            "moezoo_models.evaluation.evaluate:evaluate",
            "loss and bits per byte on any text, or lm-eval's tasks",
        ),
    },
    "Convert checkpoints": {
        "upcycle": Command(
            "moezoo_models.conversion.upcycle:upcycle",
            "a mixture of experts that begin as copies of the dense blocks",
            positional=True,
            several=True,
        ),
        "carve": Command(
            "moezoo_models.conversion.carve:carve",
            "a dense checkpoint's own neurons as shared and routed experts",
            positional=True,
        ),
        "sparsify": Command(
            "moezoo_models.conversion.sparsify:sparsify",
            "a dense checkpoint whose tokens skip what counts for little",
            positional=True,
        ),
        "drop-layers": Command(
            "moezoo_models.conversion.drop:drop_layers",
            "a dense checkpoint without some layers, and what each costs",
            positional=True,
        ),
        "fuse-layers": Command(
            "moezoo_models.conversion.fuse:fuse_layers",
            "dense blocks of consecutive layers as one wide block",
            positional=True,
        ),
        "snnk": Command(
            "moezoo_models.conversion.snnk:snnk",
            "random features in the place of dense blocks, and their errors",
            positional=True,
        ),
        "adopt": Command(
            "moezoo_models.adopt.report:report_adoption",
            "which layers would compute a mixture of transformers, how fast",
            positional=True,
        ),
        "export": Command(
            "moezoo_train.checkpoint.export:export",
            "training checkpoints as models, models as stock ones or GGUF",
            positional=True,
        ),
        "push": Command(
            "moezoo_models.publishing.push:push",
            "a model directory to the Hugging Face Hub",
            positional=True,
        ),
    },
    "Look around": {
        "inspect usage": Command(
            "moezoo_models.inspect.usage:inspect_usage", "how evenly a model uses its experts"
        ),
        "inspect experts": Command(
            "moezoo_models.inspect.specialization:inspect_experts",
            "which tokens each expert gets, and the paths between layers",
        ),
        "inspect sparsity": Command(
            "moezoo_models.inspect.sparsity:inspect_sparsity",
            "how few neurons are active on a token",
        ),
        "inspect triggers": Command(
            "moezoo_models.inspect.triggers:inspect_triggers",
            "what triggers neurons, and what they say",
        ),
        "inspect edit": Command(
            "moezoo_models.inspect.edit:inspect_edit",
            "what a model says after token rows of a subject are overwritten",
        ),
        "inspect spectrum": Command(
            "moezoo_models.inspect.spectrum:inspect_spectrum",
            "how many directions hidden activations and weights use",
        ),
        "inspect blocks": Command(
            "moezoo_models.inspect.blocks:inspect_blocks",
            "how alike tokens are around blocks, and what each part adds",
        ),
        "inspect background": Command(
            "moezoo_train.finetune.background:inspect_background",
            "which values other text reads, for sparse memory finetuning",
        ),
        "inspect frontier": Command(
            "moezoo_models.inspect.frontier:inspect_frontier",
            "what computing less costs a dense model, method by method",
        ),
        "inspect carving": Command(
            "moezoo_models.conversion.study:inspect_carving",
            "what carving and pruning cost a dense model, method by method",
            positional=True,
        ),
        "zoo": Command("moezoo.command.zoo:list_zoo", "every method: paper, parameters, cost"),
        "bench": Command(
            "moezoo.command.bench:bench",
            "speed and memory against public peers",
            first="cases",
            more="moezoo.command.bench_cases:list_cases",
        ),
        "doctor": Command("moezoo.command.doctor:doctor", "versions, devices, usable backends"),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
EXAMPLES = (
    "moezoo demo",
    "moezoo fit --config configs/moe.yaml --model.ffn.num_experts 16",
    'moezoo generate --checkpoint runs/demo/model --prompt "def "',
    "moezoo upcycle path/to/llama runs/mixtral --experts 8 --top_k 2",
    "moezoo carve path/to/llama runs/carved --shared 3 --active 3 --experts 8",
    "moezoo sparsify path/to/llama runs/sparse --work 0.57",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 2 for a mistake, 130 when interrupted, 141 for a closed pipe."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader left (`moezoo zoo | head`); keep the interpreter from flushing into it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as stop:
        return _complain(str(stop) or "interrupted", code=130)
    except Exception as error:
        if os.environ.get("MOEZOO_TRACEBACK") or (message := explain(error)) is None:
            raise
        return _complain(message)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        import moezoo

        print(f"moezoo {moezoo.__version__}")
        return 0
    _run(*_split(arguments))
    return 0


def _split(arguments: list[str]) -> tuple[str, list[str]]:
    """Part a command, of one word or two, from its options."""
    one, two = arguments[0], " ".join(arguments[:2])
    if two in COMMANDS:
        return two, arguments[2:]
    if one in COMMANDS:
        return one, arguments[1:]
    begun = [name for name in COMMANDS if name.startswith(f"{one} ")]
    given = two if begun and not two.split()[-1].startswith("-") else one
    if begun and given == one:
        raise InputError(f"there is no command '{one}' alone; choose from: {', '.join(begun)}")
    raise InputError(f"there is no command '{given}'{nearest(given, COMMANDS)}")


def _run(name: str, arguments: list[str]) -> None:
    command = COMMANDS[name]
    if command.lightning and arguments in (["-h"], ["--help"], [HELP_OF_THE_TRAINER]):
        from moezoo.command import pages

        page = f"{name}-trainer" if arguments == [HELP_OF_THE_TRAINER] else name
        pages.show(page, lambda: _load(command.function)([name, *arguments]))
    from moezoo.command.parser import check_config_files, run_function

    for argument in arguments:
        if "\0" in argument:
            option = argument.partition("=")[0].strip("-") if "=" in argument else argument
            raise InputError(f"{option}: it holds a NUL character; remove it")
    check_config_files(arguments)
    if command.first and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{command.first}", *arguments]
    if command.words and arguments and not arguments[0].startswith("-"):
        from moezoo.command.runs import with_list

        command, arguments = command._replace(function=command.words), with_list(arguments)
    if command.lightning:
        _load(command.function)([name, *arguments])
        return
    prog = f"moezoo {name}"
    if {"-h", "--help"} & set(arguments):
        _show_help(command, prog, arguments)
    function = _load(command.function)
    run_function(function, prog, arguments, command.positional, command.several)


def _show_help(command: Command, prog: str, arguments: list[str]) -> None:
    """Print the help page and exit, without importing what the command needs to run.

    Return where ``--help`` turns out not to ask for help, as behind ``--``.
    """
    from moezoo.command.parser import parse
    from moezoo.command.signature import signature_of

    more = _load(command.more)() if command.more else ""
    with suppress(FileNotFoundError):  # installed without sources
        parse(signature_of(command.function), prog, arguments, command.positional, more)


def _load(path: str) -> Callable[..., Any]:
    name, _, function = path.partition(":")
    module = sys.modules.get(name)
    if module is None:
        with _without_collector():
            module = importlib.import_module(name)
    return getattr(module, function)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Leave the garbage collector out meanwhile, and what is there afterwards out of it for good.

    Modules make millions of objects, which stay, and while they are imported the collector looks
    through all of them again and again: a fifth of the time and more.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def overview() -> str:
    """List the commands, one line each."""
    import moezoo

    lines = [f"moezoo {moezoo.__version__}: feed-forward replacements for transformers", ""]
    lines += ["usage: moezoo COMMAND [options]", ""]
    for title, commands in GROUPS.items():
        lines.append(title)
        lines += [f"  {name:<14} {command.summary}" for name, command in commands.items()]
        lines.append("")
    lines += ["Examples", *(f"  {example}" for example in EXAMPLES), ""]
    lines.append("moezoo COMMAND --help shows the options of one command.")
    return "\n".join(lines)


def _complain(message: str, code: int = 2) -> int:
    from moezoo.command.messages import printable

    print(f"moezoo: error: {printable(message)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
