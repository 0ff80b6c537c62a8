"""Run a foreign model on two short rows, to see what its blocks do and that a swap keeps it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moezoo.errors import InputError
from moezoo.swap_contract import Call, Contract, Echo, contract_of, same
from moezoo.swap_sites import Site

_LENGTH = 4
_FLAGS = ("output_attentions", "output_hidden_states", "output_router_logits")


def watch(model: nn.Module, sites: list[Site]) -> tuple[list[Contract], bool]:
    """Return the contract of each block, after a check that the model goes on with it.

    The model runs on two rows of four tokens, in evaluation mode and without gradients: as it is,
    and with the blocks behind their contracts, which must give the same. A model that cannot be
    run on token ids (it may want something else) is taken at its blocks' word: each must turn
    hidden states into hidden states, alone.

    Returns:
        The contracts, and whether the model runs on token ids.

    Raises:
        InputError: a block does what no layer of the zoo can do in its place.
    """
    with _trial(model):
        calls: dict[nn.Module, Call] = {}
        try:
            with _recorded(sites, calls):
                before = _run(model)
        except Exception as error:
            return [_plain(model, site, error) for site in sites], False
        contracts = [contract_of(site, calls) for site in sites]
        pairs = list(zip(sites, contracts, strict=True))
        if not _goes_on(model, pairs, before):
            for pair in pairs:
                _goes_on(model, [pair], before, refuse=True)
    return contracts, True


def _goes_on(
    model: nn.Module, pairs: list[tuple[Site, Contract]], before: Tensor, refuse: bool = False
) -> bool:
    """Return whether a model outputs the same where blocks run through their contracts."""
    what = " and ".join(str(site) for site, _ in pairs)
    reason = "the rest of the model depends on how it answers"
    try:
        for site, contract in pairs:
            site.put_whole(Echo(site, contract))
        if same(_run(model), before):
            return True
    except Exception as error:
        reason = _line(error)
    finally:
        for site, _ in pairs:
            site.restore()
    if refuse:
        raise InputError(
            f"model: {what} cannot be replaced by one layer, replace it by hand ({reason})"
        )
    return False


def try_out(model: nn.Module) -> None:
    """Run the model with its new layers, if it runs on token ids.

    Raises:
        InputError: it fails now.
    """
    try:
        with _trial(model):
            _run(model)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"model: {type(model).__name__} fails with the new layers: {_line(error)}"
        ) from error


def _run(model: nn.Module) -> Tensor:
    """Return the first result of the model for two different rows."""
    embedding = next(m for m in model.modules() if isinstance(m, nn.Embedding))
    device = embedding.weight.device
    ids = (torch.arange(2 * _LENGTH, device=device) * 7 + 3) % embedding.num_embeddings
    options: dict[str, Any] = {}
    config = getattr(model, "config", None)
    if config is not None:
        options = {"use_cache": False} if hasattr(config, "use_cache") else {}
        options |= {flag: False for flag in _FLAGS if getattr(config, flag, False)}
    ids = ids.reshape(2, _LENGTH)
    output: Any = model(ids, **options) if config is None else model(input_ids=ids, **options)
    for name in ("logits", "last_hidden_state"):
        output = getattr(output, name, output)
    while not isinstance(output, Tensor):
        output = output[0]
    return output


@contextmanager
def _trial(model: nn.Module) -> Iterator[None]:
    """Leave modes and random numbers as they were."""
    training = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and loading it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        kind = next(iter(devices)).type if devices else "cuda"
        stack.enter_context(torch.random.fork_rng(list(devices), device_type=kind))
        try:
            for module, _ in training:
                module.training = False
            yield
        finally:
            for module, mode in training:
                module.training = mode


@contextmanager
def _recorded(sites: list[Site], calls: dict[nn.Module, Call]) -> Iterator[None]:
    """Record the first call of every part of every block."""

    def note(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        calls.setdefault(module, Call(args, dict(kwargs), output))

    handles = [
        part.register_forward_hook(note, with_kwargs=True)
        for site in sites
        for part in site.original
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _plain(model: nn.Module, site: Site, reason: Exception) -> Contract:
    """Call the block itself, in a model that does not run on token ids."""
    main = site.original[0]
    refusal = InputError(
        f"model: {site} cannot be watched at work, as {type(model).__name__} fails on token ids "
        f"({_line(reason)}); replace it by hand"
    )
    if len(site.names) > 1:
        raise refusal
    width = _width(model, site.block)
    like = next((p for p in main.parameters() if p.is_floating_point()), torch.empty(0))
    hidden = torch.randn(2, _LENGTH, width, device=like.device, dtype=like.dtype)
    try:
        output = main(hidden)
    except Exception as error:
        raise refusal from error
    if not isinstance(output, Tensor) or output.shape != hidden.shape:
        raise refusal
    return Contract(width)


def _width(model: nn.Module, block: nn.Module) -> int:
    config = getattr(model, "config", None)
    if isinstance(width := getattr(config, "hidden_size", None), int):
        return width
    for name, parameter in block.named_parameters():
        if "norm" in name and parameter.ndim == 1:
            return parameter.numel()
    raise InputError("model: its width is unknown; give it a config with hidden_size")


def _line(error: Exception) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return first if len(first) <= 200 else f"{first[:200]}…"
