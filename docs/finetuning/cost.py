"""The table of ``docs/finetuning.md``: memory and time of a step of each way to train on.

``python docs/finetuning/cost.py runs/real/smollm2`` takes steps of AdamW on random tokens, each way
in turn. "kept" is what autograd keeps of a forward pass beside parameters and buffers, in MB; the
times are of the CPU, medians over the steps after a first one, over the time of training all.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moezoo.command.tables import markdown_lines
from moezoo_models.checkpoints.stock import load_as_it_is, predict
from moezoo_train.finetune.lora import LoRAOptions
from moezoo_train.finetune.neurons import NeuronOptions
from moezoo_train.optim.optimizer import OptimizerConfig, build_optimizer
from moezoo_train.run.module import LanguageModel

BLOCK = ["gate_proj", "up_proj", "down_proj"]
WAYS: dict[str, dict[str, LoRAOptions | NeuronOptions]] = {
    "full": {},
    "LoRA, rank 8, of the blocks": {"lora": LoRAOptions(8, target_modules=BLOCK)},
    "neurons, 3 %, down": {"neurons": NeuronOptions()},
    "neurons, 3 %, down, up, gate": {"neurons": NeuronOptions(0.03, ("down", "up", "gate"))},
}


@dataclass
class Way:
    """A way to train, and what its steps took.

    Attributes:
        module: the model.
        seconds: CPU time of each step.
        kept: bytes that autograd kept for the last backward pass.
    """

    module: LanguageModel
    seconds: list[float] = field(default_factory=list)
    kept: int = 0

    def __post_init__(self) -> None:
        self.module.model.train()
        self.optimizer = build_optimizer(self.module.model, OptimizerConfig(weight_decay=0.0))

    def step(self, tokens: Tensor) -> None:
        """Take a step, and measure it."""
        model = self.module.model
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        start = time.process_time()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = predict(model, tokens[:, :-1], tokens[:, 1:]).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.process_time() - start)
        self.kept = sum(sizes.values())

    def trained(self) -> int:
        """Count the trained parameters."""
        return sum(p.numel() for p in self.module.model.parameters() if p.requires_grad)

    def state(self) -> int:
        """Return the bytes of gradients and of the optimizer's state."""
        found = (value for each in self.optimizer.state.values() for value in each.values())
        return sum(t.nbytes for t in found) + 4 * self.trained()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    size = load_as_it_is(options.checkpoint)[0].config.vocab_size
    tokens = torch.randint(size, (1, options.tokens + 1))
    ways = {
        name: Way(LanguageModel(size, initialize_from=options.checkpoint, **given))  # type: ignore[arg-type]
        for name, given in WAYS.items()
    }
    for _ in range(options.steps + 1):
        for way in ways.values():
            way.step(tokens)
    medians = {name: statistics.median(way.seconds[1:]) for name, way in ways.items()}
    rows = [
        [
            name,
            f"{way.trained():,}",
            f"{way.state() / 1e6:,.1f}",
            f"{way.kept / 1e6:,.0f}",
            f"{medians[name] / medians['full']:.2f}",
        ]
        for name, way in ways.items()
    ]
    header = ["way", "trained", "gradients and state, MB", "kept, MB", "time"]
    print("\n".join(markdown_lines(header, rows)))


if __name__ == "__main__":
    main()
