"""Run model-written code in jailed processes and return plain data.

Needs Python >= 3.10; Linux on x86_64 or aarch64 for full strength.

    parent (the scorer) --socket--> zygote (warm, jailed, knows no task)
                                      --fork--> child (sealed; one text and its calls)

The parent executes nothing and unpickles nothing: it sends text over a socket made for one child
and reads results as tagged JSON, which `decode` rebuilds from exact built-in types. The zygote
never sees the text. A child runs either the hidden code or an answer, so no child that runs an
answer holds the hidden code, an expected value or another answer. Whatever a child writes can only
count as return values of its own calls.

Covered, by layers that are in place before the child reads the text and that `self_test` tries at
every start:
  files       Landlock: reading only below the standard library, site-packages, shared libraries
              and zone data; seccomp refuses opening to write, deleting, renaming, chmod. Without
              Landlock: no opening after the imports.
  network     seccomp refuses every socket except an anonymous pair; Landlock also refuses TCP.
  processes   seccomp is an allowlist: no fork, exec, ptrace, kill, fcntl owner, prctl, io_uring,
              bpf, namespaces.
  privileges  as root every capability is dropped; no_new_privs always.
  resources   1 GB of address space, 64 descriptors, 64 threads (4096 if not root: the limit counts
              the whole user), no core file, 1 MB per result; wall time per call and answer, kept by
              the parent; CPU time as a second limit.
  orphans     a zygote without a parent exits within a second, and its child with it (PDEATHSIG).
Not covered: holes in the kernel; names, sizes and times of files (stat is allowed); the contents of
site-packages; side channels such as time and load. Calls of one answer share a process (each has a
fresh module), so an answer can spoil its own later calls. A result of up to 1 MB, made to collide
in a hash table, can cost the parent seconds if the expected value is as large. Windows is refused;
macOS has the resource limits only, which is the tier "weak".
"""
import __future__

import ast
import builtins
import ctypes
import datetime
import gc
import importlib
import json
import math
import multiprocessing
import os
import pathlib
import platform
import queue
import random
import re
import signal
import socket
import struct
import subprocess
import symtable
import sys
import sysconfig
import tempfile
import textwrap
import time
import types
import uuid
from collections import ChainMap, Counter, OrderedDict, UserDict, UserList, UserString, deque
from decimal import Decimal
from fractions import Fraction

MARKER = "I WANT TO ANSWER:"
MAX_RESULT = 1 << 20   # bytes of JSON that one call may return
MAX_VALUES = 100_000   # values inside one result
MAX_DEPTH = 900        # nesting of one result; == recurses as deep, and Python stops at 1000
PREPARE_S = 10.0       # seconds for parsing and for the text's imports; not charged to a call
SLOW_S = 0.25          # seconds for all official calls, after which the fixed ones go first
START_S = 60.0         # seconds for a zygote to come up
PRELOAD = """_strptime abc base64 bisect calendar cmath collections.abc copy csv dataclasses enum
    functools hashlib heapq inspect io itertools locale math numbers operator statistics string
    threading traceback typing unicodedata uuid zoneinfo concurrent.futures.thread numpy
    numpy.random"""

# ---- results as plain data ---------------------------------------------------------------------
# (tag, type, value -> parts or one text, parts or text -> value). The methods are the base classes'
# own, so that no subclass has a say.
KINDS = [
    ("int", int, lambda v: int.__format__(v, "x"), lambda p: int(p, 16)),
    ("float", float, float.hex, float.fromhex),
    ("str", (str, UserString),
     lambda v: str.encode(v if isinstance(v, str) else v.data, "utf-8", "surrogatepass").hex(),
     lambda p: bytes.fromhex(p).decode("utf-8", "surrogatepass")),
    ("list", list, list.__iter__, list),
    ("list", UserList, iter, list),
    ("tuple", tuple, tuple.__iter__, tuple),
    ("Counter", Counter, lambda v: _flat(dict.items(v)), lambda p: _counter(_dict(p))),
    ("OrderedDict", OrderedDict, lambda v: _flat(OrderedDict.items(v)),
     lambda p: OrderedDict(_dict(p))),
    ("dict", dict, lambda v: _flat(dict.items(v)), lambda p: _dict(p)),
    ("dict", (UserDict, ChainMap), lambda v: _flat(v.items()), lambda p: _dict(p)),
    ("keys", type({}.keys()), iter, lambda p: dict.fromkeys(p).keys()),
    ("items", type({}.items()), lambda v: _flat(v), lambda p: _dict(p).items()),
    ("set", set, set.__iter__, set),
    ("frozenset", frozenset, frozenset.__iter__, frozenset),
    ("deque", deque, deque.__iter__, lambda p: Deque(p)),
    ("bytes", (bytes, bytearray, memoryview), lambda v: _bytes(memoryview(v)).hex(), bytes.fromhex),
    ("range", range, lambda v: (v.start, v.stop, v.step), lambda p: range(*p)),
    ("slice", slice, lambda v: (v.start, v.stop, v.step), lambda p: slice(*p)),
    ("complex", complex, lambda v: (v.real, v.imag), lambda p: complex(*p)),
    ("Decimal", Decimal, Decimal.__str__, Decimal),
    ("Fraction", Fraction, lambda v: (v.numerator, v.denominator),
     lambda p: Fraction(*map(int.__index__, p))),  # never a text: "1e999999999" would expand
    ("timedelta", datetime.timedelta, lambda v: (v.days, v.seconds, v.microseconds),
     lambda p: datetime.timedelta(*p)),
    ("datetime", datetime.datetime,
     lambda v: (v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond, v.utcoffset()),
     lambda p: datetime.datetime(*p[:7], _zone(p[7]))),
    ("date", datetime.date, lambda v: (v.year, v.month, v.day), lambda p: datetime.date(*p)),
    ("time", datetime.time, lambda v: (v.hour, v.minute, v.second, v.microsecond, v.utcoffset()),
     lambda p: datetime.time(*p[:4], _zone(p[4]))),
    ("timezone", datetime.timezone, lambda v: [v.utcoffset(None)],
     lambda p: datetime.timezone(*p)),
    ("UUID", uuid.UUID, lambda v: [v.int], lambda p: uuid.UUID(int=p[0])),
    ("path", pathlib.PurePosixPath, str, pathlib.PurePosixPath),
    ("namespace", types.SimpleNamespace, lambda v: [vars(v)],
     lambda p: types.SimpleNamespace(**p[0])),
    ("type", type,  # only built-in ones: int, str, ...
     lambda v: v.__name__ if vars(builtins).get(v.__name__) is v else 1 / 0,
     lambda p: vars(builtins)[p]),
    ("...", type(...), lambda v: "", lambda p: ...),
]
BUILD = {tag: build for tag, _, _, build in KINDS}


class Deque(deque):
    """A deque that compares as a list: deque's own == takes exponential time when nested."""

    def __eq__(self, other):
        if not isinstance(other, deque):
            return NotImplemented
        pairs = [(self, other)]
        for ours, theirs in pairs:  # a loop: recursion would not reach MAX_DEPTH
            if len(ours) != len(theirs):
                return False
            for a, b in zip(ours, theirs):
                if isinstance(a, deque) and isinstance(b, deque):
                    pairs.append((a, b))
                elif not a == b:
                    return False
        return True


def _bytes(view):
    if (view.format, view.ndim) != ("B", 1):
        raise ValueError("not bytes")
    return view.tobytes()  # also right for a view with steps


def _zone(offset):
    return None if offset is None else datetime.timezone(offset)


def _flat(items):
    return [part for item in items for part in item]


def _dict(parts):
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _counter(counts):
    """Return a Counter, or the dict itself unless all counts are numbers.

    Comparing nested Counters would take time exponential in their depth.
    """
    for count in counts.values():
        # `decode`'s `array` makes numpy's numbers: classes with a method is_number
        if not (isinstance(count, (int, float, Decimal, Fraction))
                or getattr(type(count), "is_number", lambda _: False)(count)):
            return counts
    counter = Counter()
    dict.update(counter, counts)
    return counter


def encode(value):
    """Return `value` as JSON data without nesting.

    None, bool, short int and ASCII str stay as they are. Anything else is a list in which [tag, n]
    makes one value of the n values before it, and [tag, text] makes one of a text.
    Any exception means that it is not plain data, or too much of it.
    """
    numpy = sys.modules.get("numpy")
    program, levels, values_left = [], [[value]], MAX_VALUES
    while levels:
        if not levels[-1]:
            levels.pop()
            continue
        value = levels[-1].pop()  # last part first: the program is reversed at the end
        if value is None or value is True or value is False \
                or type(value) is int and -2**53 < value < 2**53 \
                or type(value) is str and value.isascii():
            program.append(value)
            continue
        if isinstance(value, types.MappingProxyType):
            value = value.copy()  # the type inside: Counter and OrderedDict have their own ==
        values_left -= 1
        if values_left < 0 or len(levels) > MAX_DEPTH + 1:
            raise ValueError("too large")
        if numpy and isinstance(value, (numpy.ndarray, numpy.generic)):
            flat = numpy.asarray(value).ravel()  # a scalar is an array without dimensions
            tag, parts = "array", (value.shape, flat.tolist(), flat.dtype.name)
        else:
            tag, parts = next((tag, take(value)) for tag, kind, take, _ in KINDS
                              if isinstance(value, kind))
        if type(parts) is str:
            program.append([tag, parts])
            continue
        levels.append(list(parts))
        program.append([tag, len(levels[-1])])
        if 3 * len(levels[-1]) > MAX_RESULT:
            raise ValueError("too large")
    return program[::-1] if type(program[0]) is list else program[0]


def decode(data, array):
    """Return the value that `encode` turned into data.

    array(shape, flat values, dtype name): builds the stand-in for a numpy array.
    The data may be forged: any exception means that it is not a result.
    """
    values = []
    nested = []  # (position in `values`, depth) of the values made of others
    for item in data if type(data) is list else [data]:
        if type(item) is list:
            tag, part = item
            if type(part) is str:
                item = BUILD[tag](part)
            else:
                start, depth = len(values) - part, 0
                if not 0 <= start <= len(values):
                    raise ValueError("malformed data")
                while nested and nested[-1][0] >= start:
                    depth = max(depth, nested.pop()[1] + 1)
                if depth > MAX_DEPTH:  # checked before hashing, where Python has no depth limit
                    raise ValueError("too deep")
                nested.append((start, depth))
                parts = values[start:]
                del values[start:]
                item = array(*parts) if tag == "array" else BUILD[tag](parts)
        elif type(item) is dict:
            raise ValueError("malformed data")
        values.append(item)
    value, = values
    return value


# ---- finding the code in an answer (runs in the child) -----------------------------------------
FENCE_TO_OWN_LINE = re.compile(
    r"(?P<fence>```+|~~~+)[^\n`]*\n(?P<code>.*?)(?:^[ \t]*(?P=fence)|\Z)", re.S | re.M)
FENCE_TO_ANYWHERE = re.compile(
    r"(?P<fence>```+|~~~+)(?:[\w ]*\n|py\w*[ \t])?(?P<code>.*?)(?:(?P=fence)|\Z)", re.S | re.I)
CODE_START = re.compile(r"@|(def|class|async|from|import)\b|[^\W\d]\w* *=(?!=)")
CODE_BEHIND_WORDS = re.compile(
    r"^[^\W\d][^\n=#\"]*?[\s:](?=(async +)?def +\w+ *\(|class +\w+ *[(:])", re.M)
DEFINITIONS = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef


def without_prose(text):
    """Yield unfenced code between prose: from a line that starts like code to the next non-code."""
    lines, end = text.split("\n"), 0
    for start in [i for i, line in enumerate(lines) if CODE_START.match(line)]:
        part = lines[start:] if start >= end else []  # not inside a part that was yielded
        while part:
            try:
                ast.parse("\n".join(part))
                yield "\n".join(part)
                end = start + len(part)
                break
            except SyntaxError as error:
                cut = min(error.lineno or 1, len(part)) - 1
                if part[cut][:1] in ("", " ", "\t"):  # broken inside a block: bad code, not prose
                    break
                part = part[:cut]


def is_stub(node):
    """Return whether a definition has no body, or one of a docstring, `...`, pass, a return of None
    or NotImplementedError.

    A class inherits a body from its bases, and a decorator may add one (dataclass), except overload
    and abstractmethod.
    """
    def empty(statement):
        value = getattr(statement, "value", None)
        if isinstance(statement, ast.Raise):
            error = getattr(statement.exc, "func", statement.exc)
            return isinstance(error, ast.Name) and error.id == "NotImplementedError"
        if isinstance(statement, ast.Return):
            return value is None or isinstance(value, ast.Constant) and value.value in (None, ...)
        return isinstance(statement, ast.Pass) \
            or isinstance(statement, ast.Expr) and isinstance(value, ast.Constant) \
            or is_stub(statement)
    if not isinstance(node, DEFINITIONS) or getattr(node, "bases", []):
        return False
    marks = [getattr(mark, "attr", getattr(mark, "id", "")) for mark in node.decorator_list]
    adds_no_body = not marks or "overload" in marks or "abstractmethod" in marks
    return adds_no_body and all(map(empty, node.body))


def names_bound(statement):
    """Return the names that a module-level statement binds. Stubs and imports bind none."""
    names, nodes = set(), [statement]
    while nodes:
        node = nodes.pop()
        if isinstance(node, DEFINITIONS):
            names |= set() if is_stub(node) else {node.name}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif not isinstance(node, ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return names


def code_of(answer, name):
    """Return the Python in an answer as one list of statements, for one namespace.

    Takes the whole text if it is code that binds `name`; else the fenced pieces that parse (a later
    definition wins); else code between prose. A stub does not replace a definition. If nothing
    binds `name`, takes whatever parses first. Returns an empty list if there is no code.
    """
    text = answer.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(re.escape(MARKER) + r"[ \t]*", "\n", text)
    ways = (
        lambda: [text],
        lambda: [match["code"] for match in FENCE_TO_OWN_LINE.finditer(text)],
        lambda: [match["code"] for match in FENCE_TO_ANYWHERE.finditer(text)],
        lambda: without_prose(text),
        lambda: without_prose(CODE_BEHIND_WORDS.sub(r"\g<0>\n", text)),
        lambda: ["\n".join(line for line in text.split("\n") if line[:1] in ("", " ", "\t"))])
    fallback = []
    for pieces in ways:
        statements, bound = [], set()
        for piece in map(textwrap.dedent, pieces()):
            try:
                tree = ast.parse(piece)
            except (SyntaxError, ValueError, MemoryError, RecursionError):
                continue  # not Python, has a null byte, or nested too deeply
            for statement in tree.body:
                if not (is_stub(statement) and statement.name in bound):
                    statements.append(statement)
                    bound |= names_bound(statement)
        if name in bound:
            return statements
        fallback = fallback or statements
    return fallback


def called_name(call):
    """Return the name that a call expression tests: the outermost one that is not a builtin.

    For example "f" in "round(f(2), 1)".
    """
    tree = ast.parse(call.strip(), mode="eval")
    names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return next((name for name in names if not hasattr(builtins, name)), names[0] if names else "")


# ---- the jail (entered by the zygote and by its children) ---------------------------------------
# name, number on x86_64, number on aarch64 ("-": does not exist)
SYSCALLS = """read 0 63 write 1 64 open 2 - close 3 57 stat 4 - fstat 5 80 lstat 6 - poll 7 -
    lseek 8 62 mmap 9 222 mprotect 10 226 munmap 11 215 brk 12 214 rt_sigaction 13 134
    rt_sigprocmask 14 135 rt_sigreturn 15 139 ioctl 16 29 pread64 17 67 readv 19 65 writev 20 66
    access 21 - pipe 22 - select 23 - sched_yield 24 124 mremap 25 216 madvise 28 233 dup 32 23
    dup2 33 - nanosleep 35 101 getitimer 36 102 alarm 37 - setitimer 38 103 getpid 39 172
    sendto 44 206 recvfrom 45 207 socketpair 53 199 clone 56 220 exit 60 93 uname 63 160 fcntl 72 25
    getcwd 79 17 readlink 89 - gettimeofday 96 169 getrlimit 97 163 getrusage 98 165 sysinfo 99 179
    times 100 153 getuid 102 174 getgid 104 176 geteuid 107 175 getegid 108 177 getppid 110 173
    sigaltstack 131 132 gettid 186 178 time 201 - futex 202 98 sched_getaffinity 204 123
    getdents64 217 61 restart_syscall 219 128 clock_gettime 228 113 clock_getres 229 114
    clock_nanosleep 230 115 exit_group 231 94 epoll_wait 232 - epoll_ctl 233 21 openat 257 56
    newfstatat 262 79 readlinkat 267 78 faccessat 269 48 pselect6 270 72 ppoll 271 73
    set_robust_list 273 99 epoll_pwait 281 22 eventfd2 290 19 epoll_create1 291 20 dup3 292 24
    pipe2 293 59 prlimit64 302 261 getcpu 309 168 getrandom 318 278 membarrier 324 283 statx 332 291
    rseq 334 293 faccessat2 439 439 epoll_pwait2 441 441 seccomp 317 277""".split()
ALL = 0xFFFFFFFF
ARG = [16 + 8 * i for i in range(6)]  # offset of argument i in struct seccomp_data, low word first
# syscall: conditions that must all hold, each (offset of a word, mask, values allowed once masked)
RULES = {
    "clone": [(ARG[0], 0x10000, [0x10000])],                     # CLONE_THREAD: no processes
    "open": [(ARG[1], 0o1103, [0])],                             # no O_WRONLY, O_RDWR, O_CREAT
    "openat": [(ARG[2], 0o1103, [0])],                           # or O_TRUNC
    "fcntl": [(ARG[1], ALL, [0, 1, 2, 3, 4, 1030])],             # dup and flags; no F_SETOWN
    # isatty, FIONREAD, FIONBIO, close-on-exec
    "ioctl": [(ARG[1], ALL, [0x5401, 0x541B, 0x5421, 0x5450, 0x5451])],
    "prlimit64": [(ARG[2], ALL, [0]), (ARG[2] + 4, ALL, [0])],   # read limits, set none
    "sendto": [(ARG[4], ALL, [0]), (ARG[4] + 4, ALL, [0])],      # no address: only within a pair
    "socketpair": [(ARG[0], ALL, [1])],                          # AF_UNIX
    "seccomp": [(ARG[0], ALL, [1]), (ARG[1], ALL, [1])],         # one more filter: only restricts
}
# machine: (column of SYSCALLS, audit architecture, number of seccomp, number of capset)
CALLS = {"x86_64": (0, 0xC000003E, 317, 126), "aarch64": (1, 0xC00000B7, 277, 91)}
MACHINE = platform.machine() if sys.platform == "linux" and platform.machine() in CALLS else None
LIBC = ctypes.CDLL(None, use_errno=True)


def syscall(*args):
    return LIBC.syscall(*[ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args])


def seccomp_program(no_open):
    """Return the allowlist as BPF instructions (bytes).

    With `no_open`: a filter that refuses opening files and allows everything else.
    """
    column, arch, _, _ = CALLS[MACHINE]
    load, equal, mask_with, give = 0x20, 0x15, 0x54, 0x06
    results = 0x7FFF0000, 0x80000000, 0x50001, 0x50026
    allow, kill, eperm, enosys = [(give, 0, 0, result) for result in results]
    code = [(load, 0, 0, 4), (equal, 1, 0, arch), kill, (load, 0, 0, 0)]
    for name, number in zip(SYSCALLS[::3], SYSCALLS[1 + column::3]):
        if number == "-":
            continue
        body = []
        if no_open:
            body = [eperm] if name in ("open", "openat") else []
        else:
            for word, mask, values in RULES.get(name, []):
                body += [(load, 0, 0, word), (mask_with, 0, 0, mask)]
                body += [(equal, len(values) - i, 0, value) for i, value in enumerate(values)]
                body.append(eperm)
            body.append(allow)
        code += [(equal, 0, len(body), int(number)), *body]
    # without clone3 (435) libc falls back to clone
    code += [allow] if no_open else [(equal, 0, 1, 435), enosys, eperm]
    return b"".join(struct.pack("HBBI", *line) for line in code)


def seccomp(program):
    """Install a filter in this process; return whether it worked."""
    memory = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("@HP", len(program) // 8, ctypes.addressof(memory))
    # SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC
    return syscall(CALLS[MACHINE][2], 1, 1, head) == 0


def landlock(abi, files, net, scope, paths=()):
    """Drop rights of this process for good: bits for files, TCP and signals.

    Reading stays allowed below `paths`.
    """
    handled = struct.pack("QQQ", files, net, scope)[:8 if abi < 4 else 16 if abi < 6 else 24]
    rules = syscall(444, handled, len(handled), 0)
    for path in filter(os.path.exists, paths):
        fd = os.open(path, os.O_RDONLY)
        right = 0b1100 if os.path.isdir(path) else 0b0100  # READ_DIR and READ_FILE
        syscall(445, rules, 1, struct.pack("=Qi", right, fd), 0)
        os.close(fd)
    if syscall(446, rules, 0) != 0:
        raise OSError("Landlock exists but does not work")
    os.close(rules)


def jail_zygote(site_paths):
    """Apply the layers that a zygote can have before it forks.

    Returns the Landlock version, 0 without Landlock.
    """
    import resource  # not on Windows, where this file must still import
    if MACHINE:
        # PR_SET_DUMPABLE: other processes of this user cannot read its memory
        LIBC.prctl(4, 0, 0, 0, 0)
        threads = 4096
        if os.geteuid() == 0:
            try:
                # its own real uid: RLIMIT_NPROC does not apply to root's
                os.setresuid(1 << 30 | os.getpid(), -1, -1)
                threads = 64
            except OSError:
                pass  # a user namespace without that uid: only the address space limits threads
            no_capabilities = struct.pack("6I", *[0] * 6)
            syscall(CALLS[MACHINE][3], struct.pack("Ii", 0x20080522, 0), no_capabilities)
        LIBC.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        resource.setrlimit(resource.RLIMIT_NPROC, (threads, threads))
    for name, limit in ("AS", 1 << 30), ("FSIZE", 0), ("NOFILE", 64), ("CORE", 0), ("MEMLOCK", 0):
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
        except (OSError, ValueError):
            pass  # macOS refuses some; self_test judges what is left
    abi = 0
    if MACHINE:
        abi = max(syscall(444, None, 0, 1), 0)  # landlock_create_ruleset, asked for its version
    if abi:
        # every file right that this version knows
        rights = (1 << (13, 14, 15, 15, 16)[min(abi, 5) - 1]) - 1
        paths = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo",
                 "/etc/localtime", "/etc/ld.so.cache", f"{sys.base_prefix}/lib",
                 *map(sysconfig.get_path, ("stdlib", "platstdlib"))]
        landlock(abi, rights, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0, paths + site_paths)
    return abi


def jail_child(zygote, abi, program):
    """Apply the layers that must wait for the fork; return the names of layers in place.

    Descriptor 3 is the child's socket, 0 to 2 are /dev/null.
    """
    import resource
    os.closerange(4, 64)
    os.environ.clear()
    resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
    if not MACHINE:
        return []
    LIBC.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL
    if os.getppid() != zygote:
        os._exit(1)
    if abi >= 6:
        landlock(abi, 0, 0, 3)  # its own domain: no signals even to the zygote
    return ["landlock"] * (abi > 0) + ["seccomp"] * seccomp(program)


# ---- the child ----------------------------------------------------------------------------------
def import_named(statements):
    """Import what the code will import, before its time counts and files are closed to it."""
    for node in ast.walk(ast.Module(statements, [])):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            try:
                importlib.import_module(name)
            except BaseException:  # missing, no module, or it exits: the code will see the same
                pass


def seed_random(seed):
    random.seed(seed)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed(seed)


def fixed_mode(text, calls):
    """Return a function from a call to its value.

    Each call runs in a fresh module with the same random numbers. A statement that raises (a stray
    word, an example, input(), SystemExit) or does not compile (return in a module) is skipped: only
    the call's result counts.
    """
    statements, codes = code_of(text, called_name(calls[0])), []
    features = [alias.name for node in statements
                if isinstance(node, ast.ImportFrom) and node.module == "__future__"
                for alias in node.names]
    flags = sum({getattr(__future__, name).compiler_flag for name in features
                 if name in __future__.all_feature_names})
    for statement in statements:
        module = ast.Module([statement], [])
        try:
            codes.append(compile(module, "<answer>", "exec", flags, dont_inherit=True))
        except Exception:
            pass
    import_named(statements)

    def run(call):
        module = sys.modules["answer"] = types.ModuleType("answer")
        seed_random(0)
        for code in codes:
            try:
                exec(code, module.__dict__)
            except BaseException:  # see above
                pass
        return eval(call.strip(), module.__dict__)

    return run


def official_mode(text, alarm):
    """Return a function from a call to its value, computed as the released evaluator does.

    There exec and eval are in a function: module-level names become its locals, while the code's
    own functions look in the evaluator's globals. After `alarm` seconds SIGALRM raises TimeoutError
    inside the code, which may catch it. SystemExit ends the whole evaluation there and fails one
    call here.
    """
    tree = ast.parse(text)
    code = compile(tree, "<string>", "exec", dont_inherit=True)
    import_named(tree.body)
    name = "sweet_rl.utils.code_utils"
    module = sys.modules[name] = types.ModuleType(name)
    module.multiprocessing = multiprocessing  # what that module imports
    module.signal = signal
    module.Empty = queue.Empty

    def late(*_):
        raise TimeoutError

    def run(call):
        names = {"function_definition": text, "test_case": call}
        seed_random(None)
        signal.signal(signal.SIGALRM, late)
        try:
            signal.alarm(alarm)
            exec(code, module.__dict__, names)
            return eval(call, module.__dict__, names)
        finally:
            signal.alarm(0)

    return run


# What code may use if the official mode is to take over the fixed mode's outcomes: nothing here
# shows which of the two is running.
PLAIN_MODULES = {module: names.split() for module, names in {  # "": every public name
    "math": "", "itertools": "", "heapq": "", "bisect": "",
    "datetime": "date datetime time timedelta timezone",
    "time": "time sleep perf_counter monotonic strftime strptime gmtime localtime mktime",
    "re": """compile match fullmatch search sub subn split findall finditer escape I IGNORECASE M
        MULTILINE S DOTALL X""",
    "functools": "reduce partial cmp_to_key",
    "collections": "deque Counter defaultdict OrderedDict ChainMap",
    "string": """ascii_letters ascii_lowercase ascii_uppercase digits hexdigits punctuation
        whitespace printable""",
    "json": "dumps loads",
    "decimal": "Decimal ROUND_HALF_UP ROUND_HALF_EVEN ROUND_DOWN ROUND_UP ROUND_FLOOR",
    "fractions": "Fraction",
    "statistics": "mean fmean median mode stdev pstdev variance pvariance",
    "typing": "Any Callable Dict Iterable List Optional Sequence Set Tuple Union"}.items()}
PLAIN_BUILTINS = {name for name, value in vars(builtins).items()
                  if isinstance(value, type) and issubclass(value, BaseException)} | set(
    """abs all any ascii bin bool bytearray bytes callable chr complex dict divmod enumerate filter
    float format frozenset hex int isinstance issubclass iter len list map max min next oct ord pow
    print range repr reversed round set slice sorted str sum tuple zip""".split())
# attributes that lead to frames or, from a text, to any attribute
ODD_ATTRIBUTE = re.compile("_|f_|co_|gi_|cr_|ag_|tb_|format|mro$")
LITERAL = ast.Constant, ast.Tuple, ast.List, ast.Load
ANNOTATION = (*LITERAL, ast.Name, ast.Attribute, ast.Subscript, ast.BinOp, ast.BitOr)
IF_MAIN = ast.dump(ast.parse("__name__ == '__main__'", mode="eval").body)
CATCHING = ast.Try, ast.With, ast.AsyncWith, getattr(ast, "TryStar", ast.Try)  # Python 3.11


def alike(texts, calls):
    """Return which outcomes of the fixed mode also hold for the official mode, from the code alone.

    "all"; "values" (all except timeouts); or "" (none). Nothing of the code has run.
    They hold for one function, with nothing else that has an effect, that uses only its arguments,
    PLAIN_BUILTINS and imports from PLAIN_MODULES. If it could catch the alarm, a call may time out
    in the fixed mode only.
    """
    def made_of(kinds, *parts):
        return all(isinstance(node, kinds) for part in parts if part for node in ast.walk(part))

    def has_effect(statement):
        if isinstance(statement, ast.Expr):
            return not isinstance(statement.value, ast.Constant)
        return not (isinstance(statement, ast.If) and ast.dump(statement.test) == IF_MAIN
                    and not statement.orelse)

    fixed = [*filter(has_effect, code_of(texts["fixed"], called_name(calls[0])))]
    official = [*filter(has_effect, ast.parse(texts["official"]).body)]
    if [*map(ast.dump, fixed)] != [*map(ast.dump, official)]:
        return ""
    module = symtable.symtable(texts["official"], "", "exec")
    bound = {symbol.get_name() for symbol in module.get_symbols()
             if symbol.is_assigned() or symbol.is_imported()}
    functions = [statement for statement in official if isinstance(statement, ast.FunctionDef)]
    for statement in official:
        if isinstance(statement, ast.FunctionDef):
            args = statement.args
            arguments = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
            annotations = [argument.annotation for argument in arguments if argument]
            annotations = [part for part in [statement.returns, *annotations] if part]
            names = {node.id for part in annotations for node in ast.walk(part)
                     if isinstance(node, ast.Name)}
            plain = not statement.decorator_list and not getattr(statement, "type_params", []) \
                and made_of(LITERAL, *args.defaults, *args.kw_defaults) \
                and made_of(ANNOTATION, *annotations) and names <= PLAIN_BUILTINS | bound
        elif isinstance(statement, ast.Assign):
            plain = made_of(LITERAL, statement.value) \
                and all(isinstance(target, ast.Name) for target in statement.targets)
        else:
            plain = isinstance(statement, (ast.Import, ast.ImportFrom))
        if not plain:
            return ""
    if len(functions) != 1 or any(called_name(call) != functions[0].name for call in calls):
        return ""
    tables = [module, *[symtable.symtable(call.strip(), "", "eval") for call in calls]]
    inner = [child for table in tables for child in table.get_children()]
    for table in inner:
        inner += table.get_children()
    looked_up = {symbol.get_name() for table in inner for symbol in table.get_symbols()
                 if symbol.is_global()}
    # in the official mode a function does not find the module's names
    if looked_up - PLAIN_BUILTINS or looked_up & bound:
        return ""
    nodes = [node for statement in official for node in ast.walk(statement)]
    if not all_plain(nodes):
        return ""
    return "values" if any(isinstance(node, CATCHING) for node in nodes) else "all"


def all_plain(nodes):
    """Return whether code (its nodes) uses only PLAIN_MODULES and attributes without side doors."""
    def plain(module, name):
        return module in PLAIN_MODULES and not name.startswith("_") \
            and name in (PLAIN_MODULES[module] or [name]) \
            and hasattr(importlib.import_module(module), name)

    names = [(alias.asname or alias.name, alias.name)
             for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules, reached = dict(names), set()
    if len(modules) < len(set(names)) or set(modules.values()) - PLAIN_MODULES.keys():
        return False
    for node in nodes:
        texts = [text for _, value in ast.iter_fields(node)
                 for text in (value if type(value) is list else [value])]
        if any("__" in str(text) for text in texts if isinstance(text, (str, bytes))):
            return False
        if isinstance(node, (ast.ClassDef, ast.Global, getattr(ast, "MatchClass", ast.Global))):
            return False
        if isinstance(node, ast.ImportFrom) and (
                node.level or not all(plain(node.module, alias.name) for alias in node.names)):
            return False
        if isinstance(node, ast.Attribute):
            of_module = modules.get(getattr(node.value, "id", None))
            formats = node.attr == "format" and isinstance(node.value, ast.Constant) \
                and "_" not in str(node.value.value)
            if not isinstance(node.ctx, ast.Load) \
                    or ODD_ATTRIBUTE.match(node.attr) and not formats \
                    or of_module and not plain(of_module, node.attr):
                return False
            reached.add(node.value)
    return all(isinstance(node, ast.Name) and node in reached
               or getattr(node, "id", None) not in modules for node in nodes)


def child(fd, zygote, abi, filters):
    """Read one request from the socket, run its calls in order, send a frame for each.

    Never returns.
    """
    try:
        os.dup2(fd, 3)
        link = socket.socket(fileno=3)
        layers = jail_child(zygote, abi, filters[0])
        size, = struct.unpack("=I", link.recv(4, socket.MSG_WAITALL))
        request = json.loads(link.recv(size, socket.MSG_WAITALL))
        runs, same = {}, ""
        if request["compare"]:
            try:
                same = alike(request["texts"], [call for _, call in request["calls"]])
            except Exception:  # one of them is not Python
                pass
        for mode, text in request["texts"].items():
            try:
                calls = [call for its_mode, call in request["calls"] if its_mode == mode]
                if mode == "fixed":
                    runs[mode] = fixed_mode(text, calls)
                else:
                    runs[mode] = official_mode(text, request["alarm"])
            except Exception as error:  # not Python, or too deep: each call raises it
                runs[mode] = error
        if layers == ["seccomp"]:
            seccomp(filters[1])
        send_frame(link, b"+", f"{' '.join(layers)};{same}".encode())
        for mode, call in request["calls"]:
            kind, body = b"R", b""
            try:
                if isinstance(runs[mode], Exception):
                    raise runs[mode]
                value = runs[mode](call)
                try:
                    kind, body = b"V", json.dumps(encode(value)).encode()
                except Exception:  # not plain data, or too much
                    kind = b"R"
            except BaseException as error:  # any of the code's, even SystemExit, ends one call
                kind, body = b"E", type(error).__name__.encode("utf-8", "replace")
            if len(body) > MAX_RESULT:
                kind, body = b"R", b""
            send_frame(link, kind, body)
    finally:
        os._exit(0)


def send_frame(link, kind, body):
    link.sendall(struct.pack("=I", len(body)) + kind + body)


def zygote_main(control, parent, site_paths):
    """Preload, enter the jail, then serve the parent.

    b"f" with a socket forks a child; b"k" kills the child and is answered by b"k".
    """
    own_folder = os.path.dirname(os.path.abspath(__file__))
    sys.path = [path for path in sys.path if path != own_folder] + site_paths
    for name in PRELOAD.split():
        try:
            importlib.import_module(name)
        except ImportError:
            pass  # numpy is optional
    filters = [b"", b""]
    if MACHINE:
        filters = [seccomp_program(no_open) for no_open in (False, True)]
    abi, me, running = jail_zygote(site_paths), os.getpid(), 0
    answer = "```\ndef f():\n    return 1\n```"
    for run in fixed_mode(answer, ["f()"]), official_mode("f = int", 0):
        json.dumps(encode(run("f()")))  # fills caches, which children inherit
    os.dup2(1, 2)  # /dev/null; until now errors went to the parent's stderr
    gc.freeze()
    control.sendall(b"+")
    control.settimeout(1.0)
    while True:
        try:
            message, fds, _, _ = socket.recv_fds(control, 1, 1)
        except TimeoutError:
            message, fds = b"?", []
        # check the pid too: a fork of the parent may keep the socket open
        if not message or os.getppid() != parent:
            os._exit(0)
        if message in b"fk" and running:
            os.kill(running, signal.SIGKILL)
            os.waitpid(running, 0)
            running = 0
        if message == b"f":
            running = os.fork()
            if not running:
                child(fds[0], me, abi, filters)
            os.close(fds[0])
        elif message == b"k":
            control.sendall(b"k")


# ---- the parent ---------------------------------------------------------------------------------
class Zygote:
    """A warm process that forks jailed children; restarts when lost. For one thread at a time."""

    def __init__(self, hash_seed="0"):
        """hash_seed: PYTHONHASHSEED inside.

        It must be the same for answers and hidden code, or sets have different orders.
        """
        self.process, self.layers, self.hash_seed = None, None, hash_seed
        self.start()

    def start(self):
        """Raises RuntimeError if the process does not come up."""
        self.control, theirs = socket.socketpair()
        site = [path for path in sys.path
                if os.path.basename(path) in ("site-packages", "dist-packages")]
        flags = ["-s", "-S", "-B"]
        if sys.version_info >= (3, 11):  # before that, zygote_main removes the folder
            flags.append("-P")
        env = {"PYTHONHASHSEED": self.hash_seed, "OPENBLAS_NUM_THREADS": "1",
               "OMP_NUM_THREADS": "1"}
        if "LD_LIBRARY_PATH" in os.environ:  # some builds of Python start only with it
            env["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        arguments = [os.path.abspath(__file__), str(theirs.fileno()), str(os.getpid()),
                     json.dumps(site)]
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, *flags, *arguments], env=env, cwd="/", stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True)
        if not self.says(b"+", START_S):
            self.close()
            raise RuntimeError("a sandbox process did not start; its error, if any, is above")

    def close(self):
        if self.process is not None:
            self.control.close()
            self.process.kill()
            self.process.wait()
            self.process = None

    def says(self, expected, seconds):
        try:
            self.control.settimeout(seconds)
            return self.control.recv(1) == expected
        except OSError:
            return False

    def run(self, texts, calls, seconds, alarm=0, total=math.inf):
        """Run every call expression on each text.

        texts: {"fixed": text, "official": text}; either may be missing.
        seconds: wall time per call.
        alarm: whole seconds after which the official mode raises TimeoutError in the code, which
            then has the same time again; 0 for never.
        total: seconds for everything; calls that are not reached are timed out.

        Returns {mode: [(kind, wire) for each call]}. wire: bytes of JSON for `decode`. kind:
        "value", "raised", "refused" (not plain data, or too much), "timed out" or "died". A call
        that times out or dies loses only itself: the rest run in a new child.

        The official calls run first, because nothing else may be in their process. If they take
        more than SLOW_S, they start again after the fixed ones, in the time that is left, and those
        that did not time out in the fixed mode go first. If both modes run the same program
        (`alike`), they take over the fixed mode's outcomes.
        Raises RuntimeError if the sandbox cannot restart or has lost a layer.
        """
        jobs = [(mode, k) for mode in ("official", "fixed") if mode in texts
                for k in range(len(calls))]
        deadline = time.monotonic() + total
        outcomes, lost, todo, compare = {}, 0, jobs, False
        patience = SLOW_S if len(texts) > 1 else math.inf
        try:
            while todo and time.monotonic() < deadline:
                if self.process is None:
                    self.start()
                request = {"texts": texts, "calls": [(mode, calls[k]) for mode, k in todo],
                           "alarm": alarm, "compare": compare}
                got, patience = self.run_child(request, seconds, deadline, patience)
                try:
                    self.control.sendall(b"k")
                    alive = self.says(b"k", 10.0)
                except OSError:
                    alive = False
                if not alive:  # the zygote died: blame its child only if that happens again
                    self.close()
                    lost += 1
                    while got and got[-1][0] == "died" and lost < 3:
                        got.pop()
                for (mode, k), (*outcome, same) in zip(todo, got):
                    outcomes[mode, k] = tuple(outcome)
                    if compare and same:
                        outcomes["official", k] = tuple(outcome)
                todo = todo[len(got):]
                if patience <= 0 and todo and todo[0][0] == "official":
                    outcomes, patience, compare = {}, math.inf, True
                    todo = [job for job in jobs if job[0] == "fixed"]
                elif compare and not todo:
                    compare = False
                    todo = sorted((job for job in jobs if job not in outcomes),
                                  key=lambda job: outcomes["fixed", job[1]][0] == "timed out")
        except BaseException:
            self.close()  # unknown state: the next run starts a new process
            raise
        late = ("timed out", b"")
        return {mode: [outcomes.get((mode, k), late) for k in range(len(calls))] for mode in texts}

    def run_child(self, request, seconds, deadline, patience):
        """Fork once.

        Returns ([(kind, wire, whether the official mode gives the same)], the patience left). The
        list ends with the first lost call, or before an official call for which no patience is
        left. If the child never gets ready, all calls are lost.
        """
        got, started, same = [], False, ""
        text = json.dumps(request).encode()
        mine, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(self.control, [b"f"], [theirs.fileno()])
            mine.settimeout(PREPARE_S)
            mine.sendall(struct.pack("=I", len(text)) + text)
            _, ready = receive_frame(mine, min(PREPARE_S, deadline - time.monotonic()))
            layers, same = ready.split(b";")
            self.layers, started = self.layers or layers, True
            if layers != self.layers:
                raise RuntimeError(f"the sandbox lost a layer: {self.layers} became {layers}")
            for mode, _ in request["calls"]:
                start, official = time.monotonic(), mode == "official"
                limit = min(seconds + request["alarm"] * official, deadline - start)
                try:
                    kind, body = receive_frame(mine, min(limit, patience) if official else limit)
                finally:
                    patience -= (time.monotonic() - start) * official
                kind = {b"V": "value", b"E": "raised"}.get(kind, "refused")
                got.append((kind, body, bool(same)))
            return got, patience
        except TimeoutError:
            if started and patience <= 0 and request["calls"][len(got)][0] == "official":
                return got, patience
            lost = ("timed out", b"", same == b"all")
        except (EOFError, OSError):
            lost = ("died", b"", bool(same))
        finally:
            mine.close()
        return got + [lost] * (1 if started else len(request["calls"])), patience


def receive_frame(link, seconds):
    """Return (kind, body), both bytes.

    Raises TimeoutError; EOFError if the child is gone or announces a frame that is too large.
    """
    deadline, data, need = time.monotonic() + seconds, b"", 5
    while len(data) < need:
        link.settimeout(max(deadline - time.monotonic(), 1e-3))
        more = link.recv(min(need - len(data), 1 << 16))
        data += more
        if len(data) == need == 5:
            need += struct.unpack("=I", data[:4])[0]
        if not more or need > MAX_RESULT + 5:
            raise EOFError
    return data[4:5], data[5:]


def self_test(zygote):
    """Try to break out of a jailed child.

    Returns (tier, names of the attempts that succeeded). Tier: "strict" (none succeeded);
    "seccomp-only" (none, but without Landlock: files are closed only after the imports); "weak".
    Raises RuntimeError if plain code does not run.
    """
    with tempfile.TemporaryDirectory() as folder, \
            socket.create_server(("127.0.0.1", 0)) as server:
        path, port = os.path.join(folder, "canary"), server.getsockname()[1]
        me = os.getpid()
        with open(path, "w") as file:
            file.write("canary")
        attempts = {
            "plain code": "1",
            "TCP": f"socket.create_connection(('127.0.0.1', {port}), 1)",
            "UDP": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)"
                   f".sendto(b'x', ('127.0.0.1', {port}))",
            "reading a file": f"open({path!r}).read()",
            "reading another process": f"open('/proc/{me}/environ').read()",
            "writing a file": f"open({path!r}, 'a').write('x')",
            "creating a file": f"open({path!r} + '2', 'w')",
            "fork": "os.fork() or os._exit(0)",
            "running a program": "os.posix_spawn('/bin/sh', ['sh', '-c', 'exit 0'], {})",
            "signals": f"os.kill({me}, 0)",
            "signals to the zygote": "os.kill(os.getppid(), 0)",
            "signals through a descriptor": f"fcntl.fcntl(3, 8, {me})",  # F_SETOWN
            "3 GB of memory": "bytearray(3 << 30)",
            "raising a limit": "resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99))",
            "deleting a file": f"os.unlink({path!r})",
        }
        code = ("import fcntl, os, resource, socket\n"
                "def works(attempt):\n    attempt()\n    return True")
        calls = [f"works(lambda: {attempt})" for attempt in attempts.values()]
        outcomes = zygote.run({"fixed": code}, calls, seconds=5.0)["fixed"]
    succeeded = [name for name, outcome in zip(attempts, outcomes)
                 if outcome == ("value", b"true")]
    if succeeded[:1] != ["plain code"]:
        raise RuntimeError(f"the sandbox does not run plain code: {outcomes[0]}")
    escapes = succeeded[1:]
    if escapes:
        return "weak", escapes
    return "strict" if b"landlock" in zygote.layers else "seccomp-only", escapes


if __name__ == "__main__":
    given = int(sys.argv[1])
    low = os.dup(given)  # a low number, which a child closes, whatever it was in the parent
    os.close(given)
    zygote_main(socket.socket(fileno=low), int(sys.argv[2]), json.loads(sys.argv[3]))
