"""Where tokens go: the router and what it has been seen to choose."""

from gating.load import ExpertLoad
from gating.router import Router

__all__ = ["ExpertLoad", "Router"]
