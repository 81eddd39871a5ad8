"""Serve the bundled model on a mesh of four ranks, stream a completion over HTTP, and say what to try next.

    python examples/demo.py

On a terminal the mesh goes on serving until Ctrl-C; otherwise it ends after the completion.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HOST, PORT, RANKS = "127.0.0.1", 8000, 4
PROMPT = "Explain the `if` statement."
START_SECONDS = 180.0


def main() -> int:
    """Start, show, stop; the exit code."""
    server = subprocess.Popen(
        [sys.executable, "-m", "moemesh", "serve", "--ranks", str(RANKS), "--host", HOST, "--port", str(PORT)]
    )
    try:
        wait_until_ready(server)
        mesh = get("/mesh")
        pids = ", ".join(str(rank["pid"]) for rank in mesh["ranks"])
        print(f"\n{len(mesh['ranks'])} ranks are up (pids {pids}), 256 experts spread over them.\n", flush=True)
        print(f"> {PROMPT}\n", flush=True)
        for piece in stream_chat(PROMPT):
            print(piece, end="", flush=True)
        print(f"\n\nTry next:\n\n{next_command()}\n", flush=True)
        if sys.stdout.isatty():
            print("The mesh goes on serving; Ctrl-C ends it.", flush=True)
            server.wait()
    except KeyboardInterrupt:
        pass  # the server got it too, and drains
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)
        code = server.wait()
    return code


def wait_until_ready(server: subprocess.Popen[bytes]) -> None:
    """Until /health is 200. Raises SystemExit when the server ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with exit code {server.returncode}")
        try:
            connection = http.client.HTTPConnection(HOST, PORT, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass  # it does not listen yet
        time.sleep(0.1)
    raise SystemExit(f"the mesh was not ready after {START_SECONDS:.0f} s")


def get(path: str) -> dict[str, list[dict[str, object]]]:
    """The JSON at a path."""
    connection = http.client.HTTPConnection(HOST, PORT, timeout=30)
    connection.request("GET", path)
    answer: dict[str, list[dict[str, object]]] = json.load(connection.getresponse())
    return answer


def stream_chat(question: str) -> Iterator[str]:
    """Pieces of the answer as server-sent events bring them."""
    body = {
        "model": "moemesh-demo",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 120,
        "temperature": 0,
        "stream": True,
    }
    connection = http.client.HTTPConnection(HOST, PORT, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    for line in connection.getresponse():
        data = line.decode().strip().removeprefix("data: ")
        if data.startswith("{"):
            for choice in json.loads(data)["choices"]:
                yield choice["delta"].get("content") or ""


def next_command() -> str:
    """What the reader may type, the mesh being up on a terminal and ended elsewhere."""
    body = '{"model": "moemesh-demo", "prompt": "The with statement is used", "max_tokens": 60}'
    ask = f"    curl http://{HOST}:{PORT}/v1/completions -H 'Content-Type: application/json' -d '{body}'"
    if sys.stdout.isatty():
        return ask
    moemesh = os.path.relpath(Path(sys.executable).with_name("moemesh"))
    return f"    {moemesh} serve --ranks {RANKS}\n{ask}"


if __name__ == "__main__":
    sys.exit(main())
