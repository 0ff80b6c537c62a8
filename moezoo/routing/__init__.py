"""Routing of tokens to experts: learned routers, their options, losses and statistics."""

from moezoo.routing.options import BalanceOptions, CapacityOptions, RouterOptions
from moezoo.routing.router import Router, Routing

__all__ = ["BalanceOptions", "CapacityOptions", "Router", "RouterOptions", "Routing"]
