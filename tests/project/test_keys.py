"""A mistake in a class names the key that the user wrote, however deep the class stands."""

from dataclasses import dataclass

import pytest
from jsonargparse import Namespace

from moezoo.command.keys import full_key
from moezoo.command.parser import run_function
from moezoo.errors import InputError, check_int, closest, nearest
from moezoo_train.run.cli import run

OPTIONS = Namespace(
    output="runs/here",
    model=Namespace(
        optimizer=Namespace(lr=-1.0),
        ffn=Namespace(class_path="moezoo.PEER", init_args=Namespace(num_experts=8, top_k=2)),
        ffn_rules=[Namespace(ffn=Namespace(init_args={"num_experts": 0, "top_k": 2}))],
    ),
    data=Namespace(batch_size=0),
)


@pytest.mark.parametrize(
    ("message", "key"),
    [
        ("optimizer.lr: -1 is out of range", "model.optimizer.lr"),
        ("lr: -1.0 is out of range", "model.optimizer.lr"),
        ("batch_size: 0 is out of range", "data.batch_size"),
        ("num_experts: 8 is too many", "model.ffn.init_args.num_experts"),
        ("num_experts: 0 is out of range", "model.ffn_rules[0].ffn.init_args.num_experts"),
        ("top_k: 2 is more than num_experts=0", "model.ffn.init_args.top_k"),  # both are
        ("top_k: some are wrong", "top_k"),  # it does not say which
        ("output: runs/here is a file", "output"),
        ("checkpoint: it is gone", "checkpoint"),
        ("data.batch_size: 0 is out of range", "data.batch_size"),
    ],
)
def test_the_full_key_is_found(message, key):
    assert full_key(message, OPTIONS) == f"{key}: {message.partition(': ')[2]}"


@dataclass
class Inner:
    size: int = 1

    def __post_init__(self):
        check_int("inner.size", self.size)


@dataclass
class Outer:
    inner: Inner | None = None


def command(outer: Outer = Outer()) -> None:  # noqa: B008
    """Do nothing."""


def test_a_group_that_may_be_left_out_is_no_traceback():
    with pytest.raises(InputError) as caught:
        run_function(command, "moezoo toy", ["--outer.inner.size", "0"])
    assert str(caught.value) == "outer.inner.size: 0 is out of range; give a whole number ≥ 1"


TRAINING = [
    (["--model.optimizer.lr", "-1"], "model.optimizer.lr: -1 is out of range"),
    (["--model.schedule.warmup_steps", "-1"], "model.schedule.warmup_steps: -1 is out of range"),
    (["--model.lora.rank", "0"], "model.lora.rank: 0 is out of range"),
    (["--model.neurons.ratio", "2"], "model.neurons.ratio: 2 is out of range"),
    (["--model.spikes.window", "0"], "model.spikes.window: 0 is out of range"),
    (["--model.sparse_memory.rows", "0"], "model.sparse_memory.rows: 0 is out of range"),
    (["--model.ffn", "moezoo.SparseMoE", "--model.ffn.num_experts", "0"], "model.ffn.init_args.nu"),
    (["--model.ffn_rules", "[{layers: 9, ffn: moezoo.PEER}]"], "model.ffn_rules[0]: layers: there"),
    (["--data.sequence_length", "0"], "data.sequence_length: 0 is out of range"),
    (["--loggers", "tensorbord"], "loggers: 'tensorbord' is not one of csv, tensorboard, wandb; d"),
    (["--trainer.precision", "fp16"], "trainer.precision: 'fp16' is not one of transformer-engine"),
    (
        ["--trainer.callbacks", "EarlyStoping"],
        "trainer.callbacks: 'EarlyStoping' is not a known cl",
    ),
    (
        ["--trainer.deterministic", "x"],
        "trainer.deterministic: 'x' is not one of warn, true or fal",
    ),
    (["--model.optimizer.betas", "[0.9]"], "model.optimizer.betas: '[0.9]' is not a list of 2"),
]


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.parametrize(("options", "message"), TRAINING, ids=lambda value: str(value)[:40])
def test_mistakes_of_a_run_name_the_full_key(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--model.d_model", "16", "--model.num_layers", "2", "--model.num_heads", "2"]
    with pytest.raises(InputError) as caught:
        run(["fit", *small, "--trainer.accelerator", "cpu", *options])
    assert str(caught.value).startswith(message)
    assert not list(tmp_path.iterdir())


def test_mistakes_in_the_data_name_the_full_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--data.source", "nowhere.txt", "--data.vocab_size", "300"]
    with pytest.raises(InputError, match=r"^data\.source: 'nowhere\.txt' does not exist"):
        run(["fit", "--trainer.accelerator", "cpu", "--model.d_model", "16", *options])


@pytest.mark.parametrize(
    ("word", "choices", "meant"),
    [
        ("fp16", ["bf16", "16-true", "16-mixed", "16"], "16-mixed"),
        ("float16", ["bfloat16", "float32"], None),
        ("half", ["bf16-mixed", "16-mixed"], "16-mixed"),
        ("bfloat16", ["bf16", "16-mixed", "bf16-mixed"], "bf16-mixed"),
        ("fp32", ["32-true", "32", "bf16"], "32-true"),
        ("int8", ["16", "64", "8-bit"], None),
        ("mixtral", ["mistral", "llama"], None),
        ("mistrall", ["mistral", "llama"], "mistral"),
        ("num_expert", ["num_experts", "top_k"], "num_experts"),
        ("nothing like it", ["num_experts", "top_k"], None),
    ],
)
def test_a_suggestion_means_the_same(word, choices, meant):
    assert closest(word, choices) == meant
    fix = f"; did you mean '{meant}'?" if meant else f"; choose from: {', '.join(sorted(choices))}"
    assert nearest(word, choices) == fix
