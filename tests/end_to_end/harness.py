"""Real meshes for tests: started as a user starts them, driven over HTTP, and looked after when they end.

Every process of a mesh carries a mark of its own in its environment, and all of them share one temporary folder: what
is left of a mesh is found whoever its parent has become.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families

from moemesh.launcher import package_environment
from moemesh.processes import die_with_parent

# Generous: the machine may be busy with anything. A test that passes never waits for so long.
START_SECONDS = 180.0
ANSWER_SECONDS = 180.0
GONE_SECONDS = 10.0

DEMO_NAME = "moemesh-demo"
SMALL_CACHE = ("--num-gpu-blocks-override", "256")

_MARK = "MOEMESH_TEST_MARK"
_SERVING = re.compile(r"serving (\S+) on (http://\S+) with (\d+) ranks")
_ROOT_CONSENT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def eventually(condition: Callable[[], object], *, timeout_s: float = 30.0, what: str = "") -> None:
    """Return as soon as `condition` holds; fail the test when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what or condition}"
        time.sleep(0.02)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An HTTP answer; `body` is its JSON, or its text where it is none."""

    status: int
    body: Any
    headers: Mapping[str, str]


def moemesh_command(*arguments: str) -> list[str]:
    """The command as an installed user types it, whatever the working directory holds."""
    return [sys.executable, "-P", "-m", "moemesh", *arguments]


def mpirun_command(num_ranks: int, *, ulfm: bool = True) -> list[str]:
    """The documented line of a user who brings their own mpirun."""
    mpirun = str(Path(sys.executable).parent / "mpirun")
    outlive = ["--with-ft", "ulfm"] if ulfm else []
    return [mpirun, *outlive, "--oversubscribe", "--bind-to", "none", "-n", str(num_ranks)]


class Mesh:
    """A `moemesh serve` that runs, or is about to."""

    def __init__(
        self, command: Sequence[str], *, environment: Mapping[str, str] | None = None, temporary: Path | None = None
    ) -> None:
        """`temporary`: its TMPDIR, where that must be a certain empty folder."""
        self.folder = Path(tempfile.mkdtemp(prefix="e2e-", dir="/tmp"))
        self.temporary = temporary or self.folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        self._mark = uuid.uuid4().hex
        self._log = self.folder / "log"
        self._segments: set[Path] = set()
        self.url = ""
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment | dict(environment or {}),
                start_new_session=True,
                preexec_fn=die_with_parent,  # when pytest itself is killed; the mesh then sees to the rest
            )

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to count as one of the mesh."""
        inherited = package_environment() | _ROOT_CONSENT
        return inherited | {_MARK: self._mark, "TMPDIR": str(self.temporary), "XDG_RUNTIME_DIR": ""}

    @property
    def log(self) -> str:
        """Everything the mesh has said so far."""
        return self._log.read_text(errors="replace")

    def wait_ready(self) -> None:
        """Until /health says 200."""
        eventually(self._announced, timeout_s=START_SECONDS, what="the mesh is ready")
        assert self.get("/health").status == 200
        self.remember_segments()

    def _announced(self) -> bool:
        assert self.process.poll() is None, f"it ended with {self.process.returncode}:\n{self.log}"
        found = _SERVING.search(self.log)
        self.url = found.group(2) if found else ""
        return bool(found)

    # --- requests -----------------------------------------------------------------------------------------------------

    def get(self, path: str, **headers: str) -> Answer:
        return self.send("GET", path, None, headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        """POST with `body` as JSON, or as it is where it is bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.send("POST", path, data, {"Content-Type": "application/json"} | headers)

    def send(self, method: str, path: str, data: bytes | None, headers: Mapping[str, str]) -> Answer:
        request = urllib.request.Request(self.url + path, data=data, headers=dict(headers), method=method)
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
                return _answer(response.status, response.read(), response.headers)
        except urllib.error.HTTPError as error:
            with error:
                return _answer(error.code, error.read(), error.headers)

    def complete(self, **fields: Any) -> dict[str, Any]:
        """The JSON of a completion that must succeed."""
        answer = self.post("/v1/completions", fields)
        assert answer.status == 200, answer
        assert isinstance(answer.body, dict)
        return answer.body

    def complete_all(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Completions sent all at once, in order; all must succeed."""
        answers = self.post_all(requests)
        assert all(answer.status == 200 for answer in answers), answers
        return [answer.body for answer in answers]

    def post_all(self, requests: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """The answers to completions sent all at once, in order."""
        return asyncio.run(_post_all(self.url, requests))

    @contextmanager
    def stream(self, **fields: Any) -> Iterator[Iterator[dict[str, Any] | None]]:
        """A streamed completion: its events as JSON, None for [DONE]. Leaving the block drops the connection.

        Nothing is waited for before the first event is asked for.
        """
        host, _, port = self.url.removeprefix("http://").partition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=ANSWER_SECONDS)
        try:
            body = json.dumps({"stream": True} | fields)
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            with contextlib.closing(_events(connection)) as events:
                yield events
        finally:
            connection.close()

    def metrics(self) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
        """The samples of /metrics: name -> sorted labels -> value."""
        found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
        for family in text_string_to_metric_families(str(self.get("/metrics").body)):
            for sample in family.samples:
                found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
        return found

    def total(self, name: str) -> float:
        """The sum of a metric over all its labels."""
        return sum(self.metrics().get(name, {}).values())

    # --- processes ----------------------------------------------------------------------------------------------------

    def processes(self) -> list[psutil.Process]:
        """All living processes of this mesh."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False

    def find_process(self, *words: str) -> psutil.Process:
        """The mesh's process whose command line holds all of `words`."""
        found = [process for process in self.processes() if all(word in process.cmdline() for word in words)]
        assert len(found) == 1, (words, [process.cmdline() for process in self.processes()])
        return found[0]

    def remember_segments(self) -> None:
        """Note the folders outside TMPDIR (those in /dev/shm) that the mesh says are its own."""
        for file in self.temporary.glob("moemesh-*/companions"):
            folders = [Path(json.loads(line)["folder"]) for line in file.read_text().splitlines()]
            self._segments.update(folder for folder in folders if not folder.is_relative_to(self.temporary))

    @property
    def segments(self) -> frozenset[Path]:
        """The folders that `remember_segments` has found."""
        return frozenset(self._segments)

    def left(self) -> list[object]:
        """Processes, shared-memory folders and temporary files of this mesh that are still there."""
        segments = [folder for folder in self._segments if folder.exists()]
        return [*self.processes(), *segments, *self.temporary.iterdir()]

    def wait_gone(self) -> None:
        """Until nothing is left of it, within the promised time."""
        eventually(lambda: not self.left(), timeout_s=GONE_SECONDS, what="nothing is left of the mesh")

    def stop(self) -> None:
        """End it as `kill` does, and see that it goes in order."""
        self.remember_segments()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(ANSWER_SECONDS)
        assert code == 0, f"exit code {code}:\n{self.log}"
        assert "improperly" not in self.log, f"mpirun complains of an orderly end:\n{self.log}"
        self.wait_gone()

    def destroy(self) -> None:
        """Leave nothing, whatever state it is in."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        for folder in [*self._segments, self.folder]:
            subprocess.run(["rm", "-rf", "--", str(folder)], check=True)


@contextmanager
def started(
    command: Sequence[str], *, environment: Mapping[str, str] | None = None, temporary: Path | None = None
) -> Iterator[Mesh]:
    """A mesh whose start is not waited for and whose end the test sees to."""
    mesh = Mesh(command, environment=environment, temporary=temporary)
    try:
        yield mesh
    finally:
        mesh.destroy()


@contextmanager
def running_server(*arguments: str, under_mpirun: int = 0) -> Iterator[Mesh]:
    """A mesh that serves on a free port; it must end in order and leave nothing behind.

    `under_mpirun` > 0: the user's own mpirun starts so many processes.
    """
    with serving(*arguments, under_mpirun=under_mpirun) as mesh:
        yield mesh
        if under_mpirun:
            mesh.remember_segments()
            mesh.find_process("attached-frontend").send_signal(signal.SIGTERM)
            mesh.process.wait(ANSWER_SECONDS)
            mesh.wait_gone()
        else:
            mesh.stop()


@contextmanager
def serving(*arguments: str, under_mpirun: int = 0, ulfm: bool = True) -> Iterator[Mesh]:
    """A mesh that is ready; the test ends it, by whatever means."""
    launcher = mpirun_command(under_mpirun, ulfm=ulfm) if under_mpirun else []
    with started([*launcher, *moemesh_command("serve", "--port", "0", *arguments)]) as mesh:
        mesh.wait_ready()
        yield mesh


def run_to_end(*arguments: str, timeout_s: float = START_SECONDS) -> subprocess.CompletedProcess[str]:
    """A `moemesh` command that ends by itself; it may leave no process and no folder."""
    with started(["true"]) as place:
        done = subprocess.run(
            moemesh_command(*arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=place.environment,
        )
        place.wait_gone()
    return done


def _answer(status: int, data: bytes, headers: Any) -> Answer:
    text = data.decode()
    is_json = str(headers.get("Content-Type", "")).startswith("application/json")
    return Answer(status=status, body=json.loads(text) if is_json else text, headers=dict(headers.items()))


def _events(connection: http.client.HTTPConnection) -> Generator[dict[str, Any] | None, None, None]:
    with connection.getresponse() as response:
        assert response.status == 200, response.read()
        for line in response:
            if line.startswith(b"data: "):
                data = line.removeprefix(b"data: ").strip()
                yield None if data == b"[DONE]" else json.loads(data)


async def _post_all(url: str, requests: Sequence[Mapping[str, Any]]) -> list[Answer]:
    timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

        async def post(fields: Mapping[str, Any]) -> Answer:
            async with session.post(f"{url}/v1/completions", json=fields) as response:
                return _answer(response.status, await response.read(), response.headers)

        return await asyncio.gather(*map(post, requests))
