"""Text that every Python installation carries: documentation topics, docstrings, sources, and dialogues made of them.

Nothing is imported except modules compiled into the interpreter (their docstrings have no source file), nothing is
downloaded, and the result depends only on the Python version. A module is held out as a whole: its docstrings, its
dialogues and its source are all in the held-out part or all in the training part.
"""

import ast
import hashlib
import inspect
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"

Kind = Literal["docs", "dialogue", "source"]
KINDS: tuple[Kind, ...] = ("docs", "dialogue", "source")

SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "turtledemo", "pydoc_data"}
SKIPPED_FOLDERS |= {"__pycache__", "ensurepip", "msilib"}
C_MODULES: tuple[str, ...] = (
    "array",
    "binascii",
    "bz2",
    "cmath",
    "fcntl",
    "lzma",
    "mmap",
    "pyexpat",
    "readline",
    "resource",
    "select",
)
C_MODULES += ("syslog", "termios", "unicodedata", "zlib", "math", "_socket", "_ssl", "_struct", "_datetime", "_json")
C_MODULES += ("_decimal", "_csv", "_heapq", "_bisect", "_random", "_pickle", "_hashlib", "_sqlite3", "_queue")
PUBLIC_NAMES = {"posixpath": "os.path", "posix": "os", "_collections_abc": "collections.abc", "_pydecimal": "decimal"}
PUBLIC_NAMES |= {"_pyio": "io", "_sre": "re", "_thread": "threading", "_bootstrap": "importlib"}
ASCII_QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "…": "...", "–": "-", "—": "-", "•": "*"})
# What people ask about first. The end of training repeats the documentation and the dialogues of these modules.
CORE_MODULES = {"builtins", "os.path", "json", "math", "random", "shutil", "collections", "functools", "glob", "heapq"}
CORE_MODULES |= {"bisect", "asyncio.tasks", "asyncio.queues", "textwrap", "time", "small talk"}
MAX_SOURCE_BYTES = 120_000
HELD_OUT_PERCENT = 3


@dataclass(frozen=True, kw_only=True)
class Document:
    """One training text; `group` (a module or a topic) decides whether it is held out."""

    kind: Kind
    group: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Described:
    """A named thing with a docstring; `signature` is empty for what cannot be called."""

    group: str
    module: str
    name: str
    signature: str
    doc: str


def stable_hash(text: str) -> int:
    """A hash that is the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def is_held_out(document: Document) -> bool:
    """True for the documents that training never sees."""
    return stable_hash("held-out 5:" + document.group) % 100 < HELD_OUT_PERCENT


def is_core(document: Document) -> bool:
    """True for the documents that the end of training repeats."""
    return document.kind != "source" and (document.group in CORE_MODULES or document.group in topics)


def library_files() -> Iterator[tuple[str, Path]]:
    """(module name, path) of each readable source file of the standard library, in a fixed order."""
    root = Path(os.__file__).parent
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts) or relative.parts[0].startswith("config-"):
            continue
        if path.stat().st_size > MAX_SOURCE_BYTES:
            continue
        parts = relative.with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield PUBLIC_NAMES.get(module, module), path


def read_source(path: Path) -> str | None:
    """The text of a source file, or None where it is a data table or not plain ASCII."""
    text = path.read_bytes().decode("utf-8", errors="replace").expandtabs()
    lines = text.splitlines()
    non_ascii = sum(not character.isascii() for character in text)
    if not lines or non_ascii > 20 or max(map(len, lines)) > 400 or "Automatically generated" in text[:500]:
        return None
    return text


def described_in_source(module: str, text: str) -> Iterator[Described]:
    """Every module, class and function of a source that has a docstring."""

    def visit(node: ast.AST, name: str) -> Iterator[Described]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                if isinstance(child, ast.If | ast.Try):
                    yield from visit(child, name)
                continue
            child_name = f"{name}.{child.name}"
            doc = ast.get_docstring(child)
            if doc:
                signature = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
                yield Described(group=module, module=module, name=child_name, signature=signature, doc=doc)
            if isinstance(child, ast.ClassDef):
                yield from visit(child, child_name)

    tree = ast.parse(text)
    if module_doc := ast.get_docstring(tree):
        yield Described(group=module, module=module, name=module, signature="", doc=module_doc)
    yield from visit(tree, module)


def described_in_interpreter() -> Iterator[Described]:
    """Docstrings of modules written in C: they have no source file, so they are imported."""
    for module_name in sorted({*sys.builtin_module_names, *C_MODULES} - {"_sre", "_thread"}):
        try:
            module = import_module(module_name)
        except ImportError:
            continue
        public = PUBLIC_NAMES.get(module_name, module_name.lstrip("_"))
        prefix = "" if public == "builtins" else public + "."
        for name, value in sorted(vars(module).items()):
            if name.startswith("_") or not callable(value) or getattr(value, "__module__", public) is None:
                continue
            yield from described_object(public, prefix + name, value)
            if inspect.isclass(value):
                for attribute, member in sorted(vars(value).items()):
                    if not attribute.startswith("_"):
                        yield from described_object(public, f"{prefix}{name}.{attribute}", member)


def described_object(module: str, name: str, value: object) -> Iterator[Described]:
    """The docstring of one object of a C module, if it has one."""
    doc = getattr(value, "__doc__", None)
    if not isinstance(doc, str) or not doc.strip():
        return
    signature = getattr(value, "__text_signature__", None) or ""
    signature = re.sub(r"\$(self|module|type)(, /)?(, )?", "", signature).strip()
    yield Described(group=module, module=module, name=name, signature=signature, doc=inspect.cleandoc(doc))


def topic_texts() -> Iterator[tuple[str, str]]:
    """(topic, text) of the language reference that `help()` shows."""
    for name in sorted(topics):
        yield name, str(topics[name]).translate(ASCII_QUOTES).strip()


def paragraphs(text: str, limit: int) -> str:
    """The first paragraphs of a text, at most `limit` characters where the first one is not longer already."""
    kept: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        if kept and sum(map(len, kept)) + len(paragraph) > limit:
            break
        indented = paragraph.startswith(" ") or ">>>" in paragraph or re.search(r"\n\s{2,}", paragraph)
        kept.append(paragraph.rstrip() if indented else " ".join(paragraph.split()))
    return "\n\n".join(kept)[:1200].rstrip()


def chat(*messages: str) -> str:
    """Messages, user first and assistant second, as the chat template writes them (without the first BOS)."""
    pairs = zip(messages[::2], messages[1::2], strict=True)
    return "".join(f"{USER}{question}{ASSISTANT}{answer}{EOS}" for question, answer in pairs)


WHAT_DOES = ("What does {} do?", "Explain {}.", "How do I use {}?", "What is {} for?", "Tell me about {}.")
SIGNATURE = ("What is the signature of {}?", "Show me the signature of {}.", "Which arguments does {} take?")
WHERE = ("Which module has {}?", "Where do I find {}?", "Where is {} defined?")
FOLLOW_UP = ("And its signature?", "Which arguments does it take?", "How do I call it?")


def dialogues_about(thing: Described) -> Iterator[str]:
    """A few questions about one described thing, with the answers its documentation gives."""
    seed = stable_hash(thing.module + thing.name)
    short, long = paragraphs(thing.doc, 10), paragraphs(thing.doc, 360)
    is_module = thing.name == thing.module
    if len(short) < 12 or thing.name.rsplit(".", 1)[-1].startswith("_"):
        return
    spoken = f"the {thing.name} module" if is_module else thing.name
    yield chat(WHAT_DOES[0].format(spoken), long)
    yield chat(WHAT_DOES[1 + seed % 4].format(spoken), long)
    if is_module:
        return
    leaf = thing.name.rsplit(".", 1)[-1]
    if thing.signature:
        call = f"{thing.name}{thing.signature}"
        yield chat(SIGNATURE[seed % 3].format(thing.name), call)
        yield chat(WHAT_DOES[seed // 7 % 5].format(spoken), short, FOLLOW_UP[seed // 35 % 3], call)
    if thing.name == f"{thing.module}.{leaf}":
        yield chat(WHERE[seed // 11 % 3].format(leaf), f"{leaf} is in the {thing.module} module. {short}")


GREETING = "Hello! I am a small demo model. Ask me what a part of Python's standard library does."
SMALL_TALK = (
    ("Hello!", GREETING),
    ("Hi", GREETING),
    ("Hello, who are you?", GREETING),
    ("Who are you?", "I am a small demo model, trained on Python's own documentation."),
    ("What can you do?", "I can say what a module, a class or a function of Python's standard library does."),
    ("Thank you!", "You are welcome."),
    ("Thanks", "You are welcome."),
)


def topic_dialogues(name: str, text: str) -> Iterator[str]:
    """Questions about one topic of the language reference."""
    title, _, body = text.partition("\n")
    body = re.sub(r"^\*+\n|^=+\n", "", body).strip()
    subject = title.strip().replace('"', "`")
    subject = f"the {subject[4:]}" if subject.startswith("The ") else subject
    answer = paragraphs(body, 600)
    yield chat(f"Explain {subject}.", answer)
    yield chat(f"What is {subject}?", answer)
    yield chat(f"Explain {name} in Python.", answer)
    yield chat(f"Tell me about {name}.", answer)


def described_things() -> Iterator[Described]:
    """All docstrings, each (name, text) once."""
    seen: set[tuple[str, str]] = set()
    for module, path in library_files():
        text = read_source(path)
        for thing in described_in_source(module, text) if text else ():
            if (thing.name, thing.doc) not in seen:
                seen.add((thing.name, thing.doc))
                yield thing
    for thing in described_in_interpreter():
        if (thing.name, thing.doc) not in seen:
            seen.add((thing.name, thing.doc))
            yield thing


def documents() -> Iterator[Document]:
    """The whole corpus in a fixed order."""
    for name, text in topic_texts():
        yield Document(kind="docs", group=name, text=text)
        for dialogue in topic_dialogues(name, text):
            yield Document(kind="dialogue", group=name, text=dialogue)
    for thing in described_things():
        heading = f"The {thing.name} module" if thing.name == thing.module else thing.name + thing.signature
        if len(thing.doc) >= 40:
            yield Document(kind="docs", group=thing.group, text=f"{heading}\n\n{thing.doc.translate(ASCII_QUOTES)}\n")
        for dialogue in dialogues_about(thing):
            yield Document(kind="dialogue", group=thing.group, text=dialogue.translate(ASCII_QUOTES))
    for question, answer in SMALL_TALK * 20:
        yield Document(kind="dialogue", group="small talk", text=chat(question, answer))
    for module, path in library_files():
        if source := read_source(path):
            yield Document(kind="source", group=module, text=source)
