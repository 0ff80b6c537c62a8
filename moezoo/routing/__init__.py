"""Routing of tokens to experts: learned routers, their options, losses and statistics."""

from moezoo.routing.balance_options import BalanceOptions, CapacityOptions
from moezoo.routing.option_groups import LogitOptions, WeightOptions
from moezoo.routing.options import RouterOptions
from moezoo.routing.router import Router, Routing

__all__ = [
    "BalanceOptions",
    "CapacityOptions",
    "LogitOptions",
    "Router",
    "RouterOptions",
    "Routing",
    "WeightOptions",
]
