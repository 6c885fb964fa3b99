"""Score answers to Backend Programming tasks.

The hidden code and the answer run on a task's test calls in the sandbox; the results are compared
here.

    with Scorer(workers=2) as scorer:
        result = scorer.score(task, answer)
    # {"fixed": {"passed": 8, "total": 10, "calls": ["passed", "wrong", ...],
    #            "expected": ["12", ...], "got": [...]},
    #  "official": {"passed": 7, "total": 10}, "sandbox": "strict"}
    # and "note" if the answer was not run

Every answer is scored in two modes:
  fixed     What the benchmark means: code may be anywhere in the answer and runs in one namespace.
  official  The released evaluator's numbers (sweet_rl 38daf2a, code_utils.check_correctness), on
            every Python version. An answer that contains one of BANNED scores 0. The code is the
            first ```python fence, else the first fence, else the whole text. It runs as if inside a
            function, so helpers, recursion and module-level imports fail, also in the hidden code.
            SIGALRM ends a call after 1 s.
            Not reproduced: state that code leaves in the evaluator for later answers; SystemExit,
            which ends the whole run there and fails one call here; code that catches the alarm,
            which may run for 1 s more here and forever there; an object whose own __eq__ returns
            True, which is not plain data and fails here.

Code in fixed mode: a module-level statement that raises or does not compile (a stray word before
the code, an example, input()) has no effect on the others. Definitions after it count, and a loop
after it uses up the call's second. A definition without a body (docstring, `...`, pass, return
None, NotImplementedError) does not replace one with a body.

Time: a call has 1 s in each mode, an answer has ANSWER_ALL_S for all calls, and calls that are not
reached count as timed out. Slow answers run the fixed mode first. The official mode then takes over
its outcomes if the code is one plain function in one piece, which cannot tell the modes apart
(`sandbox.alike`); otherwise it gets the time that is left. So if most calls are slow or hang, some
passes may be lost: those in official mode alone (code with helpers or examples, code that catches
the alarm, a slow first fence), and the last calls in fixed mode of an answer with many imports,
which are repeated after each call that hangs. The hidden code has HIDDEN_CODE_S and
HIDDEN_CODE_ALL_S in the same way.

In both modes a call passes if the results are equal by Python's ==. A call never counts if the
hidden code returns None, raises or returns something that is not plain data.
Equal in Python but not here:
  - a result that is not plain data (`sandbox.KINDS` and numpy's types): objects of user-defined
    classes, functions, classes that are not built in, modules, compiled patterns, array.array,
    memoryviews of anything but bytes, IP addresses, numpy's longdouble
  - a result above 1 MB, 100,000 values or 900 levels, or above four times the hidden code's bytes
    plus 4 kB
  - a NaN in a container, if Python finds the same object (math.nan) on both sides
  - numpy times in units that Python's types lack (nanoseconds); timedelta64 and an int
  - times with a zone, which become offsets from UTC: two in one zone that differ only in `fold`, or
    of which one is in the hour that the zone skips or repeats
  - Counters with a count that is not a number, which compare as dicts
In fixed mode numpy arrays compare as nested lists: equal arrays and lists pass, and a numpy number
does not equal a list of one.

`expected` and `got` are short texts of the results for people, None where there is no result.
"""
import json
import math
import os
import queue
import reprlib
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from colbench.env.backend import sandbox
from colbench.run.errors import UserError

MAX_ANSWER = 200_000      # bytes of UTF-8; longer answers score 0
CALL_S = 1                # wall seconds per call of an answer, as in the released evaluator
HIDDEN_CODE_S = 10.0      # the same for the hidden code, which has no limit there
ANSWER_ALL_S = 10.7       # wall seconds for all calls in both modes; 1 more per call above ten
HIDDEN_CODE_ALL_S = 22.0  # the same for the hidden code; 2 more per call above ten
SHOWN_WIRE = 20_000       # bytes of JSON; of a longer result only the size is shown
SHOWN = 200               # characters shown of a result
# numpy's; the data may be forged, and other types could be large
NUMBERS = {"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
           "float16", "float32", "float64", "complex64", "complex128"}
BANNED = ("import os", "from os", "import sys", "from sys", "sudo", "transformers", "exit(",
          "quit(", "argparse")


def official_code(answer):
    """Return the code that the released evaluator runs; None if a banned word makes it score 0."""
    if any(word in answer for word in BANNED):
        return None
    for fence in ("```python", "```"):
        if fence in answer:
            answer = answer.partition(fence)[2].partition("```")[0]
    return answer


class Number:
    """A numpy number. Compares with numbers by numpy's ==, with anything else by its value's ==."""

    def __init__(self, dtype, value):
        import numpy  # not at the top: the scorer also runs without numpy
        self.value = value
        self.numpy = numpy.dtype(dtype).type(value)

    def is_number(self):
        return True

    def __eq__(self, other):
        import numpy
        if not isinstance(other, (int, float, complex, Number)):
            return self.value == other
        with numpy.errstate(all="ignore"):
            return bool(self.numpy == (other.numpy if isinstance(other, Number) else other))

    def __hash__(self):  # for sets and keys
        return hash(self.value)

    def __repr__(self):
        return repr(self.value)


def number(dtype, value):
    """Return a Number for a numpy scalar's value; the value itself if its type is not a number."""
    return Number(dtype, value) if dtype in NUMBERS else value


class OfficialArray:
    """A numpy array or scalar in the released evaluator: == works only between single elements."""

    def __init__(self, shape, flat, dtype):
        self.flat = flat
        if len(flat) == 1:
            self.flat = [number(dtype, flat[0])]

    def is_number(self):
        return all(isinstance(item, (int, float, Number)) for item in self.flat)

    def __eq__(self, other):
        flat = other.flat if isinstance(other, OfficialArray) else [other]
        while len(flat) == 1 and isinstance(flat[0], (list, tuple, range, deque)):
            flat = [flat[0][0]] if len(flat[0]) == 1 else []
            if flat and isinstance(flat[0], OfficialArray):
                flat = flat[0].flat
            elif flat and type(flat[0]) in (int, float):  # a bare one would take the other's type
                flat = [number({int: "int64", float: "float64"}[type(flat[0])], flat[0])]
        if len(self.flat) != 1 or len(flat) != 1:
            raise ValueError("the truth value of an array with more than one element is ambiguous")
        return self.flat[0] == flat[0]

    def __hash__(self):
        return hash(self.flat[0])


def nested_list(shape, flat, dtype):
    """Return a numpy array (row-major `flat` values) as nested lists.

    An array without dimensions becomes its value, an empty one [].
    """
    if not shape:
        return number(dtype, flat[0])
    if not flat or type(flat) is not list or math.prod(shape) != len(flat):  # the last two: forged
        return []
    step = len(flat) // shape[0]
    return [nested_list(shape[1:], flat[i * step:(i + 1) * step], "")
            for i in range(shape[0])]


def read(outcome, array):
    """Return (value, bytes of its JSON) of the hidden code's outcome; None if it never counts."""
    kind, wire = outcome
    try:
        value = sandbox.decode(json.loads(wire), array) if kind == "value" else None
    except Exception:  # does not decode, such as a set of unhashable items
        return None
    return None if value is None else (value, len(wire))


class ShortRepr(reprlib.Repr):
    """Short texts of plain data: the same in every process, never an object's own __repr__."""

    def __init__(self):
        super().__init__()
        self.maxlist = self.maxtuple = self.maxdict = 20
        self.maxset = self.maxfrozenset = self.maxdeque = 20
        self.maxstring = self.maxlong = self.maxother = SHOWN

    def repr_set(self, value, level):  # the library's order may depend on the process's hash seed
        if not value:
            return "set()"
        items = ["..."]
        if level > 0:
            items = sorted(self.repr1(item, level - 1) for item in value)
        more = ", ..." if len(items) > self.maxset else ""
        return "{" + ", ".join(items[:self.maxset]) + more + "}"

    def repr_frozenset(self, value, level):
        return f"frozenset({self.repr_set(value, level) if value else ''})"

    repr_dict_keys = repr_dict_items = repr_set
    repr_OrderedDict = repr_Counter = reprlib.Repr.repr_dict
    repr_Deque = reprlib.Repr.repr_deque


def short_text(outcome):
    """Return a short text of an outcome's result (possibly forged); None if there is no result."""
    kind, wire = outcome
    if kind != "value":
        return None
    if len(wire) > SHOWN_WIRE:
        return f"(a result of {len(wire)} bytes)"
    try:
        text = ShortRepr().repr(sandbox.decode(json.loads(wire), nested_list))
    except Exception:  # an integer with too many digits, or a forged result
        return "(cannot be shown)"
    return text if len(text) <= SHOWN else text[:SHOWN - 3] + "..."


def judge(expected, outcome, array):
    """Return the verdict on one call.

    expected: from `read`. outcome: the answer's, from the sandbox, possibly forged.
    """
    kind, wire = outcome
    if expected is None:
        return "no reference value"
    if kind != "value":
        return kind
    value, size = expected
    if len(wire) > 4 * size + 4096:  # equal values have similar sizes; bounds what is decoded here
        return "wrong"
    try:
        return "passed" if value == sandbox.decode(json.loads(wire), array) else "wrong"
    except Exception:  # an array's ambiguous truth value, a signalling NaN, or a forged result
        return "wrong"


def run_hidden_code(zygote, texts, calls):
    """Call `Zygote.run` with the hidden code's time limits."""
    total = HIDDEN_CODE_ALL_S + 2 * max(len(calls) - 10, 0)
    return zygote.run(texts, calls, HIDDEN_CODE_S, total=total)


class Scorer:
    """Scores on `workers` warm sandboxes. Every method may be called from several threads.

    tier: how safe the sandbox is here (`sandbox.self_test`).
    """

    def __init__(self, workers=2, allow_weak=False):
        """Raises UserError if the sandbox is weak here and `allow_weak` is off."""
        if os.name == "nt":
            raise UserError("scoring runs model-written code, and Windows has no sandbox; "
                            "use Linux or WSL2")
        try:
            with ThreadPoolExecutor(workers + 1) as pool:  # one more process for the hidden code
                self.zygotes = list(pool.map(lambda _: sandbox.Zygote(), range(workers + 1)))
            self.tier, escapes = sandbox.self_test(self.zygotes[1])
        except (RuntimeError, OSError) as error:
            raise UserError(f"the scorer's sandbox does not start: {error}") from error
        if self.tier == "weak" and not allow_weak:
            self.close()
            raise UserError(
                f"the sandbox is not safe here, code can escape by: {', '.join(escapes)}; "
                "use Linux with seccomp, or --allow-weak-sandbox if you trust the model")
        layers = self.zygotes[1].layers.decode() or "no kernel layers"
        print(f"sandbox: {self.tier} ({layers}); escapes found: {', '.join(escapes) or 'none'}",
              file=sys.stderr)
        for zygote in self.zygotes:
            zygote.layers = self.zygotes[1].layers  # a zygote with other layers stops the run
        self.workers = workers
        self.expected_results = {}
        self.hidden_code_lock = threading.Lock()
        self.free = queue.SimpleQueue()
        for zygote in self.zygotes[1:]:
            self.free.put(zygote)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """End all sandbox processes."""
        for zygote in self.zygotes:
            zygote.close()

    def score(self, task, answer):
        """Score an answer (a string or None) to a task; the module docstring shows the result."""
        calls = list(task["test_cases"].values())
        note = ""
        if answer is None:
            note = "no answer"
        elif len(answer.encode("utf-8", "surrogatepass")) > MAX_ANSWER:
            note = f"the answer is longer than {MAX_ANSWER} bytes"
        expected = self.expected(task["ground_truth"], calls)
        texts = {} if note else {"official": official_code(answer), "fixed": answer}
        texts = {mode: text for mode, text in texts.items()
                 if text is not None and any(expected[mode])}
        total = ANSWER_ALL_S + max(len(calls) - 10, 0) * CALL_S
        zygote = self.free.get()
        try:
            outcomes = zygote.run(texts, calls, CALL_S, CALL_S, total)
        finally:
            self.free.put(zygote)
        not_run = [("refused", b"")] * len(calls)
        fixed = outcomes.get("fixed", not_run)
        official = outcomes.get("official", not_run)
        verdicts = [judge(*pair, nested_list) for pair in zip(expected["fixed"], fixed)]
        official_verdicts = [judge(*pair, OfficialArray)
                             for pair in zip(expected["official"], official)]
        result = {
            "fixed": {"passed": verdicts.count("passed"), "total": len(calls), "calls": verdicts,
                      "expected": expected["texts"],
                      "got": [short_text(outcome) for outcome in fixed]},
            "official": {"passed": official_verdicts.count("passed"), "total": len(calls)},
            "sandbox": self.tier}
        return {**result, "note": note} if note else result

    def score_many(self, pairs):
        """Yield the result of each (task, answer) in order, using all workers at once."""
        pool = ThreadPoolExecutor(self.workers)
        try:
            yield from pool.map(lambda pair: self.score(*pair), pairs)
        finally:
            pool.shutdown(cancel_futures=True)

    def expected(self, hidden_code, calls):
        """Run the hidden code once and return its result for each call.

        {"fixed": [from `read`], "official": [from `read`], "texts": [from `short_text`]}
        """
        key = (hidden_code, *calls)
        with self.hidden_code_lock:  # only one process runs hidden code
            if key not in self.expected_results:
                texts = {"fixed": hidden_code, "official": hidden_code}
                outcomes = run_hidden_code(self.zygotes[0], texts, calls)
                self.expected_results[key] = {
                    "fixed": [read(outcome, nested_list) for outcome in outcomes["fixed"]],
                    "official": [read(outcome, OfficialArray) for outcome in outcomes["official"]],
                    "texts": [short_text(outcome) for outcome in outcomes["fixed"]]}
            return self.expected_results[key]


def share(result, mode="fixed"):
    """Return the share of calls passed, 0 to 1; 0.0 without calls. mode: "fixed" or "official"."""
    return result[mode]["passed"] / max(result[mode]["total"], 1)


def success(result, mode="fixed"):
    """Return whether there are calls and all of them passed."""
    return 0 < result[mode]["total"] == result[mode]["passed"]
