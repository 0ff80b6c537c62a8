"""Routing of tokens to experts: learned routers, their options, losses and statistics."""

from moezoo.routing.balance_options import BalanceOptions, CapacityOptions
from moezoo.routing.options import LogitOptions, RouterOptions, WeightOptions
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
