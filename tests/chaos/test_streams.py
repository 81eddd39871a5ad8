"""Clients against servers that answer by a script: every way a stream can end."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from tests.chaos.history import Stream
from tests.chaos.streams import Clients
from tests.chaos.test_history import event
from tests.end_to_end.harness import eventually

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
WHOLE = HEAD + b"data: " + event(5) + b"\n\n: keep-alive\n\ndata: " + event(6) + b"\n\ndata: [DONE]\n\n"
REFUSED = b"HTTP/1.1 503 Busy\r\nRetry-After: 0\r\nContent-Length: 39\r\nConnection: close\r\n\r\n"
REFUSED += b'{"error": {"message": "come back soon"}}'[:39]


class Scripted(socketserver.ThreadingTCPServer):
    """Answers the n-th request with the n-th text, the last one again and again; with `hold`, and then nothing."""

    daemon_threads = True

    def __init__(self, answers: Sequence[bytes], *, hold: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = list(answers)
        self.released = threading.Event()
        if not hold:
            self.released.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(socketserver.StreamRequestHandler):
    server: Scripted

    def handle(self) -> None:
        length = 0
        for line in iter(self.rfile.readline, b"\r\n"):
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        self.rfile.read(length)
        answers = self.server.answers
        self.wfile.write(answers.pop(0) if len(answers) > 1 else answers[0])
        self.server.released.wait(30)


@contextmanager
def serving(*answers: bytes, hold: bool = False) -> Iterator[Scripted]:
    with Scripted(answers, hold=hold) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()


def only_stream(*answers: bytes) -> Stream:
    with serving(*answers) as server, Clients(server.url, [{"prompt": [1]}], rounds=1) as clients:
        [stream] = clients.finish(30)
    return stream


def test_complete() -> None:
    stream = only_stream(WHOLE)
    assert stream.ending == "complete"
    assert stream.answer.tokens == (5, 6)
    assert stream.sent < stream.arrivals[0][0] <= stream.arrivals[1][0] <= stream.ended


@pytest.mark.parametrize(
    ("answer", "ending", "detail"),
    [
        (WHOLE.removesuffix(b"data: [DONE]\n\n"), "cut", "without [DONE]"),
        (HEAD + b'data: {"error": {"message": "lost"}}\n\n', "error", "lost"),
        (b"", "cut", "Disconnected"),
        (REFUSED, "refused", "503"),
        (b"HTTP/1.1 400 Bad\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno", "error", "400: no"),
    ],
    ids=["cut", "told", "no answer", "refused", "bad request"],
)
def test_endings(answer: bytes, ending: str, detail: str) -> None:
    stream = only_stream(answer)
    assert stream.ending == ending
    assert detail in stream.detail


def test_nobody_listens() -> None:
    with serving(WHOLE) as server:
        url = server.url
    with Clients(url, [{"prompt": [1]}], rounds=1) as clients:
        [stream] = clients.finish(30)
    assert stream.ending == "cut"


def test_silence_is_noticed_in_spite_of_comments() -> None:
    still = HEAD + b"data: " + event(5) + b"\n\n: keep-alive\n\n"
    with serving(still, hold=True) as server, Clients(server.url, [{}], silence_s=0.05) as clients:
        eventually(clients.all_stopped, what="the client gives up")
        [stream] = clients.finish(30)
    assert stream.ending == "silent"
    assert stream.answer.tokens == (5,)


def test_what_still_runs_at_the_end_is_left() -> None:
    with serving(HEAD + b"data: " + event(5) + b"\n\n", hold=True) as server, Clients(server.url, [{}]) as clients:
        eventually(lambda: clients.snapshot() == [1], what="its token has come")
        [stream] = clients.finish(0.0)
    assert stream.ending == "left"


def test_a_client_goes_on_with_its_own_request_until_it_is_told_to_finish() -> None:
    with serving(WHOLE) as server, Clients(server.url, [{}, {}], num_clients=3) as clients:
        eventually(lambda: min(clients.snapshot()) > 6, what="everybody has had several streams")
        assert not clients.all_stopped()
        streams = clients.finish(30)
    assert {(stream.client, stream.kind) for stream in streams} == {(0, 0), (1, 1), (2, 0)}
    assert {stream.ending for stream in streams} == {"complete"}
    assert [stream.sent for stream in streams] == sorted(stream.sent for stream in streams)


def test_a_client_that_is_refused_comes_back() -> None:
    with serving(REFUSED, WHOLE) as server, Clients(server.url, [{}], rounds=2) as clients:
        streams = clients.finish(30)
    assert [stream.ending for stream in streams] == ["refused", "complete"]
    assert streams[0].retry_after == 0.0


def test_a_client_whose_stream_failed_stops() -> None:
    with serving(HEAD) as server, Clients(server.url, [{}]) as clients:
        eventually(clients.all_stopped, what="it stops")
        assert [stream.ending for stream in clients.finish(30)] == ["cut"]
