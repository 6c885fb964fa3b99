"""JSONL files that survive a kill, one lock per run directory, seeds from names.

"A kill" is the death of the process at any instant, kill -9 included: what it handed to the kernel is still written, so
nothing here calls fsync. A power cut can cost the last lines; `repair_jsonl` then cuts off what is torn.
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

_held = {}  # lock file path -> open file: a lock must not vanish because nobody kept the file object


def read_jsonl(path, kind=None):
    """Rows of a JSON-lines file, as a list of dicts. Empty lines are skipped.

    kind: what a row is to be (colbench/run/fields.py). UserError, naming file and line: no such file, a line that is
    no JSON object, or none of that kind.
    """
    return [row for _, row in numbered_rows(path, kind)]


def numbered_rows(path, kind=None):
    """Like read_jsonl, but yields (line number from 1, row)."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):  # binary: splits at \n only, so U+2028 inside a text is no line end
                if line.strip():
                    yield number, checked(_parse(path, number, line), kind or {}, f"{path}:{number}")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory, not a .jsonl file") from None


def _parse(path, number, line):
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        cut_off = "" if line.endswith(b"\n") else " (cut off: was its writer interrupted? start that stage again)"
        raise UserError(f"{path}:{number}: not valid JSON{cut_off}; correct or delete this line") from None
    if not isinstance(row, dict):
        raise UserError(f"{path}:{number}: a JSON object is wanted, this is a {type(row).__name__}")
    return row


def repair_jsonl(path, kind=None):
    """Rows of a file that an interrupted run left behind; a torn last line is cut off the file. Missing file: [].

    A last object that only lacks its newline is whole (a torn one cannot parse): it is kept and gets the newline. A
    broken line before the last, or a row of another kind, raises UserError naming file and line, and the file stays as
    it is.
    """
    rows, end, line = _rows_so_far(path, kind)
    if end is not None:
        os.truncate(path, end)
    elif not line.endswith(b"\n"):
        with open(path, "ab") as file:
            file.write(b"\n")
    return rows


def read_so_far(path, kind=None):
    """Rows of a file that another process may be writing to: a torn last line is left alone. Missing file: []."""
    return _rows_so_far(path, kind)[0]


def _rows_so_far(path, kind):
    """(rows, where a torn last line begins or None, the last line)."""
    rows, broken, end, line = [], None, 0, b"\n"
    if not Path(path).exists():
        return rows, None, line
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = _parse(path, number, line) if line.strip() else None
            except UserError as error:
                if line.endswith(b"\n") or not line.lstrip().startswith(b"{"):
                    raise  # torn is the beginning of an object that lacks its end; this is somebody's file
                broken = error
                continue
            if row is not None:
                rows.append(checked(row, kind or {}, f"{path}:{number}"))
                end = file.tell()
    return rows, end if broken else None, line


def append_jsonl(file, row):
    """Append `row` as one whole line to an open text file, or to the file at a path, and hand it to the kernel."""
    if isinstance(file, (str, os.PathLike)):
        with open(file, "a", encoding="utf-8") as opened:
            return append_jsonl(opened, row)
    file.write(json.dumps(row) + "\n")  # ASCII: a lone surrogate from some server's JSON cannot break the write
    file.flush()


def rewrite_jsonl(path, rows, order, key):
    """Replace the file at `path` by `rows`, sorted (in place too) by where key(row) stands in the list `order`.

    So the file does not depend on which row was done first. Rows that `order` does not name come last.
    """
    place = {name: i for i, name in enumerate(order)}
    rows.sort(key=lambda row: place.get(key(row), len(place)))

    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as file:
            for row in rows:
                append_jsonl(file, row)
    write_aside(path, write)


def write_aside(path, write):
    """Make or replace the file or directory `path`: write(temporary Path), then a rename. A kill leaves it whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    _remove(temporary)  # left by a kill
    try:
        write(temporary)
    except BaseException:  # a full disk needs the room
        _remove(temporary)
        raise
    if path.is_dir():  # no rename replaces a directory that is not empty
        _exchange(temporary, path)
        _remove(temporary)
    else:
        os.replace(temporary, path)


def _remove(path):  # no error if it is not there
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _exchange(one, other):
    """Swap two paths in one step. Where the system cannot (macOS, some network disks) it takes two renames."""
    at_fdcwd, exchange = -100, 2
    try:
        done = ctypes.CDLL(None).renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), exchange) == 0
    except AttributeError:
        done = False
    if not done:
        old = other.with_name(f".{other.name}.old")
        _remove(old)
        other.rename(old)
        one.rename(other)
        _remove(old)


def lock_run(directory, name="run"):
    """Let one process at a time work on `directory` under `name`; a second one gets a UserError. Returns the lock file.

    The lock ends with the process, however it dies, or when the returned file is closed (`with lock_run(...):`).
    lockf and not flock: forked children do not hold it on after their parent.
    """
    path = Path(directory).resolve() / (".lock" if name == "run" else f".lock-{name}")
    if path in _held and not _held[path].closed:  # closing a second file object would drop the first one's lock
        return _held[path]
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        owner = file.read().strip()
        raise UserError(f"{directory}: process {owner} works here ({name}); wait, or choose another --run") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    _held[path] = file
    return file


def seed_of(*parts):
    """A seed in [0, 2**63) from JSON-able parts such as (task id, sample, turn); the same in every run, anywhere."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big") >> 1


def dialogue_hash(episode):
    """A number that says which dialogue an episode holds."""
    return seed_of([message.get("content") for message in episode["dialogue_history"]])
