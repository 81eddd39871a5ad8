"""The private folder of one run, and how it goes away whoever is left to remove it.

    PATH/                 0700, in $XDG_RUNTIME_DIR or the temporary folder
        options.json      what was asked for; ranks read it from here
        frontend          pid and start time of the frontend, or that it is on another host
        contact.json      how its ranks reach the frontend, where the mesh is on several hosts
        port              where the frontend listens for other hosts
        processes         one line for each rank process
        companions        folders elsewhere that belong to the run, removed with it
        control           the control plane's ipc socket
        asleep, bell.*    how the ranks wake each other
        trace.*           what each rank did when, with --trace
        checksums.*       what each rank has read of the checkpoint
        tmp/              TMPDIR of mpirun and the ranks: session folders of Open MPI, PRRTE and PMIx
    /dev/shm/NAME/        Open MPI's shared-memory segments (16 MiB a rank)

A process that is killed with SIGKILL removes nothing, so everything the mesh leaves on a host is in folders that any
other process of the run can remove.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from moemesh.contact import Contact
from moemesh.options import EngineOptions, options_from_json
from moemesh.processes import ProcessIdentity

PREFIX = "moemesh-"
SHARED_MEMORY = Path("/dev/shm")

# sun_path of sockaddr_un holds 108 bytes with its closing zero (unix(7)).
MAX_SOCKET_PATH = 107

# What Open MPI's sm transport maps for each rank, with room for what grows later.
SHARED_MEMORY_PER_RANK = 32 << 20

# Prefixes of folders that may be removed as companions: ours, and Open MPI's and PRRTE's session folders.
_COMPANION_PREFIXES = (PREFIX, "ompi.", "prte.", "prterun.")
_REMOVE_ATTEMPTS = 20
_ELSEWHERE = "on another host"


class RunDirectoryError(RuntimeError):
    """The folder of a run cannot be made or used."""


@dataclass(frozen=True, kw_only=True)
class RunDirectory:
    """The folder of one run on one host. `create` makes it in the frontend or its parent, `create_remote` in the first
    rank of another host; `open` finds it in other processes."""

    path: Path

    @classmethod
    def create(cls, *, num_ranks: int = 1) -> RunDirectory:
        """A new folder, with this process as its frontend. The caller must `remove` it in the end, whatever happens."""
        return cls._create(str(ProcessIdentity.current()), num_ranks)

    @classmethod
    def create_remote(cls, contact: Contact, options: EngineOptions, *, num_ranks: int) -> RunDirectory:
        """A new folder for the ranks of a host on which the frontend is not. The last of them removes it."""
        run = cls._create(_ELSEWHERE, num_ranks)
        run.set_contact(contact)
        run.write_options(options)
        return run

    @classmethod
    def _create(cls, frontend: str, num_ranks: int) -> RunDirectory:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_base_folder()))
        run = cls(path=path)
        try:
            (path / "tmp").mkdir()
            _write_whole(path / "frontend", frontend)
            run.add_companion(make_shared_memory_folder(num_ranks, fallback=path))
        except BaseException:
            run.remove()
            raise
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """The folder another process of this user made. Raises RunDirectoryError: not there, or open to others."""
        folder = Path(path)
        try:
            status = folder.lstat()
        except OSError as error:
            raise RunDirectoryError(
                f"the run directory {folder} is not there: the mesh has ended, or its frontend runs on another host"
            ) from error
        private = folder.is_dir() and status.st_uid == os.geteuid() and status.st_mode & 0o077 == 0
        if not private or not folder.name.startswith(PREFIX):
            raise RunDirectoryError(
                f"{folder} is no run directory: it must be named {PREFIX}* and be this user's alone"
            )
        return cls(path=folder)

    @property
    def contact(self) -> Contact:
        """How processes of this host reach the frontend."""
        try:
            return Contact.from_json((self.path / "contact.json").read_text())
        except OSError:
            return Contact(endpoint=self.own_endpoint)

    def set_contact(self, contact: Contact) -> None:
        """There are several hosts: before anybody asks for the contact. Readable by this user alone."""
        _write_whole(self.path / "contact.json", contact.to_json())

    @property
    def own_endpoint(self) -> str:
        """ZeroMQ endpoint in this folder; the frontend binds it."""
        return f"ipc://{self.path / 'control'}"

    @property
    def port(self) -> int | None:
        """Where the frontend listens for other hosts, once it does."""
        try:
            return int((self.path / "port").read_text())
        except OSError:
            return None

    def set_port(self, port: int) -> None:
        """The frontend listens for other hosts."""
        _write_whole(self.path / "port", str(port))

    def trace(self, rank: int) -> Path:
        """Where a rank writes what it did when."""
        return self.path / f"trace.{rank}"

    def traces(self) -> dict[int, Path]:
        """What the ranks wrote there, by rank."""
        found = {int(path.suffix[1:]): path for path in self.path.glob("trace.*")}
        return dict(sorted(found.items()))

    def checksums(self, rank: int) -> Path:
        """Where a rank leaves the checksums of what it has read."""
        return self.path / f"checksums.{rank}"

    def all_checksums(self) -> list[Path]:
        """What the ranks have left there."""
        return [path for path in self.path.glob("checksums.*") if path.suffix[1:].isdigit()]

    @property
    def temporary(self) -> Path:
        """TMPDIR for everything this run starts."""
        return self.path / "tmp"

    @property
    def shared_memory(self) -> Path:
        """Where the launcher tells Open MPI to put its shared-memory segments."""
        return self.companions()[0]

    @property
    def frontend(self) -> ProcessIdentity | None:
        """The frontend's process; None: it is on another host. Raises RunDirectoryError when the run is removed."""
        try:
            text = (self.path / "frontend").read_text()
            return None if text == _ELSEWHERE else ProcessIdentity.parse(text)
        except (OSError, ValueError) as error:
            raise RunDirectoryError(f"the run directory {self.path} names no frontend: the mesh has ended") from error

    @property
    def is_remote(self) -> bool:
        """The frontend is on another host: nobody but the ranks removes this folder."""
        try:
            return self.frontend is None
        except RunDirectoryError:
            return False

    def set_frontend(self, process: ProcessIdentity) -> None:
        """Make another process the one whose end is the end of the mesh."""
        _write_whole(self.path / "frontend", str(process))

    def write_options(self, options: EngineOptions) -> None:
        """Leave the options for the ranks. Readable by this user alone: they hold the API keys."""
        _write_whole(self.path / "options.json", options.to_json())

    def read_options(self) -> EngineOptions:
        """The options as they were written, of the class they had."""
        return options_from_json((self.path / "options.json").read_text())

    def register(self, process: ProcessIdentity) -> None:
        """Note a rank process, so that whoever ends the mesh can end it too, even when it is stopped."""
        _append_line(self.path / "processes", str(process))

    def processes(self) -> list[ProcessIdentity]:
        """All rank processes that ever registered; many may be gone."""
        return [ProcessIdentity.parse(line) for line in _read_lines(self.path / "processes")]

    def add_companion(self, folder: Path, *, unless_alive: ProcessIdentity | None = None) -> None:
        """Remove `folder` together with this one, but not while `unless_alive` (who then removes it itself) lives."""
        entry = {"folder": str(folder), "unless_alive": None if unless_alive is None else str(unless_alive)}
        _append_line(self.path / "companions", json.dumps(entry))

    def empty(self) -> None:
        """Remove what the run's processes have left in their folders; all of them have ended."""
        for folder in (self.temporary, self.shared_memory):
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def remove(self) -> None:
        """Remove the run's folders. Idempotent; several processes may do it at once; never raises."""
        for folder, unless_alive in self._companions():
            if unless_alive is None or not unless_alive.alive():
                _remove_own_folder(folder)
        _remove_own_folder(self.path)

    def companions(self) -> list[Path]:
        """Folders elsewhere that `remove` removes too."""
        return [folder for folder, _ in self._companions()]

    def _companions(self) -> list[tuple[Path, ProcessIdentity | None]]:
        entries = [json.loads(line) for line in _read_lines(self.path / "companions")]
        return [
            (Path(entry["folder"]), ProcessIdentity.parse(entry["unless_alive"]) if entry["unless_alive"] else None)
            for entry in entries
        ]


def make_shared_memory_folder(num_ranks: int, *, fallback: Path | None = None) -> Path:
    """A new private folder for the segments of `num_ranks` ranks.

    In /dev/shm where that is large enough (a container often has 64 MiB only), else in `fallback` (None: the temporary
    folder), whose pages the kernel writes to disk now and then.
    """
    base = fallback
    with contextlib.suppress(OSError):
        status = os.statvfs(SHARED_MEMORY)
        if status.f_bavail * status.f_frsize >= num_ranks * SHARED_MEMORY_PER_RANK:
            base = SHARED_MEMORY
    return Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))


def _base_folder() -> str:
    """The first usable place with a short enough path; mkdtemp appends 8 characters to the prefix."""
    tail = len(f"/{PREFIX}") + 8 + len("/control")
    candidates = [os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp"]
    for candidate in candidates:
        usable = candidate and os.path.isdir(candidate) and os.access(candidate, os.W_OK | os.X_OK)
        if usable and len(os.fsencode(candidate)) + tail <= MAX_SOCKET_PATH:
            return candidate
    raise RunDirectoryError(
        f"no place for the run directory: tried {', '.join(filter(None, candidates))}; each is missing, not "
        f"writable or longer than {MAX_SOCKET_PATH - tail} bytes (a socket's path may have {MAX_SOCKET_PATH}). "
        "Set TMPDIR to a short path"
    )


def _remove_own_folder(folder: Path) -> None:
    """Remove a folder of this user's that is named as a run's. Others may be writing to it or removing it too."""
    if not folder.name.startswith(_COMPANION_PREFIXES):
        return
    for _ in range(_REMOVE_ATTEMPTS):
        try:
            if folder.lstat().st_uid != os.geteuid():
                return
        except OSError:
            return
        shutil.rmtree(folder, ignore_errors=True)


def _write_whole(path: Path, text: str) -> None:
    """Readers see the old text or the new one, never half of it; mode 0600."""
    descriptor, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    os.replace(name, path)


def _append_line(path: Path, line: str) -> None:
    """O_APPEND makes one write of a short line atomic between processes."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, f"{line}\n".encode())
    finally:
        os.close(descriptor)


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
