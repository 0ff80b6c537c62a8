"""What a dense model's cheaper copies are timed against: greedy replies of SmolLM2-135M's shape.

The copy is told the same prompt as the dense model here, in transformers and in llama.cpp, and as
itself by torch's operators. Only the last has to write the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from moezoo.bench.case import PLAIN, Package, Peer, Setting, Target
from moezoo.bench.end_to_end import Job, Task
from moezoo_train.bench.decoding import Reply, told, transformers_reply
from moezoo_train.bench.llama_cpp import PACKAGES, LlamaCpp
from moezoo_train.bench.models import Architecture, mapped

if TYPE_CHECKING:
    from moezoo_models import MoezooForCausalLM

SIZES: Final = {"B": 1, "P": 16, "N": 32, "V": 49152, "d": 576, "f": 1536, "L": 30, "H": 9, "G": 3}
QUICK: Final = {"V": 64, "d": 32, "f": 64, "L": 2, "H": 2, "G": 1, "P": 4, "N": 4}

_TRANSFORMERS = Package("transformers", "pip install 'moezoo[train]'")


@dataclass(frozen=True)
class Copy:
    """What all sides are given: the dense model as a task, and its cheaper copy."""

    dense: Reply
    model: MoezooForCausalLM


def task_of(
    setting: Setting,
    folder: Path,
    change: Callable[[MoezooForCausalLM, Setting, Path], MoezooForCausalLM],
) -> Task:
    """Draw a dense model and time its copy.

    Args:
        setting: of the case.
        folder: for files of weights.
        change: makes the copy of the dense model, given an empty folder.
    """
    architecture = Architecture.of("llama", setting.sizes)
    model = architecture.ours().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # fresh ones are so small that every token is the likeliest
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            if "embed" in name:
                parameter[-1] = 0.0  # the token that ends a text is never the likeliest
    prompts = torch.randint(setting["V"] - 1, (1, setting["P"]))
    weights = mapped(model, folder)
    own = folder / "copy"
    own.mkdir()
    changed = change(model, setting, own)
    dense = Reply(architecture, weights, prompts, setting["N"])
    return Task(dense.job(partial(told, changed, dense)), Copy(dense, changed), setting["N"])


def peers(
    over_dense: float, over_transformers: float | None, over_llama: float | None
) -> dict[str, Peer]:
    """Return who a copy is timed against.

    Args:
        over_dense: how many times as fast as our dense model it is to be.
        over_transformers: likewise of transformers'.
        over_llama: likewise of llama.cpp's in F32.
    """
    dense = {"same": False, "target": _target(over_transformers)}
    in_f32 = {"same": False, "target": _target(over_llama)}
    return {
        "dense": Peer(_dense, same=False, target=Target(forward=over_dense)),
        PLAIN: Peer(_by_operators),
        "transformers, dense": Peer(_transformers, _TRANSFORMERS, **dense),  # type: ignore[arg-type]
        "llama.cpp F32, dense": Peer(
            partial(_llama_cpp, kind="F32"),
            PACKAGES[0],
            **in_f32,  # type: ignore[arg-type]
        ),
        "llama.cpp Q8_0, dense": Peer(partial(_llama_cpp, kind="Q8_0"), PACKAGES[0], same=False),
    }


def _target(forward: float | None) -> Target | None:
    return None if forward is None else Target(forward=forward)


def llama_cpp_reply(parts: Copy, weights: Mapping[str, Tensor], kind: str, active: int = 0) -> Job:
    """Have llama.cpp's server continue the prompt with a model's weights.

    Args:
        parts: of the case.
        weights: by name.
        kind: of the matrices, as of :func:`moezoo_train.bench.llama_cpp.write`.
        active: as there.
    """
    for package in PACKAGES:
        package.check()
    dense = parts.dense
    ids = dense.prompts[0].tolist()
    server = LlamaCpp(dense.architecture, weights, len(ids) + dense.new + 1, kind, active)
    return dense.job(lambda: torch.tensor([server.reply(ids, dense.new)]))


def _dense(parts: Copy) -> Job:
    """The dense model, by the decoder here."""
    model = parts.dense.architecture.ours().eval()
    model.load_state_dict(parts.dense.weights, assign=True)
    return parts.dense.job(partial(told, model, parts.dense))


def _by_operators(parts: Copy) -> Job:
    """The same tokens by torch's operators, and for experts the kernel's op."""
    from moezoo_kernels import backends

    def reply() -> Tensor:
        with backends.use("torch"):
            return told(parts.model, parts.dense)

    return parts.dense.job(reply)


def _transformers(parts: Copy) -> Job:
    return transformers_reply(parts.dense)


def _llama_cpp(parts: Copy, kind: str) -> Job:
    return llama_cpp_reply(parts, parts.dense.weights, kind)
