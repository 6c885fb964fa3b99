"""Verdicts of both modes.

The fixed mode is compared with hand-written verdicts, the official mode with a plain Python process
that works like the released evaluator.
"""
import collections
import datetime
import json
import pathlib
import subprocess
import sys
import threading
import types
import uuid
from collections import Counter, OrderedDict, deque
from decimal import Decimal
from fractions import Fraction

import pytest

from colbench.env.backend import sandbox
from colbench.env.backend.score import (
    OfficialArray,
    Scorer,
    judge,
    nested_list,
    read,
    share,
    success,
)

DOUBLE = {"ground_truth": "def f(x):\n    return x * 2",
          "test_cases": {"a": "f(1)", "b": "f(-3)", "c": "f(2.5)"}}
GOOD = "def f(x):\n    return x * 2"


@pytest.fixture(scope="module")
def scorer():
    with Scorer(workers=2) as it:
        yield it


def task(hidden_code, *calls):
    return {"ground_truth": hidden_code,
            "test_cases": {f"test{i}": call for i, call in enumerate(calls)}}


# ---- fixed mode: where the code is in the answer ------------------------------------------------
TICKS = "`" * 3
WRAPPINGS = {
    "bare": GOOD,
    "fence": f"{TICKS}python\n{GOOD}\n{TICKS}",
    "marker and fence": f"I WANT TO ANSWER:\n{TICKS}python\n{GOOD}\n{TICKS}",
    "marker on the fence's line": f"I WANT TO ANSWER: {TICKS}python\n{GOOD}\n{TICKS}",
    "marker on the code's line": f"I WANT TO ANSWER: {GOOD}",
    "prose before the marker": f"Thank you, that is clear.\n\nI WANT TO ANSWER:\n{GOOD}",
    "marker at the end": f"{GOOD}\nI WANT TO ANSWER:",
    "capital Python": f"{TICKS}Python\n{GOOD}\n{TICKS}",
    "py": f"{TICKS}py\n{GOOD}\n{TICKS}",
    "python3": f"{TICKS}python3\n{GOOD}\n{TICKS}",
    "fence without a language": f"Here:\n{TICKS}\n{GOOD}\n{TICKS}\nDone.",
    "tildes": f"~~~python\n{GOOD}\n~~~",
    "four ticks": f"`{TICKS}python\n{GOOD}\n`{TICKS}",
    "fence never closed": f"Here:\n{TICKS}python\n{GOOD}",
    "fence closed on the code's line": f"{TICKS}python\n{GOOD}{TICKS} That is all.",
    "all on one line": f"{TICKS}def f(x): return x * 2{TICKS}",
    "indented fence": "1. This:\n   " + f"{TICKS}python\n{GOOD}\n{TICKS}".replace("\n", "\n   "),
    "CRLF": f"Here:\r\n{TICKS}python\r\n" + GOOD.replace("\n", "\r\n") + f"\r\n{TICKS}\r\n",
    "old Mac line ends": GOOD.replace("\n", "\r"),
    "byte order mark": "\ufeff" + GOOD,
    "byte order mark in the fence": f"{TICKS}python\n\ufeff{GOOD}\n{TICKS}",
    "tabs": "def f(x):\n\tif x:\n\t\treturn x * 2\n\treturn 0",
    "indented as a whole": "    def f(x):\n        return x * 2",
    "prose without a fence":
        f"Here is the function.\n\n{GOOD}\n\nIt doubles its argument, doesn't it?",
    "prose with quotes": f'I\'d say "this":\n{GOOD}\nfrom here on it\'s yours.',
    "helper in an earlier fence":
        f"{TICKS}python\ndef two():\n    return 2\n{TICKS}\nand\n{TICKS}python\ndef f(x):\n"
        f"    return x * two()\n"
        f"{TICKS}",
    "imports in an earlier fence":
        f"{TICKS}\nimport math\n{TICKS}\n{TICKS}\ndef f(x):\n    return x * math.floor(2.5)\n"
        f"{TICKS}",
    "a draft first":
        f"{TICKS}python\ndef f(x):\n    return x\n{TICKS}\nOn second thought:\n{TICKS}python\n"
        f"{GOOD}\n{TICKS}",
    "an example that fails after":
        f"{TICKS}python\n{GOOD}\n{TICKS}\nUse:\n{TICKS}python\nprint(f(undefined))\n{TICKS}",
    "shell and output fences":
        f"{TICKS}bash\npip install x\n{TICKS}\n{TICKS}python\n{GOOD}\n{TICKS}\n{TICKS}\n2\n4\n"
        f"{TICKS}",
    "JSON fence first": f'{TICKS}json\n{{"f": 1}}\n{TICKS}\n{TICKS}python\n{GOOD}\n{TICKS}',
    "fence inside a docstring":
        f'{TICKS}python\ndef f(x):\n    """Use:\n    >>> f(1)  # {TICKS}x{TICKS}\n    """\n'
        f'    return x * 2\n{TICKS}',
    "prose inside the fence's line": f"The code {TICKS}python\n{GOOD}\n{TICKS} is above.",
    **{f"stray {word!r}": f"{word}\n{GOOD}" for word in (
        "assistant", "python", "Sure", "Sure, here", "Python:", "f", "f(1)", "None", "return",
        "break", "await it", "Note: this", "raise ValueError", "assert f(1) == 2",
        "import no_such_module", "x = undefined", "exit()", "class A(Undefined): pass",
        "python\nfrom __future__ import annotations", "import math\nok")},
    **{f"{words!r} on the code's line": f"{words} {GOOD}"
       for words in ("assistant", "Answer:", "Here's f (short):")},
    "language and code on the fence's line": f"{TICKS}python {GOOD}\n{TICKS}",
    "indented below prose": "Sure:\n\n    " + GOOD.replace("\n", "\n    ") + "\n\nDone.",
    "examples that fail in between":
        "def f(x):\n    return g(x)\nprint(f(1))\nassert f(1) == 3\ndef g(x):\n    return x * 2",
    **{f"stub later: {stub!r}":
       f"{TICKS}python\n{GOOD}\n{TICKS}\nIts signature:\n{TICKS}python\n{stub}\n{TICKS}"
       for stub in (
           "def f(x): ...", 'def f(x):\n    """Doubles x."""', "def f(x):\n    'x'\n    pass",
           "def f(x):\n    raise NotImplementedError('later')", "class f: ...",
           "async def f(x):\n    raise NotImplementedError",
           "def f(x):\n    # your code\n    return None",
           "from typing import overload\n@overload\ndef f(x: int) -> int: ...")},
    "stub in the same block": f"{GOOD}\n\ndef f(x): ...",
    "stub of a lambda": "f = lambda x: x * 2\ndef f(x): ...",
    "stub of a class":
        "class D:\n    def run(self, x):\n        return x * 2\ndef f(x):\n    return D().run(x)\n"
        "class D:\n    'Doubles.'\n    def run(self, x):\n        raise NotImplementedError\n"
        "    def more(self): pass",
    "stub first, in a fence, the code in prose":
        f"{TICKS}python\ndef f(x): ...\n{TICKS}\nAnd now:\n{GOOD}",
    "stub first": f"def f(x): ...\n{GOOD}",
}


@pytest.mark.parametrize("name", WRAPPINGS)
def test_code_is_found(scorer, name):
    assert scorer.score(DOUBLE, WRAPPINGS[name])["fixed"]["calls"] == ["passed"] * 3


# ---- fixed mode: ways to write it ---------------------------------------------------------------
LEGITIMATE = {
    "helper": "def g(x):\n    return x + x\ndef f(x):\n    return g(x)",
    "helper below": "def f(x):\n    return g(x)\ndef g(x):\n    return x + x",
    "import": "import math\ndef f(x):\n    return math.ldexp(x, 1)",
    "from import": "from operator import mul\ndef f(x):\n    return mul(x, 2)",
    "star import": "from operator import *\ndef f(x):\n    return mul(x, 2)",
    "import os and sys":
        "import os, sys\ndef f(x):\n    return x * 2 if os.sep and sys.path is not None else None",
    "module that is missing, unused":
        "try:\n    import no_such_module\nexcept ImportError:\n    pass\n" + GOOD,
    "late stdlib import":
        "def f(x):\n    import xml.dom.minidom, colorsys, sched\n    return x * 2",
    "constant": "TWO = 2\ndef f(x):\n    return x * TWO",
    "global": "count = 0\ndef f(x):\n    global count\n    count += 2\n    return x * count",
    "recursion": "def f(x, n=2):\n    return 0 if n == 0 else x + f(x, n - 1)",
    "lambda": "f = lambda x: x * 2",
    "class": "class Doubler:\n    def __call__(self, x):\n        return x * 2\nf = Doubler()",
    "classes that inherit":
        "class A:\n    k = 2\nclass B(A):\n    def run(self, x):\n        return super().k * x\n"
        "def f(x):\n"
        "    return B().run(x)",
    "decorator":
        "import functools\ndef d(g):\n    @functools.wraps(g)\n    def h(*a):\n"
        "        return g(*a) * 2\n"
        "    return h\n@d\ndef f(x):\n    return x",
    "lru_cache": "from functools import lru_cache\n@lru_cache(None)\ndef f(x):\n    return x * 2",
    "dataclass":
        "from dataclasses import dataclass, field\n@dataclass\nclass P:\n    x: float\n"
        "    k: list = field(default_factory=lambda: [2])\ndef f(x):\n"
        "    return P(x).x * P(x).k[0]",
    "dataclass with slots and future":
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass(slots=True)\n"
        "class P:\n    x: float\ndef f(x: float) -> float:\n    return P(x).x * 2",
    "typing":
        "from typing import List, Optional, Union, TypeVar\nT = TypeVar('T')\n"
        "def f(x: Union[int, float], y: Optional[List[T]] = None) -> float:\n    return x * 2",
    "NamedTuple":
        "from typing import NamedTuple\nclass P(NamedTuple):\n    x: float\ndef f(x):\n"
        "    return P(x).x * 2",
    "enum":
        "from enum import Enum\nclass K(Enum):\n    TWO = 2\ndef f(x):\n    return x * K.TWO.value",
    "IntEnum result":
        "from enum import IntEnum\ndef f(x):\n    if x == 1:\n"
        "        return IntEnum('K', {'A': 2}).A\n"
        "    return x * 2",
    "asyncio":
        "import asyncio\nasync def g(x):\n    await asyncio.sleep(0)\n    return x * 2\ndef f(x):\n"
        "    return asyncio.run(g(x))",
    "asyncio and a thread":
        "import asyncio\ndef f(x):\n    async def g():\n"
        "        return await asyncio.to_thread(lambda: x * 2)\n"
        "    return asyncio.run(g())",
    "threads":
        "from concurrent.futures import ThreadPoolExecutor\ndef f(x):\n"
        "    with ThreadPoolExecutor(4) as pool:\n"
        "        return sum(pool.map(lambda _: x, range(2)))",
    "generator inside":
        "def f(x):\n    def g():\n        yield x\n        yield x\n    return sum(g())",
    "comprehensions": "k = [1, 1]\ndef f(x):\n    return sum(x for _ in k)",
    "comprehension at the top":
        "xs = [1, 1]\nys = [x + len(xs) - 1 for x in xs]\ndef f(x):\n    return x * ys[0]",
    "decorated without a body, later":
        "def d(g):\n    return lambda x: x * 2\ndef f(x):\n    return 0\n@d\n"
        "def f(x): ...",
    "subclass without a body, later":
        "class A:\n    k = 2\nclass B:\n    k = 3\nclass B(A): pass\ndef f(x):\n    return x * B.k",
    "import that fails, then without a body":
        "from no_such_module import g\ndef g(x): pass\ndef f(x):\n"
        "    return x * 2 if g(x) is None else 0",
    "overload later": GOOD + "\nfrom typing import overload\n@overload\ndef f(x: int) -> int: ...",
    "prose, decorated":
        "It's here.\n\ndef d(g):\n    return lambda x: g(x) * 2\n\n@d\ndef f(x):\n    return x\n\n"
        "That's it!",
    "prose, a constant first":
        "It's here:\n\nTWO = 2\n\ndef f(x):\n    return x * TWO\n\nThat's it!",
    "prose, what a module keeps":
        "It's here.\n\nn = []\ndef add():\n    n.append(1)\nadd()\ndef f(x):\n"
        "    return x * 2 * len(n)\n\nThat's it!",
    "match":
        "def f(x):\n    match x:\n        case 0:\n            return 0\n        case _:\n"
        "            return x * 2",
    "walrus": "def f(x):\n    if (y := x * 2) or True:\n        return y",
    "numpy": "import numpy as np\ndef f(x):\n    return np.multiply(x, 2)",
    "numpy result": "import numpy as np\ndef f(x):\n    return np.float64(x * 2)",
    "Decimal": "from decimal import Decimal\ndef f(x):\n    return Decimal(x) * 2",
    "Fraction": "from fractions import Fraction\ndef f(x):\n    return Fraction(x) * 2",
    "prints": "print('start')\ndef f(x):\n    print('x', x, flush=True)\n    return x * 2",
    "main with input": GOOD + "\nif __name__ == '__main__':\n    print(f(float(input('x? '))))",
    "input at the top": GOOD + "\nx = float(input('x? '))\nprint(f(x))",
    "tests below": GOOD + "\nassert f(1) == 2\nprint('ok')",
    "test below that fails": GOOD + "\nassert f(1) == 3, 'oh'",
    "exit below": GOOD + "\nimport sys\nsys.exit(0)",
    "unittest below": GOOD + "\nimport unittest\nclass T(unittest.TestCase):\n    def test(self):\n"
                      "        self.assertEqual(f(1), 2)\nif __name__ == '__main__':\n"
                      "    unittest.main()",
    "doctest":
        "def f(x):\n    '''\n    >>> f(1)\n    2\n    '''\n    return x * 2\nimport doctest\n"
        "doctest.testmod()",
    "logging":
        "import logging\nlogging.basicConfig(level=logging.INFO)\n"
        "log = logging.getLogger(__name__)\ndef f(x):\n"
        "    log.info('%s', x)\n    return x * 2",
    "warnings": "import warnings\ndef f(x):\n    warnings.warn('careful')\n    return x * 2",
    "argparse unused": "import argparse\n" + GOOD,
    "pickle and copy of own class":
        "import copy, pickle\nclass P:\n    def __init__(self, x):\n        self.x = x\ndef f(x):\n"
        "    return pickle.loads(pickle.dumps(copy.deepcopy(P(x)))).x * 2",
    "inspect and frames":
        "import inspect\ndef f(x):\n"
        "    return x * len(inspect.signature(lambda a, b: 0).parameters)",
    "recursion limit":
        "import sys\nsys.setrecursionlimit(5000)\ndef g(n):\n"
        "    return 0 if n == 0 else 1 + g(n - 1)\n"
        "def f(x):\n    return x * 2 if g(3000) == 3000 else None",
    "eval and exec":
        "def f(x):\n    names = {}\n    exec('k = 2', names)\n"
        "    return eval('x * k', {'x': x, **names})",
    "unicode names": "π = 2\ndef f(x):\n    return x * π",
    "semicolons and one-liners": "import math; k = 2\ndef f(x): y = x * k; return y",
    "default that changes":
        "def f(x, seen=[]):\n    seen.append(x)\n    return 2 * x if len(seen) == 1 else None",
    "redefined": "def f(x):\n    return 0\ndef f(x):\n    return x * 2",
    "keyword-only and star": "def f(*args, **kwargs):\n    return args[0] * 2",
    "context manager":
        "from contextlib import contextmanager\n@contextmanager\ndef c():\n    yield 2\ndef f(x):\n"
        "    with c() as k:\n        return x * k",
    "time zone data":
        "from zoneinfo import ZoneInfo\nfrom datetime import datetime\ndef f(x):\n"
        "    datetime(2024, 1, 1, tzinfo=ZoneInfo('UTC'))\n    datetime.strptime('2024', '%Y')\n"
        "    return x * 2",
    "subclass of list with a property":
        "class L(list):\n    @property\n    def double(self):\n        return self[0] * 2\n"
        "def f(x):\n"
        "    return L([x]).double",
}


@pytest.mark.parametrize("name", LEGITIMATE)
def test_legitimate_answer_passes(scorer, name):
    assert scorer.score(DOUBLE, LEGITIMATE[name])["fixed"]["calls"] == ["passed"] * 3


# ---- fixed mode: results ------------------------------------------------------------------------
EQUAL = [  # (hidden code, answer, verdict); the first two are expressions that f() returns
    ("1", "True", "passed"), ("1", "1.0", "passed"), ("0.0", "-0.0", "passed"),
    ("'a'", "b'a'", "wrong"),
    ("(1, 2)", "[1, 2]", "wrong"), ("[1, 2]", "(1, 2)", "wrong"),
    ("{1, 2}", "frozenset({2, 1})", "passed"),
    ("{'a': 1, 'b': 2}", "{'b': 2, 'a': 1}", "passed"), ("[]", "[]", "passed"),
    ("0", "None", "wrong"),
    ("None", "None", "no reference value"), ("1 / 0", "1", "no reference value"),
    ("(i for i in [])", "1", "no reference value"),
    ("__import__('no_such')", "1", "no reference value"), ("lambda: 1", "1", "no reference value"),
    ("1", "1 / 0", "raised"), ("1", "lambda: 1", "refused"),
    ("1", "__import__('os')._exit(0)", "died"),
    ("float('nan')", "float('nan')", "wrong"), ("[float('nan')]", "[float('nan')]", "wrong"),
    ("float('inf')", "10.0 ** 400 if 0 else float('inf')", "passed"),
    ("2 ** 200", "2 ** 200", "passed"),
    ("2 ** 53 + 1", "float(2 ** 53)", "wrong"), ("'\\ud83d\\ude00'", "'\\U0001f600'", "wrong"),
    ("'é'", "'e\\u0301'", "wrong"),
    ("__import__('collections').Counter('aab')", "{'a': 2, 'b': 1}", "passed"),
    ("__import__('collections').OrderedDict(a=1, b=2)",
     "__import__('collections').OrderedDict(b=2, a=1)", "wrong"),
    ("__import__('collections').OrderedDict(a=1, b=2)", "{'b': 2, 'a': 1}", "passed"),
    ("__import__('collections').Counter(a=1, b=0)", "__import__('collections').Counter(a=1)",
     "passed"),
    ("__import__('collections').Counter(a=1, b=0)", "{'a': 1}", "wrong"),
    ("__import__('numpy').float32(0.1)", "0.1", "passed"),
    ("[__import__('numpy').float16(0.1)]", "[0.1]", "passed"),
    ("__import__('numpy').float32(0.1)", "__import__('numpy').float64(0.1)", "wrong"),
    ("__import__('collections').defaultdict(list, a=[1])", "{'a': [1]}", "passed"),
    ("__import__('collections').deque([1])", "__import__('collections').deque([1], maxlen=3)",
     "passed"),
    ("__import__('collections').deque([1])", "[1]", "wrong"), ("range(3)", "range(0, 3)", "passed"),
    ("{1: 2}.keys()", "{1: 3}.keys()", "passed"), ("{1: 2}.items()", "{(1, 2)}", "passed"),
    ("int", "int", "passed"),
    ("int", "'int'", "wrong"), ("[int, str]", "[int, str]", "passed"),
    ("1 + 2j", "complex(1, 2)", "passed"),
    ("bytearray(b'a')", "b'a'", "passed"), ("__import__('decimal').Decimal('1.0')", "1", "passed"),
    ("__import__('decimal').Decimal('0.1')", "0.1", "wrong"),
    ("__import__('fractions').Fraction(1, 2)", "0.5", "passed"),
    ("__import__('datetime').date(2024, 1, 2)", "__import__('datetime').date(2024, 1, 2)",
     "passed"),
    ("__import__('datetime').datetime(2024, 1, 2)", "__import__('datetime').date(2024, 1, 2)",
     "wrong"),
    ("__import__('datetime').datetime(2024, 1, 2, 3, tzinfo=__import__('datetime').timezone.utc)",
     "__import__('datetime').datetime(2024, 1, 2, 5, tzinfo=__import__('datetime').timezone("
     "__import__('datetime').timedelta(hours=2)))", "passed"),
    ("__import__('datetime').time(1, 2)", "__import__('datetime').time(1, 2)", "passed"),
    ("__import__('datetime').timedelta(days=1)", "__import__('datetime').timedelta(hours=24)",
     "passed"),
    ("set('ab')", "set('ba')", "passed"),
    ("list(set('abcdefg'))", "list(set('abcdefg'))", "passed"),  # the same hash seed
    ("__import__('random').random()", "__import__('random').random()", "passed"),  # the same seed
    ("__import__('numpy').random.rand()", "__import__('numpy').random.rand()", "passed"),
    ("__import__('numpy').array([1, 2])", "__import__('numpy').array([1.0, 2.0])", "passed"),
    ("__import__('numpy').array([1, 2])", "__import__('numpy').array([1, 3])", "wrong"),
    ("__import__('numpy').array([1, 2])", "[1, 2]", "passed"),
    ("__import__('numpy').array([1, 2])", "1", "wrong"),
    ("(__import__('numpy').eye(2), 3)", "(__import__('numpy').eye(2), 3)", "passed"),
    ("{'a': __import__('numpy').zeros((2, 0))}", "{'a': __import__('numpy').zeros((2, 0))}",
     "passed"),
    ("__import__('numpy').int64(3)", "3", "passed"),
    ("3", "__import__('numpy').float64(3)", "passed"),
    ("True", "__import__('numpy').bool_(True)", "passed"),
    ("'a'", "__import__('numpy').str_('a')", "passed"),
    ("__import__('numpy').array(5)", "5", "passed"),
    ("__import__('numpy').datetime64('2024-01-02')", "__import__('datetime').date(2024, 1, 2)",
     "passed"),
    ("'a'", "__import__('enum').Enum('K', {'A': 'a'}, type=str).A", "passed"),
    ("'K.A'", "__import__('enum').Enum('K', {'A': 'a'}, type=str).A", "wrong"),
    ("'x'", "type('S', (str,), {'__str__': lambda self: 'x'})('a')", "wrong"),
    ("__import__('types').MappingProxyType(__import__('collections').OrderedDict(a=1, b=2))",
     "__import__('collections').OrderedDict(b=2, a=1)", "wrong"),
    ("__import__('types').MappingProxyType(__import__('collections').Counter(a=1, b=0))",
     "__import__('collections').Counter(a=1)", "passed"),
    ("b'ac'", "memoryview(b'abcd')[::2]", "passed"),
    ("b'da'", "memoryview(b'abcd')[::-3]", "passed"),
    ("b'a'", "memoryview(b'a').cast('c')", "refused"),
    ("b'\\1\\0'", "memoryview(__import__('array').array('h', [1]))", "refused"),
    ("__import__('collections').Counter("
     "a=__import__('numpy').int64(1), b=__import__('numpy').int8(0))",
     "__import__('collections').Counter(a=1)", "passed"),
]


@pytest.mark.parametrize("hidden_code, answer, verdict", EQUAL)
def test_results_compare(scorer, hidden_code, answer, verdict):
    if "numpy" in hidden_code + answer:
        pytest.importorskip("numpy")
    made = [f"def f():\n    return {expression}" for expression in (hidden_code, answer)]
    assert scorer.score(task(made[0], "f()"), made[1])["fixed"]["calls"] == [verdict]


def values():
    """Values of every kind that leaves the sandbox; many are equal to others."""
    day, hours = datetime.datetime(2024, 1, 2), datetime.timedelta(hours=2)
    yield from (0, 1, True, 1.0, -0.0, 0.5, Decimal("0.5"), Fraction(1, 2), 1 + 0j, 0.5j, 2**53,
                2**53 + 1, 2.0**53, 0.1, Decimal("0.1"), "a", b"a", bytearray(b"a"),
                memoryview(b"a"), collections.UserString("a"), "1", None, [1], (1,), [True],
                collections.UserList([1.0]), collections.namedtuple("P", "x")(1), {1},
                frozenset({1.0}), deque([1]), deque([1], maxlen=4), range(0), range(2, 2),
                range(1, 2), slice(1), slice(None, 1, None), ..., {}, {1: 1}, {1: 2}.keys(),
                {1: 3}.keys(), {1: 2}.items(), {(1, 2)}, {1: [2]}.items(), {1: [2.0]}.items(), int,
                float, [int], float("nan"), Decimal("nan"), 10**400)
    yield from (day, day.date(), day.replace(tzinfo=datetime.timezone.utc), day.time(), hours,
                (day + hours).replace(tzinfo=datetime.timezone(hours)), datetime.timedelta(0, 7200),
                datetime.timezone.utc, datetime.timezone(hours), uuid.UUID(int=1), uuid.UUID(int=2),
                pathlib.PurePosixPath("a/b"), pathlib.PurePosixPath("a//b"),
                types.SimpleNamespace(a=1),
                types.SimpleNamespace(a=True))
    for order in ("ab", "ba"):
        pairs = [(key, ord(key)) for key in order]
        for kind in (dict, OrderedDict, lambda pairs: Counter(dict(pairs)), collections.UserDict,
                     lambda pairs: collections.ChainMap(dict(pairs[:1]), dict(pairs[1:])),
                     lambda pairs: types.MappingProxyType(dict(pairs)),
                     lambda pairs: Counter({**dict(pairs), "c": 0}),
                     lambda pairs: collections.defaultdict(int, pairs),
                     lambda pairs: OrderedDict(pairs).keys()):
            yield kind(pairs)
    yield {"k": [1, (2, {3: {4}}, Counter())]}
    yield OrderedDict(k=[1.0, (Fraction(2), {3.0: frozenset({4})}, Counter(z=0))])


def numpy_values():
    numpy = pytest.importorskip("numpy")
    for name in ("float16", "float32", "float64", "complex64", "complex128"):
        yield from (getattr(numpy, name)(value)
                    for value in (0.1, 1, 2**11, float("inf"), float("nan")))
    for name in ("int8", "uint16", "int32", "int64", "uint64", "bool_"):
        yield getattr(numpy, name)(1)
    yield from (numpy.int64(2**53 + 1), numpy.uint64(2**63), numpy.str_("a"), numpy.bytes_(b"a"),
     2**63, 300, 1e300,
                {"a": numpy.float32(0.1)}, {"a": 0.1}, {numpy.int8(1)}, {numpy.float32(0.1)}, {0.1},
                2**11 + 0.5,
                (numpy.float32(0.1), "x"), (0.1, "x"), numpy.datetime64("2024-01-02"),
                numpy.timedelta64(2, "h"))


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("array", [nested_list, OfficialArray])
@pytest.mark.parametrize("more", [tuple, numpy_values])
def test_equal_is_what_python_calls_equal(array, more):
    """Every pair, by Python's own == here and by the data that leaves the sandbox."""
    both = [(value, ("value", json.dumps(sandbox.encode(value)).encode()))
            for value in [*values(), *more()]]
    wrong = []
    for a, a_sent in both:
        for b, b_sent in both:
            try:
                equal = a == b
                if getattr(equal, "shape", ()) and array is nested_list:
                    equal = False  # a number and a list of one
                equal = bool(equal) and a is not None
            except Exception:  # overflow, ambiguous truth value, no hash: never passes
                equal = False
            if (judge(read(a_sent, array), b_sent, array) == "passed") != equal:
                wrong.append((a, b, equal))
    assert wrong == [] and len(both) > 80


@pytest.mark.parametrize("kind", ["[v]", "(v, 1)", "{'a': v}", "frozenset([v])", "{(1, 2): [v]}",
                                  "__import__('collections').deque([v])"])
def test_nested_results(scorer, kind):
    """Valid as deep as Python can compare; deeper ones are refused, and the scorer continues."""
    code = ("def f(depth, last):\n    v = last\n    for _ in range(depth):\n"
            "        v = " + kind + "\n    return v")
    deep = task(code, "f(300, 1)", "f(440, 1)", "f(5000, 1)", "f(60_000, 1)")
    result = scorer.score(deep, code)
    assert result["fixed"]["calls"] == ["passed"] * 2 + ["no reference value"] * 2
    assert result["official"]["passed"] == 2
    other = code.replace("v = last", "v = last + 1")
    result = scorer.score(deep, other)
    assert result["fixed"]["calls"] == ["wrong"] * 2 + ["no reference value"] * 2
    flat = task("def f(depth, last):\n    return 1", "f(5000, 1)", "f(60_000, 1)")
    assert scorer.score(flat, code)["fixed"]["calls"] == ["refused"] * 2


def test_partial_credit_and_helpers(scorer):
    code = "def f(x):\n    if x == -3:\n        raise ValueError\n    return 2"
    result = scorer.score(DOUBLE, code)
    assert result == {"fixed": {"passed": 1, "total": 3, "calls": ["passed", "raised", "wrong"],
                                "expected": ["2", "-6", "5.0"], "got": ["2", None, "2"]},
                      "official": {"passed": 1, "total": 3}, "sandbox": scorer.tier}
    assert share(result) == share(result, "official") == 1 / 3 and not success(result)
    assert success(scorer.score(DOUBLE, GOOD)) and success(scorer.score(DOUBLE, GOOD), "official")


def test_what_is_shown_of_results(scorer):
    """Short, the same in every process (sets), and never an object's own __repr__."""
    hidden_code = (
        "def f(k):\n"
        "    return [{'b', 'a', 'c'}, {frozenset('xy'), frozenset('ab')}, 'x' * 10 ** 4,\n"
        "            10 ** 5000,\n"
        "            list(range(99)), {'k': (1.5, None)}, 'a' * 10 ** 5, set(), frozenset()][k]")
    answer = ("class S(str):\n    def __repr__(self):\n        return '<script>'\n"
              "def f(k):\n    return S('plain')")
    result = scorer.score(task(hidden_code, *(f"f({k})" for k in range(9))), answer)["fixed"]
    a, b, long, digits, many, nested, huge, empty, frozen = result["expected"]
    assert a == "{'a', 'b', 'c'}" and b == "{frozenset({'a', 'b'}), frozenset({'x', 'y'})}"
    assert (empty, frozen) == ("set()", "frozenset()")
    assert nested == "{'k': (1.5, None)}" and many.startswith("[0, 1, 2") and many.endswith("...]")
    assert len(long) <= 200 and "..." in long and len(digits) <= 200 and "bytes" in huge
    assert result["got"] == ["'plain'"] * 9


def test_timeouts_are_per_call(scorer):
    looping = "def f(x):\n    while x == 1:\n        pass\n    return x * 2"
    result = scorer.score(DOUBLE, looping)
    assert result["fixed"]["calls"] == ["timed out", "passed", "passed"]
    assert result["official"]["passed"] == 2


@pytest.mark.parametrize("answer, note", [
    (None, "no answer"), ("", None), ("I WANT TO ANSWER:", None), ("I do not know.", None),
    ("def f(x: return", None),
    ("def g(x):\n    return x * 2", None),
    ("# " + "x" * 200_000 + "\n" + GOOD, "the answer is longer than 200000 bytes"),
    ("é" * 100_001, "the answer is longer than 200000 bytes"), (f"{TICKS}python\n{TICKS}", None)])
def test_no_code_scores_zero(scorer, answer, note):
    result = scorer.score(DOUBLE, answer)
    assert result["fixed"]["passed"] == result["official"]["passed"] == 0
    assert result.get("note") == note


def test_long_answer_within_the_limit(scorer):
    assert success(scorer.score(DOUBLE, "# " + "x" * 190_000 + "\n" + GOOD))


def test_truncated_code_is_not_patched_up(scorer):
    answer = "Here it is:\ndef f(x):\n    y = x * 2\n    return y\n    if (x ="
    assert scorer.score(DOUBLE, answer)["fixed"]["calls"] == ["raised"] * 3


def test_task_without_calls(scorer):
    result = scorer.score(task(GOOD), GOOD)
    assert result["fixed"] == {"passed": 0, "total": 0, "calls": [], "expected": [], "got": []}
    assert share(result) == 0.0 and not success(result)


def test_calls_of_other_shapes(scorer):
    shapes = task("class P:\n    def __init__(self, x):\n        self.x = x\n    def up(self):\n"
                  "        return self.x + 1",
                  "P(1).up()", " P(2).x\n", "[P(3).x, P(4).up()]", "round(P(0.5).up(), 1)",
                  "P(1).up() == 2", "P(")
    result = scorer.score(shapes, shapes["ground_truth"])
    assert result["fixed"]["calls"] == ["passed"] * 5 + ["no reference value"]


def test_score_many_keeps_the_order(scorer):
    answers = [f"def f(x):\n    return x * 2 if x != {k} else {k}" for k in (1, -3, 2.5, 9)] * 15
    results = scorer.score_many((DOUBLE, answer) for answer in answers)
    scores = [result["fixed"] for result in results]
    first_wrong = [fixed["calls"].index("wrong") if fixed["passed"] < 3 else 3 for fixed in scores]
    assert first_wrong == [0, 1, 2, 3] * 15


def test_many_threads_at_once(scorer):
    wrong = []

    def work(k):
        own = task(f"def f(x):\n    return x + {k}", "f(1)", "f(2)")
        for _ in range(5):
            right = success(scorer.score(own, f"def f(x):\n    return {k} + x"))
            if not right or success(scorer.score(own, GOOD)):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(10, 18)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_scorer_made_in_a_thread_that_ended():
    made = []
    thread = threading.Thread(target=lambda: made.append(Scorer(workers=1)))
    thread.start()
    thread.join()
    with made[0] as scorer:
        assert success(scorer.score(DOUBLE, GOOD))


# ---- official mode against a process that works like the released evaluator ---------------------
EMULATOR = '''
import json, signal, sys
import multiprocessing
from queue import Empty

def outcome(source, call):
    function_definition, test_case = source, call
    try:
        exec(function_definition)
        return eval(test_case)
    except Exception:
        return None

def rate(hidden_code, answer, calls):
    for word in ("import os", "from os", "import sys", "from sys", "sudo", "transformers", "exit(",
                 "quit(", "argparse"):
        if word in answer:
            return 0
    if "`" * 3 + "python" in answer:
        answer = answer.split("`" * 3 + "python")[1].split("`" * 3)[0]
    if "`" * 3 in answer:
        answer = answer.split("`" * 3)[1].split("`" * 3)[0]
    count = 0
    for call in calls:
        expected = outcome(hidden_code, call)
        def late(*_):
            raise TimeoutError("late")
        signal.signal(signal.SIGALRM, late)
        signal.alarm(1)
        try:
            got = outcome(answer, call)
        except TimeoutError:
            got = None
        signal.alarm(0)
        try:
            if expected == got and expected is not None:
                count += 1
        except ValueError:
            pass
    return count

def main():
    out, sys.stdout = sys.stdout, open("/dev/null", "w")
    for hidden_code, answer, calls in json.load(sys.stdin):
        try:
            print(rate(hidden_code, answer, calls), file=out)
        except BaseException as error:  # ends the whole run there
            print(type(error).__name__, file=out)
'''
HIDDEN_CODES = {
    "plain": GOOD,
    "import at the top": "import math\ndef f(x):\n    return math.floor(x * 2)",
    "import inside": "def f(x):\n    import math\n    return math.ldexp(x, 1)",
    "helper": "def g(x):\n    return x * 2\ndef f(x):\n    return g(x)",
    "recursion": "def f(x):\n    return 0 if x < 1 else 2 + f(x - 1)",
    "class": "class P:\n    k = 2\ndef f(x):\n    return P.k * x",
    "gives None": "def f(x):\n    return None",
    "evaluator's names": "def f(x):\n    return signal.SIGALRM * 0 + x * 2",
    "exit": "def f(x):\n    exit(0)",
    "array": "def f(x):\n    import numpy as np\n    return np.array([x, x])",
    "array of one": "def f(x):\n    import numpy as np\n    return np.array([x * 2])",
    "array of one in a list":
        "def f(x):\n    import numpy as np\n    return [np.array([x * 2]), 1]",
    "numpy scalar": "def f(x):\n    import numpy as np\n    return np.float64(x * 2)",
    "default argument keeps it": "import math\ndef f(x, m=math):\n    return m.ldexp(x, 1)",
    "global statement": "def f(x):\n    global kept\n    kept = x * 2\n    return kept",
}
ANSWERS = {**{f"wrapped: {k}": v for k, v in WRAPPINGS.items()},
           **{f"written: {k}": v for k, v in LEGITIMATE.items()},
           **{f"hidden code: {k}": v for k, v in HIDDEN_CODES.items() if k != "exit"}}
ANSWERS.update({
    "empty": "", "no code": "I give up.", "sudo": f"# sudo\n{GOOD}",
    "sudo in prose": f"No sudo.\n{TICKS}python\n{GOOD}\n{TICKS}",
    "exit in a name": "def f(x):\n    def my_exit(): pass\n    return x * 2",
    "from sys": f"from system_x: none\n{GOOD}",
    "two python fences":
        f"{TICKS}python\ndef f(x):\n    return 0\n{TICKS}\n{TICKS}python\n{GOOD}\n{TICKS}",
    "plain then python": f"{TICKS}\nx = 1\n{TICKS}\n{TICKS}python\n{GOOD}\n{TICKS}",
    "three plain fences":
        f"{TICKS}\n{GOOD}\n{TICKS}\n{TICKS}\n1\n{TICKS}", "one tick fence": f"{TICKS}{GOOD}",
    "odd fences":
        f"a {TICKS} b {TICKS} c {TICKS}", "python word after": f"{TICKS}python {GOOD}\n{TICKS}",
    "catches the alarm":
        "def f(x):\n    try:\n        while x == 1:\n            pass\n    except Exception:\n"
        "        pass\n"
        "    return x * 2",
    "loop": "def f(x):\n    while x == 1:\n        pass\n    return x * 2",
    "sleep": "def f(x):\n    import time\n    time.sleep(1.3 if x == 1 else 0)\n    return x * 2",
    "loop at the top": "import time\ntime.sleep(0.4)\n" + GOOD,
    "reads evaluator's locals": "k = len(test_case) + len(function_definition)\n" + GOOD,
    "evaluator's locals in the function": "def f(x):\n    return test_case",
    "evaluator's modules":
        "def f(x):\n    return x * 2 if signal and multiprocessing and Empty else None",
    "comprehension over a name": "k = [1, 1]\nn = [i for i in k]\ndef f(x):\n    return x * 2",
    "comprehension with a name inside":
        "k = 2\ntry:\n    n = [k for i in range(2)]\nexcept NameError:\n    n = [1]\n"
        "def f(x, n=len(n)):\n"
        "    return x * n",
    "decorated by own": "def d(g):\n    return lambda x: g(x) * 2\n@d\ndef f(x):\n    return x",
    "own name":
        "def f(x):\n    return x * 2 if __name__.startswith('__main') is not None else None",
    "lambda in a default": "def f(x, g=lambda y: y * 2):\n    return g(x)",
    "state over calls by global":
        "def f(x):\n    global n\n    try:\n        n += 1\n    except NameError:\n        n = 1\n"
        "    return x * 2 if n > 1 else None",
    "state over calls by builtins":
        "def f(x):\n    import builtins\n    builtins.zz = getattr(builtins, 'zz', 0) + 1\n"
        "    return x * 2 if builtins.zz > 1 else None",
    "null byte": GOOD + "\0",
    "byte order mark": "\ufeff" + GOOD, "form feed": "\f" + GOOD,
    "tabs and spaces": "def f(x):\n\ty = 1\n        return x",
    "trailing backslash":
        GOOD + "\n\\", "array answer": "def f(x):\n    import numpy\n"
                                       "    return numpy.array([x * 2])",
    "array of two": "def f(x):\n    import numpy\n    return numpy.array([x, x])",
    "list of one": "def f(x):\n    return [x * 2]",
    "list of array": "def f(x):\n    import numpy\n    return [numpy.array([x * 2]), 1]",
    "nested list of one": "def f(x):\n    return [[x * 2]]",
    "array without dimension": "def f(x):\n    import numpy\n    return numpy.array(x * 2)",
    "empty array": "def f(x):\n    import numpy\n    return numpy.array([])",
    "text": "def f(x):\n    return str(x * 2)",
})
ANSWERS.update({f"modes differ: {name}": code for name, code in {  # or only look as if they do
    "raises": "def f(x):\n    return x * 2 if x > 0 else 1 / 0",
    "helper for some":
        "def g(x):\n    return x * 2\ndef f(x):\n    return g(x) if x == 1 else x * 2",
    "star import": "from math import *\ndef f(x):\n    return ldexp(x, 1)",
    "an example raises": f"{GOOD}\n1 / 0",
    "an example raises in a later fence":
        f"{TICKS}python\n{GOOD}\n{TICKS}\n{TICKS}python\n1 / 0\n{TICKS}",
    "another definition later":
        f"{TICKS}python\ndef f(x):\n    return x\n{TICKS}\n{TICKS}python\n{GOOD}\n{TICKS}",
    "evaluator's locals": "def f(x, n=len(test_case)):\n    return x * 2",
    "its own name": "def f(x):\n    return x * 2 if __name__ != 'answer' else None",
    "global":
        "def f(x):\n    global own\n    own = globals().get('own', 0) + 1\n"
        "    return x * 2 if own > 1 else 0",
    "global without a look":
        "def f(x):\n    global its\n    try:\n        its += 1\n    except NameError:\n"
        "        its = 1\n    return x * 2 if its > 1 else 0",
    "class that knows itself": f"class C:\n    def k(self):\n        return C\n{GOOD}",
    "class that uses a class": f"class C:\n    k = 2\nclass D:\n    k = C.k\n{GOOD}",
    "main": f"{GOOD}\nif __name__ == '__main__':\n    1 / 0",
    "what stays in a module":
        "def f(x):\n    import math\n    math.own = getattr(math, 'own', 0) + 1\n"
        "    return x * 2 if math.own > 1 else 0",
    "alarm caught":
        "def f(x):\n    try:\n        while x == -3: pass\n    except Exception: pass\n"
        "    return x * 2",
    "alarm caught by with":
        "def f(x):\n    from contextlib import suppress\n    with suppress(Exception):\n"
        "        while x == -3: pass\n    return x * 2",
    "frame of a generator":
        "def two():\n    return 2\ndef f(x):\n"
        "    return x * (0 for _ in ()).gi_frame.f_globals['two']()",
    "attribute from a string":
        "def two():\n    return 2\ndef f(x):\n"
        "    return x * getattr(lambda: 0, '__glo' 'bals__')['two']()",
    "attribute by a format":
        "def f(x):\n    g = (0 for _ in ())\n"
        "    return x * 2 if 'two' in '{0.gi_frame.f_globals}'.format(g) else 0\n"
        "two = 2",
    "attribute by a match":
        "def two():\n    return 2\ndef f(x):\n    match lambda: 0:\n"
        "        case object(__globals__=names):\n"
        "            return x * names['two']()",
    "else of main":
        "if __name__ == '__main__':\n    pass\nelse:\n    n = 2 if __name__ == 'answer' else 0\n"
        "def f(x, n=n):\n    return x * n",
    "annotation": "k = 2\ndef f(x: [k for _ in (1,)]):\n    return x * 2",
    "annotation of the evaluator's": "def f(x: test_case):\n    return x * 2",
    "import of what a module lacks": "from math import no_such\ndef f(x):\n    return x * 2",
    "random numbers of a module":
        "def f(x):\n    import statistics as s\n"
        "    return x * 2 if s.random.random() == 0.8444218515250481 else 0",
    "a later example sets a state":
        f"{TICKS}python\ndef f(x):\n    import math\n    return x * math.kept\n{TICKS}\n"
        f"{TICKS}python\nsetattr(__import__('math'), 'kept', 2)\n"
        f"{TICKS}",
    "a later example fills a default":
        f"{TICKS}python\ndef f(x, seen=[]):\n    seen.append(x)\n"
        f"    return x * 2 if len(seen) == 1 else 0\n{TICKS}\n"
        f"{TICKS}python\nprint(f(7))\n{TICKS}",
    "a stray word": f"python\n{GOOD}", "a stub later": f"{GOOD}\ndef f(x): ...",
}.items()})
PAIRS = [(HIDDEN_CODES["plain"], answer) for answer in ANSWERS.values()]
PAIRS += [(hidden_code, answer)
          for key, hidden_code in HIDDEN_CODES.items() if key not in ("plain", "exit")
          for answer in [GOOD, hidden_code, LEGITIMATE["import"], *(ANSWERS[name] for name in (
              "array answer", "array of two", "list of array", "list of one",
              "array without dimension"))]]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Return the released evaluator's score of each of PAIRS on DOUBLE's calls."""
    folder = tmp_path_factory.mktemp("evaluator")
    (folder / "evaluator.py").write_text(EMULATOR)  # a module, so that code sees no "__main__"
    calls = list(DOUBLE["test_cases"].values())
    command = [sys.executable, "-W", "ignore", "-c", "import evaluator; evaluator.main()"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60,
                          input=json.dumps([(*pair, calls) for pair in PAIRS]))
    assert len(done.stdout.split()) == len(PAIRS) >= 100, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="the released evaluator scores 0 there")
@pytest.mark.parametrize("slow_s", [pytest.param(sandbox.SLOW_S, id="as it is"),
                                    pytest.param(0, id="all are slow", marks=pytest.mark.slow)])
def test_official_mode_equals_the_released_evaluator(scorer, released, slow_s, monkeypatch):
    """`all are slow`: fixed goes first; official takes over its outcomes if the programs agree."""
    pytest.importorskip("numpy")
    monkeypatch.setattr(sandbox, "SLOW_S", slow_s)
    theirs, calls = released, list(DOUBLE["test_cases"].values())
    results = scorer.score_many((task(hidden_code, *calls), answer)
                                for hidden_code, answer in PAIRS)
    ours = [str(result["official"]["passed"]) for result in results]
    assert [(a, b, pair) for a, b, pair in zip(ours, theirs, PAIRS) if a != b] == []
    assert {"0", "3"} < set(theirs)


@pytest.mark.parametrize("answer", ["raise SystemExit\n" + GOOD, "def f(x):\n    raise SystemExit",
                                    "def f(x):\n    raise KeyboardInterrupt"])
def test_official_mode_survives_what_ends_the_released_evaluator(scorer, answer):
    assert scorer.score(DOUBLE, answer)["official"]["passed"] == 0


def test_official_mode_fails_hidden_code_with_a_module_level_import(scorer):
    code = HIDDEN_CODES["import at the top"]
    result = scorer.score(task(code, "f(1)"), code)
    assert result["fixed"]["passed"] == 1 and result["official"]["passed"] == 0
