"""Attacks on the sandbox with real processes, one per test.

After each, the same scorer must still score correctly.
"""
import json
import os
import platform
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from colbench.env.backend import sandbox
from colbench.env.backend.score import OfficialArray, Scorer, judge, nested_list, read, share

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in sandbox.CALLS, reason="Linux only")

SECRET = "kaleidoscope-7391"  # only in the hidden code
TASK = {"ground_truth": f"def f(x):\n    word = '{SECRET}'\n"
                        "    return {'n': [x, x * 2], 'w': word}",
        "test_cases": {"a": "f(1)", "b": "f(2)"}}
RIGHT = TASK["ground_truth"]
WRONG = "def f(x):\n    return {'n': [x, x], 'w': ''}"

# Each defines an f that lies, dies or spoils something.
CHEATS = {
    "equal to all": "class E:\n  def __eq__(s, o): return True\ndef f(x): return E()",
    "equal to all, in the function":
        "def f(x):\n  class E:\n    def __eq__(s, o): return True\n  return E()",
    "never unequal":
        "def f(x):\n  class E:\n    __eq__ = lambda s, o: True\n    __ne__ = lambda s, o: False\n"
        "    __hash__ = None\n  return E()",
    "int that lies":
        "def f(x):\n  class I(int):\n    def __eq__(s, o): return True\n"
        "    def __format__(s, f): return '1'\n"
        "  return I(5)",
    "str that lies":
        "def f(x):\n  class S(str):\n    def __eq__(s, o): return True\n"
        "    def isascii(s): return 1\n"
        "  return S('q')",
    "float that lies":
        "def f(x):\n  class F(float):\n    def __eq__(s, o): return True\n"
        "    def hex(s): return '0x1'\n"
        "  return F(2)",
    "list that lies":
        "def f(x):\n  class L(list):\n    def __eq__(s, o): return True\n"
        "    def __iter__(s): return iter([1])\n"
        "  return L([9])",
    "dict that lies":
        "def f(x):\n  class D(dict):\n    def __eq__(s, o): return True\n"
        "    def items(s): return [(1, 1)]\n"
        "  return D(a=1)",
    "dict with a lying value":
        "def f(x):\n  class E:\n    def __eq__(s, o): return True\n  return {'n': E(), 'w': E()}",
    "tuple that lies":
        "def f(x):\n  class T(tuple):\n    def __eq__(s, o): return True\n  return T((1,))",
    "set that lies":
        "def f(x):\n  class T(set):\n    def __eq__(s, o): return True\n  return T((1,))",
    "metaclass that lies":
        "def f(x):\n  class M(type):\n    def __eq__(s, o): return True\n"
        "    __hash__ = type.__hash__\n"
        "  return M('C', (), {})",
    "class with a fake __class__":
        "def f(x):\n  class C:\n    __class__ = property(lambda s: dict)\n"
        "    def __eq__(s, o): return True\n"
        "  return C()",
    "numpy array that lies":
        "def f(x):\n  import numpy as np\n  class A(np.ndarray):\n"
        "    def __eq__(s, o): return True\n"
        "  return np.zeros(1).view(A)",
    "None": "def f(x): return None",
    "no return": "def f(x): pass",
    "NotImplemented": "def f(x): return NotImplemented",
    "lambda": "def f(x): return lambda *a: True",
    "generator": "def f(x): yield {'n': [x, x * 2]}",
    "coroutine": "async def f(x): return 1",
    "unittest.mock.ANY": "def f(x):\n  from unittest.mock import ANY\n  return ANY",
    "nan": "def f(x): return float('nan')",
    "endless cycle": "def f(x):\n  l = []\n  l.append(l)\n  return l",
    "deep result": "def f(x):\n  l = []\n  for _ in range(100000): l = [l]\n  return l",
    "wide result": "def f(x): return list(range(10 ** 6))",
    "100 MB result": "def f(x): return 'a' * 10 ** 8",
    "big integer": "def f(x): return 1 << 40_000_000",
    "colliding hashes": "def f(x): return {k * (2 ** 61 - 1) for k in range(20000)}",
    "os._exit": "def f(x):\n  import os\n  os._exit(0)",
    "sys.exit": "def f(x):\n  import sys\n  sys.exit(0)",
    "SystemExit": "def f(x): raise SystemExit(0)",
    "KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "SystemExit at the top": "raise SystemExit\ndef f(x): return 1",
    "exception that breaks str":
        "def f(x):\n  class E(BaseException):\n    def __str__(s): raise s\n"
        "    __repr__ = __str__\n  raise E",
    "exception with an odd name": "def f(x): raise type('\\ud800\\n', (BaseException,), {})",
    "exception with a lying type name":
        "def f(x):\n  class M(type):\n    __name__ = property(lambda s: 1 / 0)\n"
        "  class E(Exception, metaclass=M): pass\n  raise E",
    "segfault": "def f(x):\n  import ctypes\n  ctypes.string_at(0)",
    "abort": "def f(x):\n  import os\n  os.abort()",
    "recursion": "def f(x): return f(x)",
    "recursion without a limit":
        "def f(x):\n  import sys\n  sys.setrecursionlimit(10 ** 9)\n  def g(): g()\n  g()",
    "C recursion": "def f(x):\n  a = []\n  for _ in range(10 ** 6): a = [a]\n  return repr(a)",
    "nested parentheses": "def f(x): return " + "(" * 50000 + "1" + ")" * 50000,
    "nested brackets": "def f(x): return " + "[" * 90000,
    "nested unary": "def f(x): return " + "-" * 150000 + "1",
    "nested attributes": "def f(x): return x" + ".a" * 90000,
    "nested blocks": "def f(x):\n" + "".join(" " * i + "if x:\n" for i in range(1, 300)),
    "5 MB of text": "def f(x): return 1\n" + "#" * 5_000_000,
    "null bytes": "def f(x):\0 return 1",
    "lone surrogates": "def f(x): return '\ud800'",
    "memory bomb": "def f(x): return [bytearray(1 << 28) for _ in range(40)]",
    "memory bomb at the top": "x = 'a' * (1 << 34)\ndef f(x): return 1",
    "memory bomb by compiling":
        "def f(x):\n  return len(compile('a=(' + '0,' * 30_000_000 + ')', '', 'exec').co_consts)",
    "output flood":
        "def f(x):\n  import sys\n"
        "  for _ in range(300): print('y' * 10 ** 6); sys.stderr.write('y' * 10 ** 6)\n"
        "  return 0",
    "shared memory through mmap":
        "def f(x):\n  import mmap\n  return [mmap.mmap(-1, 1 << 28) for _ in range(40)]",
    # forging results
    "frames on every descriptor":
        "def f(x):\n  import os, struct\n  for fd in range(64):\n"
        "    try: os.write(fd, struct.pack('=I', 4) + b'Vtrue' * 50)\n    except OSError: pass\n"
        "  return 1",
    "a hundred frames, then exit":
        "def f(x):\n  import os, struct\n  os.write(3, (struct.pack('=I', 4) + b'Vtrue') * 100)\n"
        "  os._exit(0)",
    "a frame of 4 GB":
        "def f(x):\n  import os\n  os.write(3, b'\\xff\\xff\\xff\\xffV')\n"
        "  import time; time.sleep(9)",
    "half a frame": "def f(x):\n  import os\n  os.write(3, b'\\x10\\0\\0\\0Vtr')\n  os._exit(0)",
    "a pickle as result":
        "def f(x):\n  import os, pickle, struct\n  class P:\n"
        "    def __reduce__(s): return eval, ('1',)\n"
        "  b = pickle.dumps(P())\n  os.write(3, struct.pack('=I', len(b)) + b'V' + b)\n"
        "  os._exit(0)",
    "a result that is not JSON":
        "def f(x):\n  import os, struct\n  os.write(3, struct.pack('=I', 3) + b'V[[[')\n"
        "  os._exit(0)",
    "JSON too deep":
        "def f(x):\n  import os, struct\n"
        "  os.write(3, struct.pack('=I', 4000) + b'V' + b'[' * 4000)\n"
        "  os._exit(0)",
    "JSON with an unknown tag":
        "def f(x):\n  import os, struct\n  b = b'[\"eval\", \"1\"]'\n"
        "  os.write(3, struct.pack('=I', len(b)) + b'V' + b)\n  os._exit(0)",
    "JSON with a builtin as type":
        "def f(x):\n  import os, struct\n  b = b'[\"type\", \"exec\"]'\n"
        "  os.write(3, struct.pack('=I', len(b)) + b'V' + b)\n  os._exit(0)",
    "an unhashable in a set":
        "def f(x):\n  import os, struct\n  b = b'[\"set\", [\"list\"]]'\n"
        "  os.write(3, struct.pack('=I', len(b)) + b'V' + b)\n  os._exit(0)",
    "a frame of unknown kind":
        "def f(x):\n  import os, struct\n  os.write(3, struct.pack('=I', 0) + b'\\0')\n"
        "  os._exit(0)",
    "closing the socket": "def f(x):\n  import os\n  os.close(3)\n  return 1",
    "another descriptor in the socket's place":
        "def f(x):\n  import os\n  os.dup2(0, 3)\n  return 1",
    "frames from a thread that stays":
        "def f(x):\n  import os, struct, threading\n  def flood():\n"
        "    while True: os.write(3, struct.pack('=I', 4) + b'Vtrue')\n"
        "  threading.Thread(target=flood, daemon=True).start()\n  return 1",
    "half the memory in socket buffers":
        "def f(x):\n  import socket\n"
        "  for a, b in [socket.socketpair() for _ in range(25)]:\n    a.setblocking(False)\n"
        "    try:\n      while True: a.send(b'x' * 60000)\n    except BlockingIOError: pass\n"
        "  return 1",
    "a second ready frame":
        "def f(x):\n  import os, struct\n  os.write(3, struct.pack('=I', 0) + b'+')\n  return 1",
    # poisoning later calls and answers
    "patched builtins":
        "import builtins\n"
        "for n in 'isinstance', 'len', 'eval', 'exec', 'compile', 'next', 'getattr', 'type':\n"
        "  setattr(builtins, n, lambda *a, **k: True)\ndef f(x): return 1",
    "patched json":
        "def f(x):\n  import json\n  json.dumps = lambda *a, **k: 'true'\n  json.loads = None\n"
        "  return 1",
    "patched encoder":
        "def f(x):\n  import sys\n  m = sys.modules['__main__']\n  m.encode = lambda *a: True\n"
        "  m.KINDS.clear()\n  return 1",
    "patched sys.modules": "def f(x):\n  import sys\n  sys.modules.clear()\n  return 1",
    "patched meta_path":
        "def f(x):\n  import sys\n  sys.meta_path.clear(); sys.path.clear()\n  return 1",
    "atexit": "def f(x):\n  import atexit\n  atexit.register(print, 'x')\n  return 1",
    "__del__": "def f(x):\n  class D:\n    def __del__(s): raise SystemExit\n  D()\n  return 1",
    "trace function":
        "def f(x):\n  import sys\n  sys.settrace(lambda *a: 1 / 0)\n"
        "  sys.setprofile(lambda *a: 1 / 0)\n"
        "  return 1",
    "audit hook": "def f(x):\n  import sys\n  sys.addaudithook(lambda *a: 1 / 0)\n  return 1",
    "ignored signals":
        "def f(x):\n  import signal\n  for s in range(1, 65):\n"
        "    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except Exception: pass\n  return 1",
}
ESCAPES = {  # expressions that raise if stopped; <names> are from the fixture `bait`
    "read the canary": "open('<file>').read()",
    "read the canary through os.open": "os.read(os.open('<file>', os.O_RDONLY), 1)",
    "read the canary through a memory map": "mmap.mmap(os.open('<file>', 0), 0)",
    "read the canary through sqlite":
        "sqlite3.connect('<file>').execute('select 1 from sqlite_master').fetchall() or 1",
    "read the task files": "open('<root>/colbench/env/backend/tasks.py').read()",
    "read the shadow file": "open('/etc/shadow').read()",
    "read the passwords": "open('/etc/passwd').read()",
    "read the home": "os.listdir(os.path.expanduser('~root'))",
    "list the top folder": "os.listdir('/')",
    "read own memory": "open('/proc/self/mem', 'rb')",
    "read own maps": "open('/proc/self/maps').read()",
    "read the zygote's memory": "open(f'/proc/{os.getppid()}/mem', 'rb')",
    "read the zygote's environment": "open(f'/proc/{os.getppid()}/environ', 'rb').read()",
    "read the scorer's memory": "open('/proc/<pid>/mem', 'rb')",
    "read the scorer's environment": "open('/proc/<pid>/environ', 'rb').read()",
    "list the scorer's descriptors": "os.listdir('/proc/<pid>/fd')",
    "process_vm_readv": "ctypes.CDLL(None).syscall(310, <pid>, None, 0, None, 0, 0) >= 0 or 1 / 0",
    "ptrace": "ctypes.CDLL(None).syscall(101, 16, <pid>, 0, 0) >= 0 or 1 / 0",
    "pidfd_getfd": "ctypes.CDLL(None).syscall(434, <pid>, 0) >= 0 or 1 / 0",
    "overwrite the canary": "open('<file>', 'w')",
    "append to the canary": "open('<file>', 'a').write('x')",
    "truncate the canary": "os.truncate('<file>', 0)",
    "delete the canary": "os.unlink('<file>')",
    "rename the canary": "os.rename('<file>', '<file>2')",
    "link the canary": "os.link('<file>', '<file>2')",
    "symbolic link": "os.symlink('/', '<file>2')",
    "chmod": "os.chmod('<file>', 0o777)",
    "chown": "os.chown('<file>', 1, 1)",
    "touch": "os.utime('<file>')",
    "new folder": "os.mkdir('<file>2')",
    "new fifo": "os.mkfifo('<file>2')",
    "temporary file": "tempfile.TemporaryFile()",
    "memfd": "os.memfd_create('x')",
    "extended attribute": "os.setxattr('<file>', 'user.x', b'1')",
    "change folder": "os.chdir('/tmp')",
    "chroot": "os.chroot('/')",
    "TCP": "socket.create_connection(('127.0.0.1', <port>), 1)",
    "TCP by raw system call": "ctypes.CDLL(None).socket(2, 1, 0) >= 0 or 1 / 0",
    "UDP": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', <udp>))",
    "listening": "socket.create_server(('127.0.0.1', 0))",
    "Unix socket": "socket.socket(socket.AF_UNIX).connect('<file>.sock')",
    "datagram pair with an address":
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', '<file>.sock')",
    "netlink": "socket.socket(16, 3, 0)",
    "URL": "urllib.request.urlopen('http://127.0.0.1:<port>/', timeout=1)",
    "fork": "os.fork() or os._exit(0)",
    "vfork by raw system call": "ctypes.CDLL(None).syscall(58) >= 0 or 1 / 0",
    "clone by raw system call": "ctypes.CDLL(None).syscall(56, 17, 0, 0, 0, 0) >= 0 or 1 / 0",
    "clone3 by raw system call":
        "ctypes.CDLL(None).syscall(435, bytes([0] * 88), 88) >= 0 or 1 / 0",
    "subprocess": "subprocess.run(['/bin/sh', '-c', 'touch <file>2'], check=True)",
    "os.system": "os.system('exit 0') == 0 or 1 / 0",
    "posix_spawn": "os.posix_spawn('/bin/sh', ['sh', '-c', 'exit 0'], {})",
    "exec": "os.execv('/bin/sh', ['sh', '-c', 'exit 0'])",
    "multiprocessing": "multiprocessing.Process(target=print).start()",
    "kill the scorer": "os.kill(<pid>, 0)",
    "kill the zygote": "os.kill(os.getppid(), 9)",
    "kill everything": "os.kill(-1, 9)",
    "kill own group": "os.killpg(0, 9)",
    "kill the canary process": "os.kill(<canary>, 9)",
    "queue a signal": "ctypes.CDLL(None).sigqueue(<canary>, 9, 0) == 0 or 1 / 0",
    "pidfd signal": "signal.pidfd_send_signal(os.pidfd_open(<canary>), 9)",
    "descriptor owner": "fcntl.fcntl(3, 8, <canary>)",
    "descriptor signal": "fcntl.fcntl(3, 10, 9)",
    "descriptor owner by ioctl": "fcntl.ioctl(3, 0x8901, (<canary>).to_bytes(4, 'little'))",
    "setuid": "os.setuid(0)",
    "raise a limit": "resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))",
    "limit of the scorer": "resource.prlimit(<pid>, resource.RLIMIT_CPU, (1, 1))",
    "priority of the scorer": "os.setpriority(os.PRIO_PROCESS, <pid>, 19)",
    "processors of the scorer": "os.sched_setaffinity(<pid>, {0})",
    "surviving the parent": "ctypes.CDLL(None).prctl(1, 0) == 0 or 1 / 0",
    "new namespace": "ctypes.CDLL(None).unshare(0x10000000) == 0 or 1 / 0",
    "io_uring": "ctypes.CDLL(None).syscall(425, 1, bytes(120)) >= 0 or 1 / 0",
    "bpf": "ctypes.CDLL(None).syscall(321, 0, bytes(120), 120) >= 0 or 1 / 0",
    "keyring": "ctypes.CDLL(None).syscall(250, 0, -3, 0, 0, 0) >= 0 or 1 / 0",
    "userfaultfd": "ctypes.CDLL(None).syscall(323, 0) >= 0 or 1 / 0",
    "32-bit system calls": "ctypes.CDLL(None).syscall(0x40000000 | 39) >= 0 or 1 / 0",
    "3 GB": "bytearray(3 << 30)",
    "500 threads":
        "[threading.Thread(target=time.sleep, args=(9,), daemon=True).start() for _ in range(500)]",
    "10000 descriptors": "[os.dup(0) for _ in range(10000)]",
    "the hidden code among all objects":
        "[o for o in gc.get_objects() if isinstance(o, (dict, list, tuple))"
        " and '1937-epocs' in str(o)[::-1]][0]",
    "the hidden code in the frames":
        "[v for fr in FRAMES for v in fr.f_locals.values() if '1937-epocs' in str(v)[::-1]][0]",
    "the hidden code in the modules":
        "[m for m in list(sys.modules.values()) if '1937-epocs' in str(vars(m))[::-1]][0]",
    "the hidden code in the arguments":
        "[a for a in sys.argv + sys.orig_argv if '1937-epocs' in a[::-1]][0]",
    "an environment variable": "os.environ['HOME']",
    "list a folder through O_PATH": "os.listdir(os.open('<root>', os.O_PATH | os.O_DIRECTORY))",
    "openat2": "ctypes.CDLL(None).syscall(437, -100, b'<file>', bytes(24), 24) >= 0 or 1 / 0",
    "open by handle": "ctypes.CDLL(None).syscall(304, -100, bytes(16), 0) >= 0 or 1 / 0",
    "a file without a name": "os.open('/tmp', os.O_TMPFILE | os.O_RDWR)",
    "file system information": "os.statvfs('/')",
    "abstract Unix socket":
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendmsg([b'x'], [], 0, '\\0name')",
    "a descriptor as a message": "socket.send_fds(socket.socketpair()[0], [b'x'], [3])",
    "shared memory of System V": "ctypes.CDLL(None).shmget(1, 4096, 0o1777) >= 0 or 1 / 0",
    "message queue": "ctypes.CDLL(None).syscall(240, b'name', 0o102, 0o777, 0) >= 0 or 1 / 0",
    "watching files": "ctypes.CDLL(None).inotify_init1(0) >= 0 or 1 / 0",
    "typing by ioctl": "fcntl.ioctl(0, 0x5412, b'x')",
    "a signal to one thread": "ctypes.CDLL(None).syscall(234, <pid>, <pid>, 9) == 0 or 1 / 0",
    "a signal with data":
        "ctypes.CDLL(None).syscall(129, os.getppid(), 9, bytes(128)) == 0 or 1 / 0",
    "local descriptor table": "ctypes.CDLL(None).syscall(154, 0, bytes(64), 64) >= 0 or 1 / 0",
    "setting the clock": "time.clock_settime(time.CLOCK_REALTIME, 1)",
    "larger pipes": "fcntl.fcntl(os.pipe()[1], 1031, 1 << 20)",
    "typing on the terminal": "open('/dev/tty', 'w')",
}
IMPORTS = ("import ctypes, fcntl, gc, mmap, multiprocessing, os, resource, signal, socket, "
           "sqlite3, struct, subprocess, sys, tempfile, threading, time, urllib.request")
HANGS = {
    "loop": "def f(x):\n  while True: pass",
    "loop at the top": "while True: pass\ndef f(x): pass",
    "loop that catches all":
        "def f(x):\n  while True:\n    try:\n      while True: pass\n"
        "    except BaseException: pass",
    "power in C": "def f(x): return (x + 8) ** 9 ** 9 ** 9",
    "power in the compiler": "def f(x): return 9 ** 9 ** 9",
    "regular expression":
        "import re\ndef f(x):\n  import re\n  return re.match('(a+)+$', 'a' * 40 + 'b')",
    "sleep": "def f(x):\n  import time\n  time.sleep(60)",
    "deadlock":
        "def f(x):\n  import threading\n  l = threading.Lock()\n  l.acquire()\n  l.acquire()",
    "alarms off":
        "def f(x):\n  import signal\n  signal.alarm(0)\n  signal.signal(14, signal.SIG_IGN)\n"
        "  while True: pass",
    "endless frames":
        "def f(x):\n  import os, struct\n  while True: os.write(3, struct.pack('=I', 3) + b'V123')",
    "never read": "def f(x):\n  import os\n  os.write(3, b'\\0')\n  while True: pass",
    "endless iterator": "def f(x):\n  import itertools\n  return sum(1 for _ in itertools.count())",
    "endless __del__": "def f(x):\n  class D:\n    def __del__(s):\n      while True: pass\n  D()",
    "threads that stay":
        "def f(x):\n  import threading\n  def loop():\n    while True: pass\n"
        "  [threading.Thread(target=loop).start() for _ in range(20)]\n  loop()",
    "input from the terminal": "def f(x):\n  import os\n  return os.read(3, 1)",
    "late death": "def f(x):\n  import time\n  time.sleep(0.9)\n  __import__('os')._exit(1)",
    "an alarm of its own":
        "def f(x):\n  import signal\n  signal.signal(14, lambda *a: None)\n"
        "  signal.setitimer(0, 0.01, 0.01)\n"
        "  while True: pass",
    "recursion that catches its end":
        "def f(x):\n  while True:\n    try: f(x)\n    except BaseException: pass",
    "a result that is slow to encode": "def f(x): return [10 ** 100_000] * 90_000",
    "handlers at exit":
        "import atexit, time\natexit.register(time.sleep, 60)\ndef f(x):\n  while True: pass",
    "imports in every child":
        "import asyncio, sqlite3, unittest.mock, xml.dom.minidom\ndef f(x):\n"
        "  while True: pass",
    "loop without the module's names":  # only in official mode
        "def g(): return 1\ndef f(x):\n  while True:\n    try: return g()\n"
        "    except NameError: pass",
    "loop in the first fence":  # only in official mode
        "```python\ndef f(x):\n  while True: pass\n```\n```python\ndef f(x):\n  return 1\n```",
    "fences without an end": "```\n~~~\n" * 20_000,
}


@pytest.fixture(scope="module")
def scorer():
    with Scorer(workers=1) as it:
        yield it


@pytest.fixture(scope="module")
def bait(tmp_path_factory):
    """A file, a socket file, a listener, a UDP port and a process to attack."""
    folder = Path(tempfile.mkdtemp())  # another user may not enter pytest's folder
    folder.chmod(0o777)
    (folder / "canary").write_text("canary")
    (folder / "canary").chmod(0o666)
    unix = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    unix.bind(str(folder / "canary.sock"))
    tcp = socket.create_server(("127.0.0.1", 0))
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    for each in (unix, tcp, udp):
        each.setblocking(False)
    process = subprocess.Popen(["sleep", "600"])
    yield {"folder": folder, "file": str(folder / "canary"), "pid": os.getpid(),
           "canary": process.pid, "root": str(ROOT), "port": tcp.getsockname()[1],
           "udp": udp.getsockname()[1], "tcp": tcp,
           "quiet": [unix, udp], "process": process}
    process.kill()
    process.wait()
    shutil.rmtree(folder)


def escape_code(expression, bait):
    filled = re.sub(r"<(\w+)>", lambda m: str(bait[m[1]]), expression)
    filled = filled.replace("FRAMES", "[sys._getframe(i) for i in range(4)]")
    return f"def f(x):\n    {IMPORTS}\n    value = {filled}\n    return True"


def assert_unharmed(bait):
    assert sorted(os.listdir(bait["folder"])) == ["canary", "canary.sock"]
    assert Path(bait["file"]).read_text() == "canary"
    assert os.stat(bait["file"]).st_mode & 0o777 == 0o666
    assert bait["process"].poll() is None
    for listener in bait["quiet"]:
        with pytest.raises(BlockingIOError):
            listener.recv(1)
    with pytest.raises(BlockingIOError):
        bait["tcp"].accept()


def assert_still_scores(scorer):
    assert share(scorer.score(TASK, RIGHT)) == 1.0
    assert share(scorer.score(TASK, WRONG)) == 0.0
    assert share(scorer.score(TASK, RIGHT), "official") == 1.0


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * name.startswith("memory bomb by"))
    for name in CHEATS])
def test_cheat_scores_zero(scorer, name):
    result = scorer.score(TASK, CHEATS[name])
    assert result["fixed"]["passed"] == result["official"]["passed"] == 0, result
    assert_still_scores(scorer)


@pytest.mark.parametrize("name", ESCAPES)
def test_escape_fails(scorer, bait, name):
    code = escape_code(ESCAPES[name], bait)
    outcomes = scorer.zygotes[1].run({"fixed": code, "official": code}, ["f(1)"], 3.0)
    for mode in outcomes:
        kind, error = outcomes[mode][0]
        assert kind in ("raised", "died"), outcomes
        # these would mean that the attack itself is broken
        assert error not in (b"NameError", b"SyntaxError", b"ModuleNotFoundError")
    assert_unharmed(bait)
    assert_still_scores(scorer)


@pytest.mark.parametrize("name", HANGS)
def test_hang_ends(scorer, name):
    start = time.monotonic()
    outcomes = scorer.zygotes[1].run({"fixed": HANGS[name]}, ["f(1)", "1"], 0.3)["fixed"]
    assert time.monotonic() - start < (sandbox.PREPARE_S + 2 if "compiler" in name else 3)
    assert outcomes[0][0] in ("timed out", "died", "raised", "value")
    assert outcomes[0] != ("value", b"true")
    if name in ("loop", "sleep", "deadlock", "power in C", "regular expression"):
        assert outcomes == [("timed out", b""), ("value", b"1")]  # the next call still runs
    start, calls = time.monotonic(), [f"f({k})" for k in range(10)]
    texts = {mode: HANGS[name] for mode in ("fixed", "official")}
    outcomes = scorer.zygotes[1].run(texts, calls, 0.1, total=0.5)
    assert time.monotonic() - start < 1.0
    assert all(len(of_mode) == 10 for of_mode in outcomes.values())
    assert_still_scores(scorer)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alarms off", "late death", "imports in every child",
                                  "loop in the first fence"])
def test_hanging_answer_takes_at_most_11_seconds(scorer, name):
    task = {"ground_truth": "def f(x): return x // 99 + 1",
            "test_cases": {str(k): f"f({k})" for k in range(10)}}
    start = time.monotonic()
    result = scorer.score(task, HANGS[name])
    assert time.monotonic() - start < 11
    assert result["fixed"]["passed"] == (10 if name == "loop in the first fence" else 0)


@pytest.mark.parametrize("first, last, times", [
    ("", "", 1), ("import time\n", "\nif __name__ == '__main__':\n    f(9)", 1),
    ("'doubles'\nk = [2, 'a']\n", "", 1),
    ("", "\nprint(f(0))", 2), ("", "\ndef g(x):\n    return f(x)", 2)])
def test_slow_answer_runs_once(scorer, first, last, times):
    """Once if both modes run the same program; twice if they may find different names."""
    code = (f"{first}def f(x):\n    import time\n    time.sleep(0.1 if x else 0)\n"
            f"    return x + 1{last}")
    start, calls = time.monotonic(), [f"f({k})" for k in range(1, 11)]
    outcomes = scorer.zygotes[1].run({"official": code, "fixed": code}, calls, 1.0)
    seconds = time.monotonic() - start - sandbox.SLOW_S
    expected = [("value", str(k + 1).encode()) for k in range(1, 11)]
    assert outcomes["official"] == outcomes["fixed"] == expected
    assert times < seconds < times + 0.9


def test_slow_answer_forges_no_official_result(scorer):
    """A result that the answer itself sends does not count in the mode where it would not run."""
    forge = ("import time\ntime.sleep(0.3)\n1/0\ndef f(x):\n    import posix, struct\n"
             "    b = str(x * 2).encode()\n"
             "    posix.write(3, struct.pack('=I', len(b)) + b'V' + b)\n    while True: pass")
    task = {"ground_truth": "def f(x):\n    return x * 2", "test_cases": {"a": "f(1)"}}
    assert scorer.score(task, forge)["official"]["passed"] == 0


@pytest.mark.slow
def test_remaining_time_goes_first_to_calls_that_end(scorer):
    """The fixed mode gets its time; official calls that ended in fixed mode go first."""
    loops = ("def f(x):\n    try:\n        while x < 4: pass\n    except TimeoutError: pass\n"
             "    return x")
    calls = [f"f({k})" for k in range(8)]
    outcomes = scorer.zygotes[1].run({"official": loops, "fixed": loops}, calls, 0.5, total=3.5)
    ends = [("timed out", b"")] * 4 + [("value", str(k).encode()) for k in range(4, 8)]
    assert outcomes == {"official": ends, "fixed": ends}
    loops = ("def f(x):\n    while True:\n        try: return g()\n        except NameError: pass\n"
             "def g(): return 1")
    outcomes = scorer.zygotes[1].run({"official": loops, "fixed": loops}, calls, 0.5, total=2.5)
    assert outcomes == {"official": [("timed out", b"")] * 8, "fixed": [("value", b"1")] * 8}


@pytest.mark.slow
def test_hanging_hidden_code_takes_at_most_22_seconds(scorer):
    task = {"ground_truth": "def f(x):\n    while x: pass\n    return 1",
            "test_cases": {str(k): f"f({k})" for k in range(10)}}
    start = time.monotonic()
    result = scorer.score(task, "def f(x): return 1")
    assert result["fixed"]["calls"] == ["passed"] + ["no reference value"] * 9
    assert time.monotonic() - start < 23


@pytest.mark.parametrize("name", [
    "read the canary", "read the task files", "list the top folder", "temporary file",
    "list the scorer's descriptors", "kill the scorer", "descriptor flags"])
def test_the_same_attempt_succeeds_outside(bait, name):
    """So a failure inside is due to the sandbox."""
    names = {}
    exec(escape_code({**ESCAPES, "descriptor flags": "fcntl.fcntl(1, 3)"}[name], bait), names)
    assert names["f"](1) is True


def test_calls_are_judged_separately(scorer):
    task = {"ground_truth": "def f(x, acc=[]):\n    acc.append(x)\n    return list(acc)",
            "test_cases": {"a": "f(1)", "b": "f(2)", "c": "f(3)"}}
    code = ("import os\nseen = []\ndef f(x):\n    seen.append(x)\n    if x == 2: os._exit(1)\n"
            "    return seen")
    assert scorer.score(task, code)["fixed"]["calls"] == ["passed", "died", "passed"]


def test_forged_frames_do_not_reach_the_next_answer(scorer):
    task = {"ground_truth": "def f(x): return True", "test_cases": {"a": "f(1)", "b": "f(2)"}}
    forge = ("def f(x):\n  import os, struct\n"
             "  os.write(3, (struct.pack('=I', 4) + b'Vtrue') * 1000)\n  os._exit(0)")
    scorer.score(task, forge)
    assert share(scorer.score(task, "def f(x): return False")) == 0.0


def test_children_share_no_secret(scorer):
    """An answer that runs right after the hidden code finds no trace of it in its own memory."""
    code = ("def f(x):\n  import gc\n"
            "  return sum('1937-epocs' in str(o)[::-1]\n"
            "             for o in gc.get_objects() if type(o) in (tuple, list, dict))")
    scorer.expected_results.clear()
    scorer.score(TASK, RIGHT)
    assert scorer.zygotes[1].run({"fixed": code}, ["f(1)"], 2.0)["fixed"] == [("value", b"0")]


def test_no_descriptor_leaks_into_a_child():
    """Even if the scorer has hundreds open and the zygote's own socket has a high number."""
    files = [open(__file__) for _ in range(300)]
    zygote = sandbox.Zygote()
    code = ("def f(n):\n  import os\n  found = []\n  for fd in range(n):\n    try:\n"
            "      os.fstat(fd)\n      found.append(fd)\n    except OSError:\n      pass\n"
            "  return found")
    outcomes = zygote.run({"fixed": code}, ["f(2000)"], 3.0)["fixed"]
    assert outcomes == [("value", b'[0, 1, 2, 3, ["list", 4]]')]
    zygote.close()
    assert len(files) == 300


def test_killed_zygotes_come_back(scorer):
    for zygote in scorer.zygotes:
        os.kill(zygote.process.pid, signal.SIGKILL)
    scorer.expected_results.clear()
    assert_still_scores(scorer)


def test_zygote_killed_mid_answer(scorer):
    first_pid = scorer.zygotes[1].process.pid
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {first_pid}"])
    code = "import time\ndef f(x):\n    time.sleep(0.4)\n    return x"
    outcomes = scorer.zygotes[1].run({"fixed": code}, ["f(1)", "f(2)", "f(3)"], 2.0)["fixed"]
    killer.wait()
    assert outcomes == [("value", b"1"), ("value", b"2"), ("value", b"3")]
    assert scorer.zygotes[1].process.pid != first_pid


@pytest.mark.slow
def test_stopped_zygote_does_not_hang_the_scorer(scorer, monkeypatch):
    monkeypatch.setattr(sandbox, "PREPARE_S", 0.5)
    zygote = scorer.zygotes[1]
    says = zygote.says
    monkeypatch.setattr(zygote, "says",
                        lambda expected, seconds: says(expected, min(seconds, 5.0)))
    os.kill(zygote.process.pid, signal.SIGSTOP)
    start = time.monotonic()
    outcomes = zygote.run({"fixed": "def f(x): return 1"}, ["f(1)"], 0.5)
    assert time.monotonic() - start < 10 and outcomes["fixed"][0][0] == "timed out"
    assert_still_scores(scorer)


def run_python(code, **kwargs):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=60, **kwargs)


def alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_nothing_outlives_a_killed_scorer():
    code = """if True:
        import threading, time
        from colbench.env.backend.score import Scorer
        scorer = Scorer(workers=1)
        task = {"ground_truth": "def f(x): return 1",
                "test_cases": {str(i): "f(1)" for i in range(50)}}
        answer = "while True: pass\\ndef f(x): pass"
        threading.Thread(target=scorer.score, args=(task, answer), daemon=True).start()
        time.sleep(0.5)
        print(*[zygote.process.pid for zygote in scorer.zygotes], flush=True)
        time.sleep(60)"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                               text=True)
    pids = [int(pid) for pid in process.stdout.readline().split()]
    children = [int(child) for pid in pids
                for child in open(f"/proc/{pid}/task/{pid}/children").read().split()]
    assert len(pids) == 2 and len(children) == 1 and all(map(alive, pids + children))
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while any(map(alive, pids + children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids + children))


def filtered(numbers, code):
    """Run code in a Python without some system calls (ENOSYS): an old kernel or a container."""
    lines = [(0x20, 0, 0, 0)]
    for number in numbers:
        lines += [(0x15, 0, 1, number), (0x06, 0, 0, 0x50026)]
    program = b"".join(struct.pack("HBBI", *line) for line in lines + [(0x06, 0, 0, 0x7FFF0000)])
    deny = "from colbench.env.backend import sandbox\nsandbox.LIBC.prctl(38, 1, 0, 0, 0)\n"
    deny += f"assert sandbox.seccomp({program!r})\n"
    return run_python(deny + code)


LANDLOCK, SECCOMP = (444, 445, 446), {"x86_64": 317, "aarch64": 277}.get(platform.machine())
REPORT = """
from colbench.env.backend.score import Scorer, share
task = {"ground_truth": "def f(x): return x + 1", "test_cases": {"a": "f(1)", "b": "f(2)"}}
with Scorer(workers=1%s) as scorer:
    print(scorer.tier, *[share(scorer.score(task, f"def f(x): return x + {k}")) for k in (1, 0)])
    print([scorer.zygotes[1].run({"fixed": code}, ["f(1)"], 3.0)["fixed"][0][0] for code in %r])
"""


def test_without_landlock_the_rest_holds(bait):
    codes = [escape_code(ESCAPES[name], bait) for name in ESCAPES]
    done = filtered(LANDLOCK, REPORT % ("", codes))
    assert done.stdout.startswith("seccomp-only 1.0 0.0\n"), done.stdout + done.stderr
    assert set(eval(done.stdout.split("\n")[1])) <= {"raised", "died"}
    assert "sandbox: seccomp-only" in done.stderr
    assert_unharmed(bait)


def test_without_seccomp_it_refuses():
    done = filtered([SECCOMP], REPORT % ("", []))
    assert done.returncode != 0
    assert "UserError: the sandbox is not safe here" in done.stderr.strip().split("\n")[-1]
    done = filtered([SECCOMP], REPORT % (", allow_weak=True", []))
    assert done.stdout.startswith("weak 1.0 0.0\n") and "sandbox: weak" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"),
                    reason="needs root and setpriv to become another user")
def test_as_an_ordinary_user(bait):
    """The same layers without any privilege."""
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        shutil.copytree(ROOT / "colbench", folder / "colbench",
                        ignore=shutil.ignore_patterns("__pycache__"))
        pythons = [sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"]
        check = ("import os, sys; "
                 "sys.exit(sys.version_info < (3, 10) or not os.access(sys.executable, os.X_OK))")
        usable = [python for python in pythons if subprocess.run(
            [*user, python, "-c", check], capture_output=True).returncode == 0]
        if not usable:
            pytest.skip("no interpreter that user 65534 may run")
        # the limit on threads counts the whole user
        names = [name for name in ESCAPES if name != "500 threads"]
        codes = [escape_code(ESCAPES[name].replace("<pid>", str(bait["canary"])), bait)
                 for name in names]
        done = subprocess.run([*user, usable[0], "-B", "-c", REPORT % ("", codes)], cwd=folder,
                              capture_output=True, text=True, env={"PATH": os.environ["PATH"]},
                              timeout=60)
        assert done.stdout.startswith("strict 1.0 0.0\n"), done.stdout + done.stderr
        outcomes = eval(done.stdout.split("\n")[1])
        assert [n for n, outcome in zip(names, outcomes) if outcome not in ("raised", "died")] == []
        assert_unharmed(bait)
    finally:
        shutil.rmtree(folder)


CONTAINERS = {  # what other machines and containers take from root or an ordinary user
    "root without capabilities": ["setpriv", "--bounding-set=-all", "--inh-caps=-all"],
    "root without new privileges": ["setpriv", "--no-new-privs"],
    "root of a user namespace": ["unshare", "--user", "--map-root-user"],
    "a user namespace with its own processes":
        ["unshare", "--user", "--map-root-user", "--pid", "--fork",
                                                "--mount-proc"],
    "nobody of a user namespace": ["unshare", "--user"],
    "few processes": ["prlimit", "--nproc=200:200"],
    "few descriptors": ["prlimit", "--nofile=64:64"],
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_in_a_container(name, bait):
    wrapper = CONTAINERS[name]
    if subprocess.run([*wrapper, sys.executable, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"{wrapper[0]} cannot do this here")
    names = [n for n in ESCAPES if n != "500 threads"]
    codes = [escape_code(ESCAPES[n].replace("<pid>", "1"), bait) for n in names]
    done = subprocess.run([*wrapper, sys.executable, "-c", REPORT % ("", codes)], cwd=ROOT,
                          capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("strict 1.0 0.0\n"), done.stdout + done.stderr
    outcomes = eval(done.stdout.split("\n")[1])
    assert [n for n, outcome in zip(names, outcomes) if outcome not in ("raised", "died")] == []
    assert_unharmed(bait)


def test_behind_the_filter_of_a_container_engine(bait):
    """Common engines refuse an unprivileged process namespaces, mounts, tracing and more."""
    numbers = {"x86_64": [101, 155, 161, 165, 166, 246, 248, 249, 250, 272, 298, 304, 308, 310, 311,
                          321, 323, 425, 435],
               "aarch64": [39, 40, 41, 51, 97, 104, 117, 217, 218, 219, 241, 265, 268, 270, 271,
                           280, 282, 425, 435]}
    codes = [escape_code(ESCAPES["read the canary"], bait)]
    done = filtered(numbers[platform.machine()], REPORT % ("", codes))
    assert done.stdout == "strict 1.0 0.0\n['raised']\n", done.stdout + done.stderr
    assert done.stderr.count("sandbox: strict") == 1


def short_id(value):
    """Return a test id that is the same in every process."""
    return ascii(sorted(value, key=ascii) if isinstance(value, set) else value)[:20]


@pytest.mark.parametrize("value", [
    None, True, False, 0, -1, 2**53, -2**70, 10**4000, 0.1, -0.0, float("inf"), "", "plain",
    "é\0\n", "\ud800", "\ud83d\ude00", b"\xff", [], [1, [2, ["x"]]], (), (1, (2,)), {},
    {"a": {1: (2.5, None)}, (1, 2): []}, set(), {1, "a"}, frozenset({1}), range(1, 9, 2), 1 + 2j],
    ids=short_id)
def test_data_comes_back_the_same(value):
    back = sandbox.decode(json.loads(json.dumps(sandbox.encode(value))), None)
    assert back == value and type(back) is type(value)
    assert repr(back) == repr(value) or isinstance(value, (set, frozenset))


def test_forged_fraction_is_not_expanded():
    """Fraction("1e999999999") would fill the parent's memory; the data must hold two integers."""
    with pytest.raises(TypeError):
        sandbox.decode([["Fraction", "1e999999999"]], None)


@pytest.mark.parametrize("program", [
    [["list", -1]], [["list", 1]], [1, 2], [1, ["list", None]], [1, ["list", [1]]], {"a": 1},
    [{"a": 1}], [["exec", "1"]], [["list"]], [1, ["dict", 1]], [["list", 0], ["set", 1]],
    [["list", 10**30]], [1, ["list", 0.5]], [1, *[["tuple", 1]] * 50_000, ["set", 1]],
    [1, *[["frozenset", 1]] * 1000]], ids=lambda program: str(program)[:30])
def test_forged_programs_are_rejected(program):
    """They do not crash the parent either: hashing 50,000 nested tuples would."""
    with pytest.raises((ValueError, TypeError, KeyError)):
        sandbox.decode(program, None)


@pytest.mark.parametrize("array", [nested_list, OfficialArray])
def test_forged_array_is_not_expanded(array):
    forged = [10**9, ["tuple", 1], 0, 10**9, 1, ["range", 3], "int8", ["array", 3]]
    expected = read(("value", json.dumps(sandbox.encode([1])).encode()), array)
    assert judge(expected, ("value", json.dumps(forged).encode()), array) == "wrong"
