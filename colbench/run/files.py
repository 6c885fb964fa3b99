"""JSONL files that survive a kill, locks on run directories, seeds from names.

"A kill" ends the process at any instant (kill -9). The kernel still writes what it was given, so
nothing here calls fsync. A power cut can lose the last lines; `repair_jsonl` removes a torn one.
"""
import ctypes
import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path

from colbench.run.errors import UserError
from colbench.run.fields import checked

_held = {}  # lock file path -> open file: garbage collection must not release a lock


def read_jsonl(path, kind=None):
    """Rows of a JSON-lines file, as a list of dicts. Empty lines are skipped.

    kind: what a row must be (colbench/run/fields.py). UserError with file and line: no such file,
    or a line that is not a JSON object of that kind.
    """
    return [row for _, row in numbered_rows(path, kind)]


def numbered_rows(path, kind=None):
    """Like read_jsonl, but yields (line number from 1, row)."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):  # binary: splits at \n only, not at U+2028
                if line.strip():
                    row = _parse(path, number, line)
                    yield number, checked(row, kind or {}, f"{path}:{number}")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory, not a .jsonl file") from None


def _parse(path, number, line):
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        cut_off = ""
        if not line.endswith(b"\n"):
            cut_off = " (cut off: if the stage that writes it was interrupted, run it again)"
        raise UserError(f"{path}:{number}: not valid JSON{cut_off}; "
                        "correct or delete this line") from None
    if not isinstance(row, dict):
        raise UserError(f"{path}:{number}: expected a JSON object, got a {type(row).__name__}")
    return row


def repair_jsonl(path, kind=None):
    """Rows of a file that an interrupted run left; removes a torn last line. Missing file: [].

    A last object that lacks only its newline is whole (a torn one cannot parse): it gets the
    newline. Other broken lines and rows of another kind raise UserError with file and line; the
    file stays unchanged.
    """
    rows, torn_at, last_line = _rows_so_far(path, kind)
    if torn_at is not None:
        os.truncate(path, torn_at)
    elif not last_line.endswith(b"\n"):
        with open(path, "ab") as file:
            file.write(b"\n")
    return rows


def read_so_far(path, kind=None):
    """Rows of a file that may still be written: ignores a torn last line. Missing file: []."""
    return _rows_so_far(path, kind)[0]


def _rows_so_far(path, kind):
    """(rows, offset of a torn last line or None, the last line)."""
    rows, broken, end, line = [], None, 0, b"\n"
    if not Path(path).exists():
        return rows, None, line
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = _parse(path, number, line) if line.strip() else None
            except UserError as error:
                if line.endswith(b"\n") or not line.lstrip().startswith(b"{"):
                    raise  # a kill leaves only the beginning of an object
                broken = error
                continue
            if row is not None:
                rows.append(checked(row, kind or {}, f"{path}:{number}"))
                end = file.tell()
    return rows, end if broken else None, line


def append_jsonl(file, row):
    """Append `row` as one line to an open text file, or to the file at a path, and flush."""
    if isinstance(file, (str, os.PathLike)):
        with open(file, "a", encoding="utf-8") as opened:
            return append_jsonl(opened, row)
    file.write(json.dumps(row) + "\n")  # ASCII: a server's lone surrogate cannot break the write
    file.flush()


def rewrite_jsonl(path, rows, order, key):
    """Replace the file at `path` by `rows`, sorted (in place too) by key(row)'s place in `order`.

    So the file does not depend on which row finished first. Rows not in `order` come last.
    """
    place = {name: i for i, name in enumerate(order)}
    rows.sort(key=lambda row: place.get(key(row), len(place)))

    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as file:
            for row in rows:
                append_jsonl(file, row)
    write_aside(path, write)


def write_aside(path, write):
    """Make or replace the file or directory `path`: write(temporary Path), then rename it.

    After a kill `path` is the old one or the new one, whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    _remove(temporary)  # left by a kill
    try:
        write(temporary)
    except BaseException:  # a full disk needs the space
        _remove(temporary)
        raise
    if path.is_dir():  # a rename cannot replace a directory that is not empty
        _exchange(temporary, path)
        _remove(temporary)
    else:
        os.replace(temporary, path)


def _remove(path):  # no error if it does not exist
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _exchange(one, other):
    """Swap two paths in one step; by two renames on systems that cannot (macOS, network disks)."""
    at_fdcwd, exchange = -100, 2
    names = at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other)
    try:
        swapped = ctypes.CDLL(None).renameat2(*names, exchange) == 0
    except AttributeError:
        swapped = False
    if not swapped:
        old = other.with_name(f".{other.name}.old")
        _remove(old)
        other.rename(old)
        one.rename(other)
        _remove(old)


def lock_run(directory, name="run"):
    """Lock `directory` under `name` for this process; UserError if another one holds it.

    Returns the lock file. The lock ends with the process, however it dies, or when the file is
    closed (`with lock_run(...):`). lockf, not flock: with flock, forked children would keep it.
    """
    path = Path(directory).resolve() / (".lock" if name == "run" else f".lock-{name}")
    if path in _held and not _held[path].closed:
        return _held[path]  # closing a second file object would drop this lock
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        owner = file.read().strip()
        raise UserError(f"{directory}: in use by process {owner} ({name}); "
                        "wait, or choose another --run") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    _held[path] = file
    return file


def seed_of(*parts):
    """A seed in [0, 2**63) from JSON-able parts such as (task id, sample, turn); reproducible."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def dialogue_hash(episode):
    """A hash of an episode's dialogue, as an integer."""
    return seed_of([message.get("content") for message in episode["dialogue_history"]])
