"""What every handler needs: the engine, the tokenizer, the options, and a bounded pool of threads for long work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, TypeVar

from aiohttp import web

from moemesh.chat_template import ChatTemplate
from moemesh.engine_client import EngineClient, NotReady, Overloaded
from moemesh.gateway.errors import ApiError
from moemesh.gateway.json_body import read_json_object
from moemesh.gateway.options import GatewayOptions
from moemesh.gateway.prompts import PromptReader
from moemesh.gateway.request_schemas import RequestSchema
from moemesh.metrics import Metrics
from moemesh.tokenizer import Tokenizer

_T = TypeVar("_T")


class Gateway:
    """The gateway of one mesh. Lives on one event loop; `close` ends its threads."""

    def __init__(
        self,
        engine: EngineClient,
        options: GatewayOptions,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None,
        metrics: Metrics,
    ) -> None:
        self.engine = engine
        self.options = options
        self.tokenizer = tokenizer
        self.template = template
        self.metrics = metrics
        self.started = int(time.time())
        self._num_open = 0
        self._executor = ThreadPoolExecutor(options.worker_threads, thread_name_prefix="gateway")

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def offload(self, function: Callable[..., _T], *args: Any) -> _T:
        """The result of a call that may take long, made in a worker thread."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    async def read(self, request: web.Request, schema: RequestSchema) -> dict[str, Any]:
        """The checked fields of a request for one of our models."""
        body = await read_json_object(request, offload=self.offload, timeout_s=self.options.client_timeout_s)
        fields = schema.read(body)
        self.model_name(fields)
        return fields

    def model_name(self, fields: Mapping[str, Any]) -> str:
        """The model asked for, ours where none is named. ApiError 404 for a model that is not served."""
        names = self.options.served_model_names
        name = fields.get("model", names[0])
        if name not in names:
            raise unknown_model(str(name), names)
        return str(name)

    @property
    def prompts(self) -> PromptReader:
        return PromptReader(
            tokenizer=self.tokenizer,
            template=self.template,
            vocab_size=self.engine.model_config.vocab_size,
            max_model_len=self.engine.max_model_len,
            max_prompts=self.options.limits.max_prompts,
        )

    def require_serving(self) -> None:
        """NotReady while the engine takes no requests; Overloaded when too many are open here."""
        status = self.engine.status()
        if status.state != "ready":
            detail = f": {status.detail}" if status.detail else ""
            raise NotReady(f"the model is not being served now, it is {status.state}{detail}")
        if self._num_open >= self.options.limits.max_open_choices:
            raise Overloaded(
                f"{self._num_open} requests are open, at most {self.options.limits.max_open_choices} may be"
            )

    @contextmanager
    def open_choices(self, count: int) -> Iterator[None]:
        """Counts the choices of one request against the limit while they are open."""
        self._num_open += count
        try:
            yield
        finally:
            self._num_open -= count


GATEWAY: web.AppKey[Gateway] = web.AppKey("gateway", Gateway)


def unknown_model(name: str, served: tuple[str, ...]) -> ApiError:
    return ApiError(
        HTTPStatus.NOT_FOUND,
        f"The model `{name[:200]}` does not exist: this server has {', '.join(served)}",
        param="model",
        code="model_not_found",
    )
