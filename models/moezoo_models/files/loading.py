"""Our models from directories that passed the gate, by transformers' ``from_pretrained``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from moezoo.errors import InputError
from moezoo_models.files.gate import Admitted, admit, check_model, keep_generation
from moezoo_models.files.hub import fetched, is_hub_name
from moezoo_models.files.model_files import WEIGHTS

_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_UNUSED = ("code_revision", "proxies", "use_safetensors", "weights_only", "adapter_kwargs")
_REFUSED = ("gguf_file", "ignore_mismatched_sizes", "key_mapping", "variant")


class GatedLoading:
    """Mix into a model class of transformers: directories pass the gate, or are not loaded.

    The model is filled from the tensors that the gate has looked at. transformers is not told where
    they are: it would follow an index out of the directory, and load what an adapter's
    configuration names.
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Load a model directory, as in transformers, but never half of it.

        Args:
            pretrained_model_name_or_path: the directory, or a name on the Hugging Face Hub, whose
                files are fetched first, also as ``hf:ORG/NAME@REVISION``; None with the option
                ``state_dict``.
            args: for the constructor.
            kwargs: options as in transformers. Nothing is unpickled, and no code that a directory
                names is run.

        Returns:
            The model in evaluation mode; with ``output_loading_info`` also what transformers says
            of its tensors.

        Raises:
            InputError: the directory is damaged, or weights and configuration do not fit, as for
                :func:`moezoo_models.files.gate.admit`.
        """
        if pretrained_model_name_or_path is None:
            return cls._filled(*args, **kwargs)
        for option in _REFUSED:
            if kwargs.pop(option, None):
                raise InputError(f"{option}: only {WEIGHTS} as it is can be read; leave it out")
        directory = local_directory(pretrained_model_name_or_path, kwargs)
        given = kwargs.pop("config", None)
        dtype = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
        options = dict(kwargs)

        def configure(raw: dict[str, Any]) -> Any:
            nonlocal options
            if isinstance(given, PreTrainedConfig):
                return given
            kind: Any = cls.config_class  # type: ignore[attr-defined]
            config, options = kind.from_dict(raw, return_unused_kwargs=True, **kwargs)
            return config

        make: Any = cls
        admitted = admit(directory, configure, make)
        return cls.from_admitted(admitted, *args, **options, **dtype)

    @classmethod
    def from_admitted(
        cls, admitted: Admitted, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Load what the gate let through; options as of :meth:`from_pretrained`.

        Raises:
            InputError: a tensor holds NaN or infinity, or a file cannot be read.
        """
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or "auto"
        kwargs["dtype"] = admitted.dtype if dtype == "auto" else dtype
        kwargs.setdefault("generation_config", admitted.generation)
        kwargs |= {"config": admitted.config, "trust_remote_code": False}
        with admitted.opened() as tensors:
            if is_deepspeed_zero3_enabled():  # which scatters tensors, not what can be read of them
                tensors = {name: tensor[...] for name, tensor in tensors.items()}
            model, info = cls._filled(*args, state_dict=tensors, output_loading_info=True, **kwargs)
        model.name_or_path = model.config.name_or_path = str(admitted.directory)
        keep_generation(model, admitted)
        check_model(model, admitted.directory)
        return (model, info) if output_loading_info else model

    @classmethod
    def _filled(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Build a model of tensors by transformers; all of them have to be there."""
        parent: Any = super()
        model, info = parent.from_pretrained(None, *args, output_loading_info=True, **kwargs)
        if missing := sorted(info["missing_keys"]):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise InputError(
                f"checkpoint: tensor '{missing[0]}'{more} is missing from the weights; "
                "config.json and the weights belong to different models"
            )
        return (model, info) if output_loading_info else model


def local_directory(path: str | os.PathLike[str], options: dict[str, Any]) -> Path:
    """Return a directory, or fetch what a name on the Hub stands for.

    Args:
        path: directory or name.
        options: of ``from_pretrained``; those that say where the files are are taken out.

    Raises:
        InputError: there is no such directory, and it is no name.
    """
    hub = {name: options.pop(name) for name in _HUB if name in options}
    inner = options.pop("subfolder", None) or ""
    for name in _UNUSED:
        options.pop(name, None)
    if is_hub_name(str(path)):
        return fetched(str(path)) / inner
    directory = Path(path)
    named = str(path).count("/") <= 1 and "\0" not in str(path) and not directory.exists()
    if not named or str(path).startswith((".", "/", "~")):
        return directory / inner
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    wanted = [f"{inner}/{end}" if inner else end for end in ("*.json", "*.safetensors")]
    try:
        place = snapshot_download(str(path), allow_patterns=wanted, **hub)
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        raise InputError(
            f"checkpoint: {path} is neither a directory nor a model on the Hugging Face Hub that "
            "can be fetched; give another one"
        ) from error
    return Path(place) / inner
