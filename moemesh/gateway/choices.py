"""One choice of an answer: what the engine puts out becomes pieces of text with their log-probabilities."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import chain

from moemesh.detokenizer import IncrementalDecoder, OutputText, StopMatcher, StopString
from moemesh.engine_client import (
    EngineClient,
    EngineFailed,
    FinishReason,
    GenerationRequest,
    TokenLogprob,
    TokenOutput,
)
from moemesh.gateway.errors import outcome_of
from moemesh.gateway.prompts import Prompt
from moemesh.metrics import Metrics
from moemesh.sampling_params import SamplingParams
from moemesh.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRules:
    """How ids become the text of a choice; one for all choices of a request."""

    tokenizer: Tokenizer | None
    stops: tuple[StopString, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """`index` is the one in the answer, `number` the one among the n choices of the prompt."""

    index: int
    number: int
    prompt: Prompt
    params: SamplingParams
    rules: TextRules
    request_id: str
    cache_salt: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Some tokens of a choice, in order. `offsets`: where each token's text begins in the text of the choice.

    `text` may be shorter than the tokens say (part is held back) or longer (it had been). The last piece has a
    `finish_reason`; its `stop_reason` is the stop string or stop token id that was met, None for the model's own end.
    The first piece says how many tokens of the prompt were `cached_tokens`.
    """

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    offsets: tuple[int, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


def joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of one choice as one."""
    return Piece(
        index=pieces[0].index,
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(chain.from_iterable(piece.token_ids for piece in pieces)),
        logprobs=tuple(chain.from_iterable(piece.logprobs for piece in pieces)),
        offsets=tuple(chain.from_iterable(piece.offsets for piece in pieces)),
        prompt_logprobs=tuple(chain.from_iterable(piece.prompt_logprobs for piece in pieces)),
        cached_tokens=pieces[0].cached_tokens,
        finish_reason=pieces[-1].finish_reason,
        stop_reason=pieces[-1].stop_reason,
    )


class ChoiceAssembler:
    """Engine outputs in, pieces out; knows neither the engine nor the client."""

    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        self._prompt_logprobs: list[TokenLogprob | None] = []
        rules, params = choice.rules, choice.params
        self._text: OutputText | None = None
        if rules.tokenizer is not None:
            decoder = IncrementalDecoder(
                rules.tokenizer, skip_special_tokens=rules.skip_special_tokens, context=choice.prompt.token_ids
            )
            matcher = StopMatcher(rules.stops, include_in_text=rules.include_stop)
            self._text = OutputText(decoder, matcher, min_tokens=params.min_tokens)

    def take(self, output: TokenOutput) -> Piece | None:
        """The piece for an output; tokens behind the one that completes a stop string are not in it.

        An output with nothing but a part of the prompt's log-probabilities makes none: the first piece has them all.
        """
        self._prompt_logprobs.extend(output.prompt_logprobs or ())
        if not output.token_ids and output.finish_reason is None:
            return None
        texts: list[str] = []
        offsets: list[int] = []
        stop: str | None = None
        for token_id in output.token_ids:
            text, stop = self._push(token_id, hidden=token_id == output.stop_token, offsets=offsets)
            texts.append(text)
            if stop is not None:
                break
        if output.finish_reason is not None and stop is None and self._text is not None:
            text, stop = self._text.finish()
            texts.append(text)
        count = len(offsets)
        first_logprobs, self._prompt_logprobs = self._prompt_logprobs, []
        return Piece(
            index=self._choice.index,
            text="".join(texts),
            token_ids=tuple(output.token_ids[:count]),
            logprobs=tuple((output.logprobs or ())[:count]),
            offsets=tuple(offsets),
            prompt_logprobs=tuple(first_logprobs),
            cached_tokens=output.cached_tokens,
            finish_reason="stop" if stop is not None else output.finish_reason,
            stop_reason=stop if stop is not None else self._stop_reason(output),
        )

    def _push(self, token_id: int, *, hidden: bool, offsets: list[int]) -> tuple[str, str | None]:
        """A token that ends the choice is not part of its text, unless stops are wanted in it."""
        if self._text is None:
            offsets.append(0)
            return "", None
        offsets.append(self._text.length)
        if hidden and not self._choice.rules.include_stop:
            return "", None
        return self._text.push(token_id)

    def _stop_reason(self, output: TokenOutput) -> int | None:
        return output.stop_token if output.stop_token in self._choice.params.stop_token_ids else None


async def generate_choice(engine: EngineClient, choice: Choice, metrics: Metrics) -> AsyncGenerator[Piece, None]:
    """The pieces of one choice, measured. Closing it closes the engine's stream, which cancels the request.

    Ends with the piece that has a finish_reason, or raises a RequestError.
    """
    request = GenerationRequest(
        prompt_token_ids=choice.prompt.token_ids,
        params=choice.params,
        choice=choice.number,
        request_id=choice.request_id,
        cache_salt=choice.cache_salt,
    )
    watch = _Stopwatch(metrics, num_prompt_tokens=len(choice.prompt.token_ids))
    assembler = ChoiceAssembler(choice)
    try:
        async with aclosing(engine.generate(request)) as outputs:
            async for output in outputs:
                piece = assembler.take(output)
                if piece is None:
                    continue
                watch.saw(piece)
                yield piece
                if piece.finish_reason is not None:
                    return
        raise EngineFailed("the engine ended the request without a finish reason")
    except Exception as error:
        watch.outcome = outcome_of(error)
        raise
    finally:
        watch.stop()


class _Stopwatch:
    """Measures one choice; a choice that is closed before its end counts as cancelled."""

    def __init__(self, metrics: Metrics, *, num_prompt_tokens: int) -> None:
        self.outcome = "cancelled"
        self._metrics = metrics
        self._start = time.perf_counter()
        self._last: float | None = None
        self._num_tokens = 0
        metrics.open_requests.inc()
        metrics.request_prompt_tokens.observe(num_prompt_tokens)

    def saw(self, piece: Piece) -> None:
        now = time.perf_counter()
        if piece.token_ids:
            if self._last is None:
                self._metrics.time_to_first_token.observe(now - self._start)
            else:
                self._metrics.inter_token_latency.observe(now - self._last)
            self._last = now
            self._num_tokens += len(piece.token_ids)
            self._metrics.generation_tokens.inc(len(piece.token_ids))
        if piece.finish_reason is not None:
            self.outcome = piece.finish_reason

    def stop(self) -> None:
        self._metrics.open_requests.dec()
        self._metrics.requests.labels(self.outcome).inc()
        if self.outcome in ("stop", "length"):
            self._metrics.request_latency.observe(time.perf_counter() - self._start)
            self._metrics.request_generation_tokens.observe(self._num_tokens)
