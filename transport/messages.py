"""What the frontend and the ranks tell each other, and its form on the wire: msgpack of [tag, field, field, ...].

Decoding is strict: the tag must be known, the number of fields right, each field of the declared type (an integer may
stand for a float), and the whole within MAX_MESSAGE_BYTES. Nothing is ever unpickled.
"""

import types
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgpack

from transport.errors import ProtocolError

MAX_MESSAGE_BYTES = 64 << 20

Json = dict[str, Any]
"""A document of plain values; whoever reads it checks what is in it."""


# From the frontend to a rank.


@dataclass(frozen=True, slots=True)
class Start:
    """What to become: the first message to a rank. `model`: the fingerprint of the model's configuration."""

    config: Json
    model: str = ""


@dataclass(frozen=True, slots=True)
class Submit:
    """A sequence to compute. `generated` are tokens that were already made (elsewhere, before a failure).

    Sequences with different `cache_salt` share no cache.
    """

    request_id: int
    prompt: list[int]
    params: Json
    generated: list[int] = field(default_factory=list)
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody wants the sequence any more."""

    request_id: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Finish what runs and take nothing new."""


@dataclass(frozen=True, slots=True)
class Stop:
    """End the process now."""


@dataclass(frozen=True, slots=True)
class GroupMembers:
    """An attention group: its members, the leader first; none while it computes nothing.

    `since`: the generation that began with an empty cache. If that is an earlier one, the sequences of this one, which
    `Regroup` brings, go on with what the members have cached since.
    """

    generation: int
    members: list[int]
    since: int


@dataclass(frozen=True, slots=True)
class View:
    """Who is in the mesh; ranks and groups by number. `states`: loading, up, suspect, dead or joining.

    `born`: with which incarnation the present process of each rank began; -1 while there is none that can be met.
    """

    epoch: int
    incarnations: list[int]
    states: list[str]
    born: list[int]
    groups: list[GroupMembers]


@dataclass(frozen=True, slots=True)
class Place:
    """A new placement, in force from the next View on: by layer and expert the ranks that host it, best first.

    `order`: the experts of each layer that this rank is to load besides, and to say Hosting then.
    """

    version: int
    hosts: dict[int, list[list[int]]]
    order: dict[int, list[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Readmit:
    """To a rank that was fenced and is alive: drop all sequences and go on as `incarnation`."""

    incarnation: int


@dataclass(frozen=True, slots=True)
class Regroup:
    """To the leader of a group that goes on with other members: all sequences that it has in this generation."""

    generation: int
    sequences: list[Submit]


@dataclass(frozen=True, slots=True)
class Respawn:
    """Have a process started that is to be this life. It is the `local_rank`-th of `ranks_on_host` on its host."""

    rank: int
    incarnation: int
    local_rank: int
    ranks_on_host: int


@dataclass(frozen=True, slots=True)
class Heard:
    """To a rank's heart: the frontend has heard it beat."""


# From a rank to the frontend.


@dataclass(frozen=True, slots=True)
class Started:
    """The process of a rank has begun; all else may take a while."""

    pid: int
    host: str


@dataclass(frozen=True, slots=True)
class NotSpawned:
    """The process that was to be this life could not be started."""

    rank: int
    incarnation: int
    error: str


@dataclass(frozen=True, slots=True)
class Hello:
    """A rank is there. `isa` names its kernels' instruction set, or torch; `arithmetic` the one it was started with, or
    auto."""

    rank: int
    pid: int
    incarnation: int
    host: str
    num_threads: int
    isa: str
    arithmetic: str = "auto"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a rank has got in starting: `done` of `total` of a stage's unit."""

    rank: int
    stage: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The rank can compute; `num_blocks` blocks of latent cache are free."""

    rank: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class OutputItem:
    """What came for one sequence. `position` is the index of the first of `token_ids` in the sequence, prompt first.

    A log-probability entry is [token id, logprob, rank, [best ids], [their logprobs]]; the entry of a prompt's first
    position is None. `error` set: the sequence ended without a result; `refused` as well: it could never have had one.
    `cached_tokens`, with the first token only: so many tokens of the prompt came from the prefix cache.
    """

    request_id: int
    position: int
    token_ids: list[int]
    logprobs: list[Any] | None = None
    prompt_logprobs: list[Any] | None = None
    finish_reason: str | None = None
    error: str | None = None
    refused: bool = False
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Outputs:
    """The results of a step in a generation of the attention group."""

    rank: int
    generation: int
    items: list[OutputItem]


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters and gauges of a rank, by metric name; counters since the rank started.

    `expert_load`: by MoE layer, tokens that this rank's attention routed to each expert since its last Stats.
    """

    rank: int
    counters: dict[str, float]
    expert_load: dict[int, list[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failed:
    """The rank cannot go on."""

    rank: int
    error: str


@dataclass(frozen=True, slots=True)
class GroupPulse:
    """How far a rank has got in this generation of its attention group: steps that it has finished, and everything that
    it has done, in numbers. `awaited`: the members without whose frames it can do nothing more."""

    generation: int
    steps: int
    moves: int
    awaited: list[int]


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """From a rank's heart. `progress` counts the turns of its engine; `working`: it has something to do.

    Seconds since it began: `awake`, in which the engine waited for nobody, and `processor`, for which its thread had
    one.
    """

    progress: int
    working: bool
    group: GroupPulse | None = None
    awake: float = 0.0
    processor: float = 0.0


@dataclass(frozen=True, slots=True)
class PeerReport:
    """The rank misses a peer: it has "failed" as MPI says, or it is "late" with what it was asked for."""

    peer: int
    incarnation: int
    evidence: str


@dataclass(frozen=True, slots=True)
class Hosting:
    """The experts of each layer that the rank can answer for, and those that it was to load and could not, and why."""

    experts: dict[int, list[int]]
    refused: dict[int, list[int]] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Unfit:
    """The rank cannot be in its attention group as the view has it."""

    generation: int
    error: str


Message = (
    Start
    | Submit
    | Cancel
    | Drain
    | Stop
    | Hello
    | Progress
    | Ready
    | Outputs
    | Stats
    | Failed
    | View
    | Readmit
    | Heard
    | Heartbeat
    | PeerReport
    | Place
    | Hosting
    | Regroup
    | Unfit
    | Respawn
    | Started
    | NotSpawned
)

_TYPES: tuple[type[Any], ...] = get_args(Message)
"""A message's tag is its place among `Message`: append only."""
_TAGS = {message_type: tag for tag, message_type in enumerate(_TYPES)}


def encode_message(message: Message) -> bytes:
    """Raises ValueError for a message over MAX_MESSAGE_BYTES."""
    data: bytes = msgpack.packb([_TAGS[type(message)], *_field_values(message)], default=_field_values)
    if len(data) > MAX_MESSAGE_BYTES:
        raise ValueError(f"{type(message).__name__} takes {len(data)} bytes, at most {MAX_MESSAGE_BYTES}: send less")
    return data


def decode_message(data: bytes) -> Message:
    """Raises ProtocolError, and nothing else, for anything that is not a message."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"message of {len(data)} bytes, at most {MAX_MESSAGE_BYTES}")
    try:
        values = msgpack.unpackb(data, strict_map_key=False)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise ProtocolError(f"message is not msgpack: {error}") from None
    if not isinstance(values, list) or not values or type(values[0]) is not int:
        raise ProtocolError("message is not a list that begins with a tag")
    tag, *rest = values
    if not 0 <= tag < len(_TYPES):
        raise ProtocolError(f"message has unknown tag {tag}")
    message: Message = _build(_TYPES[tag], _CHECKS[tag], rest)
    return message


def _field_values(record: object) -> list[Any]:
    names = _FIELD_NAMES.get(type(record))
    if names is None:
        raise TypeError(f"{type(record).__name__} cannot be sent: use plain values")
    return [getattr(record, name) for name in names]


Check = Callable[[Any], Any]
"""Returns the value or raises ProtocolError."""


def _build(record_type: type[Any], checks: tuple[Check, ...], values: list[Any]) -> Any:
    if len(values) != len(checks):
        raise ProtocolError(f"{record_type.__name__} has {len(checks)} fields, got {len(values)}")
    return record_type(*[check(value) for check, value in zip(checks, values, strict=True)])


def _checks(record_type: type[Any]) -> tuple[Check, ...]:
    """One check for each field, in order."""
    hints = get_type_hints(record_type)
    return tuple(_check(hints[item.name], f"{record_type.__name__}.{item.name}") for item in fields(record_type))


def _check(hint: Any, name: str) -> Check:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return lambda value: value
    if isinstance(hint, type) and is_dataclass(hint):
        checks = _checks(hint)
        return lambda value: _build(hint, checks, _plain(list, value, name))
    if origin in (Union, types.UnionType):
        inner = _check(next(argument for argument in arguments if argument is not types.NoneType), name)
        return lambda value: None if value is None else inner(value)
    if origin is list:
        return _list_check(arguments[0], name)
    if origin is dict:
        key, item = (_check(argument, name) for argument in arguments)
        return lambda value: {key(k): item(v) for k, v in _plain(dict, value, name).items()}
    if hint is float:
        return lambda value: float(_plain(int, value, name) if type(value) is int else _plain(float, value, name))
    return lambda value: _plain(hint, value, name)


def _list_check(hint: Any, name: str) -> Check:
    if hint is Any:
        return lambda value: _plain(list, value, name)
    if hint is int:
        # Prompts are long: one pass without a call for each token.
        return lambda value: _ints(_plain(list, value, name), name)
    inner = _check(hint, name)
    return lambda value: [inner(item) for item in _plain(list, value, name)]


def _plain(expected: type[Any], value: Any, name: str) -> Any:
    if type(value) is not expected:
        raise ProtocolError(f"{name} must be {expected.__name__}, got {type(value).__name__}")
    return value


def _ints(values: list[Any], name: str) -> list[int]:
    if not set(map(type, values)) <= {int}:
        raise ProtocolError(f"{name} must hold integers only")
    return values


# `fields` looks at a whole class, and is asked several times in every step.
_FIELD_NAMES = {
    record_type: tuple(item.name for item in fields(record_type))
    for record_type in (*_TYPES, OutputItem, GroupMembers, GroupPulse)
}
_CHECKS = tuple(_checks(message_type) for message_type in _TYPES)
