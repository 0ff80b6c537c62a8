"""``experts_implementation="moezoo"``: transformers' mixtures with the kernels here.

transformers 5 lets a function of a given name compute a model's routed experts, in every
architecture whose experts its decorator ``use_experts_implementation`` marks. The router, shared
experts and the rest stay transformers' own.
"""

from __future__ import annotations

from moezoo.errors import InputError

IMPLEMENTATION = "moezoo"
"""The name of the implementation, as ``experts_implementation`` has it."""


def register_experts() -> None:
    """Make transformers know ``experts_implementation="moezoo"``; twice is as good as once.

    ``import moezoo_models`` does it by itself. Afterwards a model takes it by
    ``from_pretrained(..., experts_implementation="moezoo")``, or by
    ``model.set_experts_implementation("moezoo")`` at any time, and gives it back by another name.

    Raises:
        InputError: transformers is not installed, or too old to have the interface.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        from moezoo.stock_experts.forward import experts_forward
    except ImportError as error:
        raise InputError(
            f"register_experts: transformers has no interface for experts here ({error}); "
            "pip install 'transformers>=5.23,<6'"
        ) from error
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


__all__ = ["IMPLEMENTATION", "register_experts"]
