"""A model of ours with the code that runs it, for `moezoo export --with_code`."""

from __future__ import annotations

from pathlib import Path

from moezoo import __version__
from moezoo.errors import InputError
from moezoo.feed_forward import registered
from moezoo_models.checkpoints.atomic import replacing_directory
from moezoo_models.checkpoints.companions import carry_over
from moezoo_models.checkpoints.directory import load_checkpoint, write_model
from moezoo_models.checkpoints.export import making
from moezoo_models.export.standalone.assemble import Target, assemble
from moezoo_models.files.model_files import CONFIG, existing, read_json
from moezoo_models.model.causal_lm import MoezooForCausalLM
from moezoo_models.model.config import MoezooConfig
from moezoo_models.model.decoder import MoezooModel

MODULE = "modeling_moezoo"
"""Name of the file, without its ending."""

AUTO_MAP = {
    "AutoConfig": f"{MODULE}.{MoezooConfig.__name__}",
    "AutoModel": f"{MODULE}.{MoezooModel.__name__}",
    "AutoModelForCausalLM": f"{MODULE}.{MoezooForCausalLM.__name__}",
}
"""What `trust_remote_code=True` finds for each of transformers' Auto classes."""

_CHANGE = (
    f"`moezoo export --with_code` added `{MODULE}.py`, by which transformers runs the model "
    "(`trust_remote_code=True`); the weights are the same."
)

_HEADER = '''\
# Copyright The moezoo developers.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""A decoder with blocks of {layers} in plain torch.

Written by `moezoo export --with_code` of moezoo {version}, from its sources: moezoo itself computes
the same, by kernels. Here torch and transformers are enough::

    AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
"""

'''


def export_with_code(checkpoint: str | Path, target: str | Path) -> Path:
    """Write a model of ours with one file of code, by which transformers runs it without moezoo.

    The tensors are the same, under the same names. ``auto_map`` in ``config.json`` names the code;
    moezoo itself never reads or runs it.

    Args:
        checkpoint: directory of a model of ours.
        target: directory to make.

    Returns:
        The directory.

    Raises:
        InputError: the model is a stock one, a layer of it is not of this project, or ``target``
            has something in it.
    """
    with making(target) as directory:
        source = existing(Path(checkpoint))
        kind = read_json(source / CONFIG).get("model_type")
        if kind != MoezooConfig.model_type:
            raise InputError(
                f"with_code: transformers has the code of {kind} itself; leave it out, or copy the "
                "directory"
            )
        model, tokenizer = load_checkpoint(source)
        code = code_of(model.config)
        model.config.auto_map = dict(AUTO_MAP)
        with replacing_directory(directory, "target") as fresh:
            write_model(fresh, directory, model)
            if tokenizer is not None:
                tokenizer.save(fresh)
            carry_over([source], fresh, _CHANGE)
            (fresh / f"{MODULE}.py").write_text(code, encoding="utf-8")
    size = f"{model.num_parameters() / 1e6:,.3g} M parameters"
    print(f"moezoo  {size}, {code.count(chr(10)):,} lines of code, {directory}")
    return directory


def code_of(config: MoezooConfig) -> str:
    """Return a file that defines the models of a configuration, with its layers, in plain torch.

    Raises:
        InputError: a layer is of another project, or moezoo was installed without its source.
    """
    if config.attention_experts is not None:
        raise InputError(
            "with_code: attention by experts (attention_experts) has no plain code; keep the "
            "directory as it is"
        )
    layers = layer_classes(config)
    model = [(kind.__module__, kind.__name__) for kind in (MoezooForCausalLM, MoezooConfig)]
    header = _HEADER.format(layers=", ".join(name for _, name in layers), version=__version__)
    return header + assemble(model, layers)


def layer_classes(config: MoezooConfig) -> list[Target]:
    """List the classes of a configuration's layers, by name.

    Raises:
        InputError: one is of another project.
    """
    found = {registered(rule["class_path"]) for rule in (*config.ffn, *config.memory)}
    for layer in found:
        if not layer.__module__.startswith("moezoo.layers."):
            raise InputError(
                f"with_code: {layer.__name__} is defined in {layer.__module__}, and the code of "
                "moezoo's own layers alone is written; write the file for it by hand"
            )
    return sorted(((layer.__module__, layer.__name__) for layer in found), key=lambda each: each[1])
