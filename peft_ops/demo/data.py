"""Labelled texts: docstrings of the installed standard library, or the user's own CSV and JSONL files.

The library is parsed, never imported. Its labels are facts of the source: the module a docstring stands in, whether it
documents a class or a function, whether the function returns a value.
"""

import ast
import csv
import io
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

MAX_HELD_OUT = 400  # texts per task: one standard error of an accuracy is then at most 2.5 points
FAMILIES = {
    "network": "ftplib http imaplib ipaddress poplib smtplib socket socketserver ssl urllib webbrowser wsgiref xmlrpc",
    "mail": "email mailbox mimetypes",
    "numbers": "_pydecimal bisect calendar colorsys datetime fractions heapq numbers random statistics zoneinfo",
    "parallel": "asyncio concurrent multiprocessing queue sched selectors signal subprocess threading",
    "files": "_pyio bz2 filecmp fileinput fnmatch genericpath glob gzip lzma ntpath os pathlib posixpath shutil stat"
    " tarfile tempfile zipapp zipfile",
    "code": "ast bdb code codeop dis doctest enum importlib inspect pdb pickletools pkgutil pyclbr pydoc symtable"
    " tokenize trace traceback tracemalloc types typing unittest",
}
OTHER_MODULES = (
    "_collections_abc _weakrefset abc argparse base64 cmd codecs collections configparser contextlib copy copyreg csv"
    " ctypes dbm difflib functools getpass gettext graphlib hashlib hmac html json locale logging netrc operator"
    " optparse pickle platform plistlib pprint pstats re reprlib secrets shelve shlex site string sysconfig textwrap"
    " timeit uuid venv warnings wave weakref xml"
)


class DemoError(Exception):
    """What a user can put right: the demo prints it in one line and exits with code 2."""


class Example(NamedTuple):
    text: str
    label: str
    line: int = 0
    split: str = ""


@dataclass
class Task:
    """One classification task; the numbers in `train` and `held_out` are (text, index of its label)."""

    name: str
    labels: list[str]
    train: list[tuple[str, int]]
    held_out: list[tuple[str, int]]

    @property
    def chance(self) -> float:
        """Accuracy of always giving the most frequent held-out label."""
        counts = [sum(label == i for _, label in self.held_out) for i in range(len(self.labels))]
        return max(counts) / len(self.held_out)


def load_tasks(folder: str | None, shots: int, seed: int) -> list[Task]:
    """Tasks with fixed splits: the same for the same source, shots and seed."""
    if folder is None:
        return [
            split(name, "the standard library", examples, shots, seed)
            for name, examples in docstring_examples().items()
        ]
    root = Path(folder)
    if not root.is_dir():
        raise DemoError(f"{folder}: not a folder; --data takes a folder with one .csv or .jsonl file per task")
    files = sorted(path for path in root.iterdir() if path.suffix in (".csv", ".jsonl"))
    if not files:
        raise DemoError(f"{folder}: holds no .csv or .jsonl file; each task is one file with text and label")
    names: dict[str, Path] = {}
    for path in files:
        name = re.sub(r"\W+", "_", path.stem)  # it becomes a module's name and a folder's
        if name in names:
            raise DemoError(f"{path}: gives task {name!r}, as {names[name]} does; rename one")
        names[name] = path
    return [split(name, str(path), read_file(path), shots, seed) for name, path in names.items()]


def split(name: str, source: str, examples: list[Example], shots: int, seed: int) -> Task:
    """At most `shots` training texts per label, and as many held-out texts of every label as there are."""
    by_label: dict[str, list[Example]] = {}
    for example in examples:
        by_label.setdefault(example.label, []).append(example)
    labels = sorted(by_label)
    if len(labels) < 2:
        raise DemoError(f"{source}:{examples[-1].line}: a task needs two labels or more, got only {labels[0]!r}")
    rng = random.Random(f"{seed} {name}")  # of its own: one task's data do not shuffle another's
    train, held_out = [], []
    for index, label in enumerate(labels):
        learn, test = split_label(source, by_label[label], shots, MAX_HELD_OUT // len(labels), rng)
        train += [(example.text, index) for example in learn]
        held_out += [(example.text, index) for example in test]
    if not held_out:
        raise DemoError(f"{source}:{examples[-1].line}: no row is held out; mark some with split 'test'")
    rng.shuffle(train)
    return Task(name, labels, train, held_out)


def split_label(
    source: str, rows: list[Example], shots: int, held_out: int, rng: random.Random
) -> tuple[list[Example], list[Example]]:
    label = rows[0].label
    if any(row.split for row in rows):
        learn, test = ([row for row in rows if (row.split == "test") == wanted] for wanted in (False, True))
        if not learn:
            raise DemoError(f"{source}:{test[0].line}: label {label!r} is held out but never seen in training")
    else:
        if len(rows) < 2:
            raise DemoError(
                f"{source}:{rows[0].line}: label {label!r} has one row: held out, it is never seen in training"
            )
        rng.shuffle(rows)
        cut = min(shots, (len(rows) + 1) // 2)
        learn, test = rows[:cut], rows[cut:]
    return learn[:shots], test[:held_out]


def read_file(path: Path) -> list[Example]:
    """The rows of a CSV (with a header) or JSONL file: text, label, and optionally split, 'train' or 'test'."""
    try:
        data = path.read_bytes()
        content = data.decode("utf-8-sig")
    except OSError as error:
        raise DemoError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DemoError(f"{path}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x})") from None
    if not content.strip():
        raise DemoError(f"{path}:1: the file is empty")
    examples = []
    for line, record in (csv_records if path.suffix == ".csv" else jsonl_records)(path, content):
        text, label, part = (
            str(record[key]).strip() if record.get(key) is not None else "" for key in ("text", "label", "split")
        )
        for key, value in (("text", text), ("label", label)):
            if not value:
                raise DemoError(f"{path}:{line}: {key} is missing or empty")
        if part not in ("", "train", "test"):
            raise DemoError(f"{path}:{line}: split must be 'train' or 'test', got {part!r}")
        examples.append(Example(text, label, line, part))
    if not examples:
        raise DemoError(f"{path}:1: the file has a header but no rows")
    return examples


def csv_records(path: Path, content: str) -> Iterator[tuple[int, dict]]:
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    start = 1
    try:
        header = [name.strip() for name in next(reader)]
        for key in ("text", "label"):
            if key not in header:
                raise DemoError(f"{path}:1: the header must name the columns text and label, got {', '.join(header)}")
        start = reader.line_num + 1
        for cells in reader:
            if cells:
                if len(cells) != len(header):
                    counts = f"{len(cells)} cells where the header has {len(header)}"
                    raise DemoError(f"{path}:{start}: {counts}; quote texts with commas")
                yield start, dict(zip(header, cells, strict=True))
            start = reader.line_num + 1
    except csv.Error as error:
        raise DemoError(f"{path}:{start}: not readable as CSV: {error}") from None


def jsonl_records(path: Path, content: str) -> Iterator[tuple[int, dict]]:
    for line, text in enumerate(content.split("\n"), 1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise DemoError(f"{path}:{line}: not readable as JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(record, dict):
            raise DemoError(f"{path}:{line}: a row must be an object with text and label, got {type(record).__name__}")
        yield line, record


class Docstring(NamedTuple):
    text: str
    family: str | None
    node: ast.AST


def docstring_examples() -> dict[str, list[Example]]:
    """Three tasks over first paragraphs of docstrings; words that would give a label away are masked."""
    docs = list(stdlib_docstrings())
    modules = sorted((module for names in FAMILIES.values() for module in names.split()), key=len, reverse=True)
    module_names = re.compile(rf"\b({'|'.join(modules)})\b", re.IGNORECASE)
    kinds = re.compile(r"\b(class|function|method|coroutine)(e?s)?\b", re.IGNORECASE)
    return {
        "family": [Example(module_names.sub("it", doc.text), doc.family) for doc in docs if doc.family],
        "kind": [
            Example(kinds.sub("it", doc.text), "class" if isinstance(doc.node, ast.ClassDef) else "function")
            for doc in docs
        ],
        "returns": [
            Example(doc.text, "a value" if returns_value(doc.node) else "nothing")
            for doc in docs
            if not isinstance(doc.node, ast.ClassDef) and not is_generator(doc.node)
        ],
    }


def stdlib_docstrings() -> Iterator[Docstring]:
    """Classes and functions of the chosen modules, each distinct text once."""
    root = Path(sysconfig.get_path("stdlib"))
    seen = set()
    for family, modules in [*FAMILIES.items(), (None, OTHER_MODULES)]:
        for path in source_files(root, modules.split()):
            for node in definitions(ast.parse(path.read_bytes())):
                text = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
                if len(text) >= 20 and text.lower() not in seen:
                    seen.add(text.lower())
                    yield Docstring(text, family, node)
    if not seen:
        raise DemoError(f"{root}: holds no sources of the standard library; give your own texts with --data")


def source_files(root: Path, modules: list[str]) -> Iterator[Path]:
    """Files of modules and packages; a module that this Python version lacks is left out."""
    for module in modules:
        single = root / f"{module}.py"
        yield from [single] if single.is_file() else sorted((root / module).rglob("*.py"))


def definitions(node: ast.AST) -> Iterator[ast.AST]:
    """Classes and functions at any depth; expressions hold none and are the larger part of a tree."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
        if isinstance(child, ast.stmt):
            yield from definitions(child)


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """What belongs to a function itself, not to one inside it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from own_nodes(child)


def returns_value(node: ast.AST) -> bool:
    values = [n.value for n in own_nodes(node) if isinstance(n, ast.Return) and n.value is not None]
    return any(not (isinstance(value, ast.Constant) and value.value is None) for value in values)


def is_generator(node: ast.AST) -> bool:
    return any(isinstance(n, (ast.Yield, ast.YieldFrom)) for n in own_nodes(node))
