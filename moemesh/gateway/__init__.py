"""The HTTP gateway: the OpenAI API over an EngineClient."""

from moemesh.gateway.app import create_app
from moemesh.gateway.options import GatewayLimits, GatewayOptions, SamplingDefaults, load_sampling_defaults
from moemesh.gateway.server import run_gateway

__all__ = [
    "GatewayLimits",
    "GatewayOptions",
    "SamplingDefaults",
    "create_app",
    "load_sampling_defaults",
    "run_gateway",
]
