"""The `moezoo` command: overview, exit codes, one line per mistake, tables."""

import errno
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moezoo
import moezoo_kernels
from moezoo import __main__ as command
from moezoo import dtype_speed
from moezoo.command import counted, doctor, tables, zoo
from moezoo.command.parser import function_parser
from moezoo.command.signature import signature_of
from moezoo.errors import InputError
from moezoo_kernels import product_libraries

ROOT = Path(__file__).parents[2]


def fail(capsys, *argv: str) -> str:
    """Run the command, expect a mistake, and return its one line without the prefix."""
    assert command.main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("moezoo: error: ")
    return lines[0].removeprefix("moezoo: error: ")


def run_with(monkeypatch, error: BaseException) -> int:
    def raise_it(name, arguments):
        raise error

    monkeypatch.setattr(command, "_run", raise_it)
    return command.main(["zoo"])


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_overview_names_every_command(argv, capsys):
    assert command.main(argv) == 0
    output = capsys.readouterr().out
    for name, entry in command.COMMANDS.items():
        assert f"\n  {name:<14} {entry.summary}\n" in output
    assert max(len(line) for line in output.splitlines()) <= 80


def test_version(capsys):
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"moezoo {moezoo.__version__}\n"


def test_every_command_exists():
    for entry in command.COMMANDS.values():
        assert callable(command._load(entry.function))


@pytest.mark.parametrize("name", [n for n, c in command.COMMANDS.items() if not c.lightning])
def test_help_read_from_the_source_is_that_of_the_function(name):
    entry = command.COMMANDS[name]
    pages = [
        function_parser(function, f"moezoo {name}", entry.positional).format_help()
        for function in (signature_of(entry.function), command._load(entry.function))
    ]
    assert pages[0] == pages[1]


def test_a_signature_without_its_source_is_a_missing_file():
    with pytest.raises(FileNotFoundError):
        signature_of("moezoo_models.nowhere:nothing")


def test_help_behind_two_dashes_is_an_argument(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--help does not exist" in fail(capsys, "upcycle", "--", "--help", "new")


TRAINING = ("fit", "validate", "test", "plan")  # they take what a training configuration holds


@pytest.mark.parametrize("name", sorted(set(command.COMMANDS) - set(TRAINING)))
def test_help_is_readable(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        command.main([*name.split(), "--help"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith(f"usage: moezoo {name}")
    assert max(len(line) for line in output.splitlines()) <= 80
    # Every option says what it is, not only its type.
    assert [action.dest for action in command_parser(name)._actions if not action.help] == []


@pytest.mark.parametrize("name", TRAINING)
def test_help_of_training_is_readable(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        command.main([name, "--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"usage: moezoo {name} [options]"
    assert max(map(len, lines)) <= 80
    ours = ["  --output", "  --model.d_model", "  --data.source", "Trainer:"]
    places = [next(n for n, line in enumerate(lines) if line.startswith(o)) for o in ours]
    assert places == sorted(places)
    # One paragraph says where Lightning's options are.
    said = " ".join("".join(lines[places[-1] + 1 :]).split())
    assert re.fullmatch(rf"--trainer\.max_steps.* \d\d more .* moezoo {name} --trainer\.help", said)
    assert not any("class:" in line for line in lines)


def test_help_of_the_trainer_is_a_page_of_its_own(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        command.main(["fit", "--trainer.help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    options = [line.split()[0] for line in lines if line.startswith("  --")]
    assert len(options) > 40
    assert all(option.startswith("--trainer") for option in options)


def command_parser(name: str):
    return function_parser(command._load(command.COMMANDS[name].function), name)


def command_options(name: str) -> list[str]:
    from moezoo.command.parser import option_names

    names = set(option_names(command_parser(name))) - {"help", "config"}
    return sorted(option for option in names if "." not in option)


def test_unknown_command(capsys):
    assert fail(capsys, "fitt") == "there is no command 'fitt'; did you mean 'fit'?"
    wanted = "; did you mean 'inspect usage'?"
    assert fail(capsys, "inspect", "usge") == f"there is no command 'inspect usge'{wanted}"
    alone = "there is no command 'inspect' alone; choose from: inspect usage, inspect experts, "
    assert fail(capsys, "inspect").startswith(alone)
    assert fail(capsys, "inspect", "--text", "x").startswith(alone)


MISTAKES = [
    (["zoo", "--d_modl", "3"], "d_modl: no such option; did you mean 'd_model'?"),
    (["zoo", "--d_model", "x"], "d_model: 'x' is not a whole number"),
    (["zoo", "--d_model", "0"], "d_model: 0 is out of range; give a whole number ≥ 1"),
    (["zoo", "--d_model"], "d_model: a value is missing; write --d_model VALUE"),
    (["zoo", "512"], "unexpected argument '512'; options are written --name value"),
    (["zoo", "--config"], "config: a file name is missing; write --config FILE"),
    (["zoo", "--config", "nowhere.yaml"], "config: there is no file 'nowhere.yaml'"),
    (["zoo", "--config=folder"], "config: 'folder' is a folder; give a YAML file"),
    (
        ["zoo", "--config=sizse.yaml"],
        "config: there is no file 'sizse.yaml'; did you mean 'sizes.yaml'?",
    ),
    (["zoo", "--config=binary"], "config: 'binary' is not a text file; give a YAML file"),
    (["zoo", "--config=list.yaml"], "list.yaml: holds no settings; write 'key: value' lines"),
    (["zoo", "--config=empty.yaml"], "empty.yaml: holds no settings; write 'key: value' lines"),
    (
        ["zoo", "--config=broken.yaml"],
        "broken.yaml: not valid YAML at line 2, column 5: mapping values are not allowed here",
    ),
    (
        ["zoo", "--config=tab.yaml"],
        "tab.yaml: not valid YAML at line 1, column 10: found character",
    ),
    (["zoo", "--config=typo.yaml"], "d_modle: no such option; did you mean 'd_model'?"),
]


@pytest.mark.parametrize(("argv", "expected"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes(argv, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("sizes.yaml").write_text("d_model: 8\n")
    Path("binary").write_bytes(b"\xff\xfe\x00\x80")
    Path("list.yaml").write_text("- 3\n")
    Path("empty.yaml").write_text("")
    Path("broken.yaml").write_text("a: 1\nb: c: d\n")
    Path("tab.yaml").write_text("d_model: \t[\n\t3")
    Path("typo.yaml").write_text("d_modle: 8\n")
    assert fail(capsys, *argv).startswith(expected)


TRAINING_MISTAKES = [
    (["--model.ffn.top_k", "9"], "model.ffn.init_args.top_k: 9 is more than num_experts=8"),
    (["--model.num_heads", "7"], "model.d_model: 256 is not divisible by num_heads 7"),
    (["--model.ffn.router.score", "softmx"], "model.ffn.init_args.router.score: 'softmx' is not"),
    (["--model.vocab_size", "9"], "model.vocab_size: follows from data.vocab_size"),
    (["--model.schedule.name", "cosin"], "model.schedule.name: 'cosin' is not one of"),
    (["--data.batch_size", "0"], "data.batch_size: 0 is out of range"),
    (["--data.batchsize", "3"], "data.batchsize: no such option; did you mean 'data.batch_size'?"),
    (["--data", "3"], "data: '3' is neither options nor a YAML file of them"),
    (["--trainer.max_step", "3"], "trainer.max_step: no such option; did you mean 'trainer.max_s"),
    (["--trainer.strategy", "dpp"], "trainer.strategy: 'dpp' is not known; e.g. auto, ddp"),
    (["--trainer.callbacks", "[{class_path: EarlyStoping}]"], "trainer.callbacks: 'EarlyStoping'"),
    (["--config", "moe.yml"], "config: there is no file 'moe.yml'"),
]


# Lightning calls a jsonargparse method by its old name.
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.parametrize(
    ("options", "expected"), TRAINING_MISTAKES, ids=lambda value: str(value)[:40]
)
def test_training_mistakes_write_nothing(options, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "configs" / "moe.yaml")
    assert fail(capsys, "fit", "--config", config, *options).startswith(expected)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("generate", "checkpoint"),
        ("evaluate", "text"),
        ("upcycle", "source"),
        ("export", "target"),
        ("prepare", "output"),
        ("fit", "output"),
    ],
)
def test_a_path_with_a_nul_is_one_line(name, option, capsys, tmp_path):
    """No shell hands one over, but YAML can write it."""
    places = {
        "generate": ["checkpoint"],
        "evaluate": ["checkpoint"],
        "upcycle": ["source", "target"],
        "export": ["checkpoint", "target"],
    }
    values = dict.fromkeys(places.get(name, ()), "nowhere") | {option: "a\0b"}
    (tmp_path / "options.yaml").write_text(json.dumps(values))
    line = fail(capsys, name, "--config", str(tmp_path / "options.yaml"))
    place = r".*options\.yaml: line 1, column \d+"
    assert re.fullmatch(place + ": a value holds a NUL character; remove it", line)


def test_a_nul_on_the_line_is_one_line(capsys):
    line = fail(capsys, "evaluate", "--checkpoint", "nowhere", "--text", "a\0b")
    assert line == r"a\x00b: it holds a NUL character; remove it"


@pytest.mark.parametrize("argument", ["router", "balance"])
def test_a_number_in_the_place_of_options_is_one_line(argument, capsys, tmp_path):
    """The parser takes it, and a layer would be given it."""
    ffn = {"class_path": "moezoo.SparseMoE", "init_args": {argument: -1}}
    (tmp_path / "run.yaml").write_text(json.dumps({"model": {"ffn": ffn}}))
    line = fail(capsys, "fit", "--config", str(tmp_path / "run.yaml"))
    key = f"model.ffn.init_args.{argument}"
    assert line == f"{key}: -1 is not a mapping of options; write name: value"


def test_options_may_come_from_a_file(capsys, tmp_path):
    path = tmp_path / "sizes.yaml"
    path.write_text("d_model: 48\n")
    assert command.main(["zoo", "--config", str(path)]) == 0
    assert "at d_model=48" in capsys.readouterr().out


ERRORS = [
    (
        InputError("top_k: 9 is more\n  than num_experts=8"),
        "top_k: 9 is more than num_experts=8",
    ),
    (
        FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "gone.txt"),
        "gone.txt: no such file or directory; name one that is there",
    ),
    (
        PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/secret"),
        "/secret: permission denied; change its permissions, or name another",
    ),
    (
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/moe"),
        "runs/moe: no space left on device; free space there, or write to another disk",
    ),
    (
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        "no space left on device; free space there, or write to another disk",
    ),
    (OSError("not a local folder\nand not a model"), "not a local folder and not a model"),
    (
        ModuleNotFoundError("No module named 'lightning.pytorch'", name="lightning.pytorch"),
        "lightning is not installed; run: pip install 'moezoo[train]'",
    ),
    (
        ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval"),
        "lm_eval is not installed; run: pip install 'moezoo[eval]'",
    ),
]


@pytest.mark.parametrize(("error", "expected"), ERRORS, ids=lambda value: repr(value)[:40])
def test_what_goes_wrong_inside_is_said_in_one_line(error, expected, capsys, monkeypatch):
    assert run_with(monkeypatch, error) == 2
    assert capsys.readouterr().err == f"moezoo: error: {expected}\n"


@pytest.mark.parametrize(
    "bug",
    [
        KeyError("x"),
        ValueError("x"),
        ModuleNotFoundError("no 'moezoo.nothing'", name="moezoo.nothing"),
    ],
)
def test_bugs_keep_their_traceback(bug, monkeypatch):
    with pytest.raises(type(bug)):
        run_with(monkeypatch, bug)


def test_a_library_that_refuses_a_setting_is_quoted(capsys, monkeypatch):
    def refuse(name, arguments):
        moezoo_kernels.use("gpu")

    monkeypatch.setattr(command, "_run", refuse)
    assert command.main(["zoo"]) == 2
    assert "no backend 'gpu'; choose from:" in capsys.readouterr().err


def test_a_traceback_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("MOEZOO_TRACEBACK", "1")
    with pytest.raises(InputError):
        run_with(monkeypatch, InputError("x"))


def test_interrupt(capsys, monkeypatch):
    assert run_with(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "moezoo: error: interrupted\n"


def test_a_reader_that_leaves_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "moezoo", "zoo"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def environment() -> dict[str, str]:
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "models", "train"))
    return {**os.environ, "PYTHONPATH": path}


def test_zoo_lists_every_method_at_the_width(capsys):
    assert command.main(["zoo", "--d_model", "64"]) == 0
    output = capsys.readouterr().out
    assert "at d_model=64" in output
    for method in moezoo.zoo():
        line = next(line for line in output.splitlines() if line.startswith(f"{method.name} "))
        assert method.paper.arxiv in line
        assert f"{method.paper.authors} {method.paper.year}" in line


def test_zoo_numbers_are_the_layers(capsys):
    assert command.main(["zoo", "--d_model", "32", "--json"]) == 0
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert list(entries) == [method.name for method in moezoo.zoo()]
    for method in moezoo.zoo():
        layer = method.build(32)
        entry = entries[method.name]
        assert entry["total_parameters"] == sum(p.numel() for p in layer.parameters())
        assert entry["active_parameters"] <= entry["total_parameters"]
        assert entry["flops_per_token"] == layer.cost().flops_per_token
        assert entry["causal"] == layer.causal


def test_zoo_keeps_what_the_layers_say_at_the_default_width(capsys):
    assert command.main(["zoo", "--json"]) == 0
    kept = json.loads(capsys.readouterr().out)
    again = "python -c 'from moezoo.command.zoo import write_table; write_table()'"
    assert (kept, []) == counted.counted(zoo.WIDTH), f"write the table again: {again}"
    assert zoo.TABLE.read_text(encoding="utf-8").count("\n") == len(kept) + 2


def test_zoo_names_the_methods_that_a_width_does_not_fit(capsys):
    said = "d_model 20 does not fit them; a multiple of 8 does\n"
    assert command.main(["zoo", "--d_model=20"]) == 0
    table = capsys.readouterr().out
    assert said in table
    assert command.main(["zoo", "--d_model=20", "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err.endswith(said)
    unfit = printed.err.partition(":")[0].split(", ")
    assert "pixelfly" in unfit
    listed = {entry["name"] for entry in json.loads(printed.out)}
    assert not listed & set(unfit)
    assert f"{len(listed)} methods at d_model=20" in table
    assert not counted.counted(24)[1]


def test_doctor_reports_versions_devices_and_backends(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "OPTIONAL", {"json": "", "no-such-package": "take it along"})
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.torch.cuda, "device_count", lambda: 0)
    assert command.main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert torch.__version__ in output
    assert torch.backends.cpu.get_cpu_capability() in output
    assert "cuda     not available: " in output.replace("cuda    not", "cuda     not")
    from moezoo_kernels.backends import table

    for row in table():
        assert row.backend in output
        assert row.reason in output
    assert "not installed; take it along" in output


@pytest.mark.parametrize(
    ("bf16", "chosen"),
    [
        (3.25, "3.25 12.5 precision 32-true; muon_dtype float32; all checkpoints in fp32"),
        (900.0, "900 12.5 precision 32-true; muon_dtype bfloat16; bf16 checkpoints as saved"),
    ],
)
def test_doctor_shows_what_dtypes_are_worth(bf16, chosen, capsys, monkeypatch):
    products = {torch.float32: 100.0, torch.bfloat16: bf16, torch.float16: 12.5}
    monkeypatch.setattr(dtype_speed, "speeds", lambda: dtype_speed.Speeds(products))
    tables.print_table("dtypes", ["what", ">fp32", ">bf16", ">fp16", "chosen"], doctor._dtypes())
    assert f"GFLOP/s 100 {chosen}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("rates", "variable", "gets"),
    [
        ((100.0, 220.0, 200.0), "", ["nothing", "linear maps", "experts, factors"]),
        ((100.0, 110.0, 90.0), "fastest", ["linear maps, factors", "nothing", "experts"]),
        ((100.0, 110.0, 80.0), "", ["linear maps, experts, factors", "nothing", "nothing"]),
        ((100.0, 220.0, 200.0), "torch", ["linear maps, experts, factors", "nothing", "nothing"]),
        ((100.0, 110.0, 80.0), "own", ["linear maps", "nothing", "experts, factors"]),
    ],
)
def test_doctor_shows_which_library_multiplies_what(
    native_library, rates, variable, gets, monkeypatch
):
    monkeypatch.setattr(product_libraries, "rates", lambda: product_libraries.Rates(*rates))
    monkeypatch.setattr(product_libraries, "has_onednn", lambda: True)
    monkeypatch.setenv("MOEZOO_PRODUCTS", variable)
    names, measured, shown = zip(*doctor._libraries(), strict=True)
    assert names == ("torch", "oneDNN", "moezoo")
    assert measured == tuple(f"{rate:.3g}" for rate in rates)
    assert list(shown) == gets


def test_doctor_says_which_library_is_not_there(monkeypatch):
    monkeypatch.setattr(product_libraries, "rates", lambda: product_libraries.Rates(1.0, 0.0, 0.0))
    monkeypatch.setattr(product_libraries, "has_onednn", lambda: False)
    monkeypatch.delenv("MOEZOO_PRODUCTS", raising=False)
    assert [row[1] for row in doctor._libraries()] == ["1", "not there", "not there"]


def test_doctor_says_why_a_package_does_not_work(tmp_path, monkeypatch):
    (tmp_path / "half_built.py").write_text("raise OSError('libcuda.so:\\n cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert doctor._why_unusable("half_built") == "OSError: libcuda.so: cannot open"
    assert doctor._why_unusable("json") == ""


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (12345, "12.3 k"),
        (999_499, "999 k"),
        (999_999, "1.00 M"),
        (2_097_152, "2.10 M"),
        (671_000_000_000, "671 G"),
    ],
)
def test_counts_have_three_digits(number, text):
    assert tables.count(number) == text


def test_tables_on_a_terminal_are_drawn(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    tables.print_table("sizes", ["name", ">size"], [["[a]", "1"], ["b", "22"]])
    output = capsys.readouterr().out
    assert "─" in output
    assert "[a]" in output


def test_tables_in_a_pipe_are_aligned(capsys):
    tables.print_table("sizes", ["name", ">size"], [["a", "1"], ["bbbbb", "22222"]])
    assert capsys.readouterr().out == "sizes\nname    size\na          1\nbbbbb  22222\n\n"


@pytest.mark.parametrize("enabled", [True, False])
def test_commands_are_imported_without_the_collector(enabled, tmp_path, monkeypatch):
    (tmp_path / "watches_the_collector.py").write_text(
        "import gc\n\nENABLED = gc.isenabled()\n\n\ndef run():\n    return ENABLED\n"
    )
    (tmp_path / "breaks_at_import.py").write_text("raise ImportError('half')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        assert not command._load("watches_the_collector:run")()
        with pytest.raises(ImportError, match="half"):
            command._load("breaks_at_import:run")
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
