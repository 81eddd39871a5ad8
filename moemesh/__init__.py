"""moemesh: an asynchronous expert-parallel serving mesh for DeepSeek-V3-class mixture-of-experts models."""

from typing import TYPE_CHECKING, Any

from moemesh.sampling_params import SamplingParams

if TYPE_CHECKING:
    from moemesh.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """`LLM` brings torch with it; the keeper and the command line's help should not wait for that."""
    if name == "LLM":
        from moemesh.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
