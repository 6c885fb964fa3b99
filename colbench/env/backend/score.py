"""Score answers to Backend Programming tasks: run reference and answer on a task's calls in the sandbox, compare here.

    with Scorer(workers=2) as scorer:
        result = scorer.score(task, answer)
    # {"fixed": {"passed": 8, "total": 10, "calls": ["passed", "wrong", ...], "expected": ["12", ...], "got": [...]},
    #  "official": {"passed": 7, "total": 10}, "sandbox": "strict"}, and "note" when the answer was not run

Two modes from one scoring:
  fixed     what the benchmark means: code is found wherever it stands in the answer and runs in one namespace.
  official  the released evaluator's figures (sweet_rl 38daf2a, code_utils.check_correctness), on every Python version:
            an answer with one of BANNED in it scores 0; the first ```python fence, then the first fence, else the whole
            text; code runs as if inside a function, so helpers, recursion and module-level imports fail, in references
            too; 1 s a call by SIGALRM. Not reproduced: state that code leaves in the evaluator for other answers;
            SystemExit, which ends the whole run there, is a call not passed; code that catches the alarm may go on for
            1 s more, there for ever; an object whose own __eq__ says yes is not data and does not pass.

Code, in fixed mode: a statement of the module that raises or is none (a stray word before the code, an example,
input()) costs itself alone. What stands behind it runs: a definition there counts, a loop there costs the call its
second. A definition without a body (docstring, `...`, pass, return None, NotImplementedError) does not replace one that
has a body.

Time: a call has 1 s in each mode, an answer ANSWER_ALL_S for all; calls that it does not get to are timed out. Answers
that are slow run the fixed mode first; official then takes its outcomes if the code is one plain function in one piece,
which cannot tell the modes apart (`sandbox.alike`), else it has the time that is left. So where most calls are slow or
hang, those that would pass in official alone (code with helpers or examples or that catches the alarm, a slow first
fence) may be lost, and in fixed mode the last ones of an answer that also imports much, anew after each call that hung.
References have REFERENCE_S and REFERENCE_ALL_S in the same way.

In both modes a call passes when the results are equal by Python's ==; a reference that gives None, raises or is no
plain data never counts. Equal there, but not here:
  - a result that is no plain data (`sandbox.KINDS` and numpy's types): objects of own classes, functions, classes other
    than the built-in ones, modules, compiled patterns, array.array and memoryviews of other than bytes, IP addresses,
    numpy's longdouble
  - one of more than 1 MB, 100,000 values or 900 levels, or of more than four times the reference's bytes and 4 kB
  - a NaN in a container, where Python finds the same object (math.nan) on both sides
  - numpy's times in units that Python's types lack (nanoseconds), and timedelta64 and an int
  - times with a zone are their offsets from UTC: those in one zone that differ in `fold` alone, or of which one stands
    in the hour that the zone skips or has twice
  - Counters with a count that is no number: they compare as dicts
In fixed mode numpy arrays compare as nested lists, so that equal arrays and lists pass, and a numpy number is not equal
to a list of one.

`expected` and `got` are for people: short texts of the results, None where there is none.
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
CALL_S = 1                # wall seconds an answer has for a call, as in the released evaluator
REFERENCE_S = 10.0        # the same for a reference, which has no limit there
ANSWER_ALL_S = 10.7       # wall seconds for all of an answer's calls in both modes, a second more for each above ten
REFERENCE_ALL_S = 22.0    # the same for a reference, two more for each above ten
SHOWN_WIRE = 20_000       # bytes of JSON: a longer result is not shown, only its size
SHOWN = 200               # characters of a result that are shown
NUMBERS = {"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32",
           "float64", "complex64", "complex128"}  # numpy's; the data may be forged, and other types could be large
BANNED = ("import os", "from os", "import sys", "from sys", "sudo", "transformers", "exit(", "quit(", "argparse")


def official_code(answer):
    """The code the released evaluator takes from an answer, or None where a banned word makes it score 0."""
    if any(word in answer for word in BANNED):
        return None
    for fence in ("```python", "```"):
        if fence in answer:
            answer = answer.partition(fence)[2].partition("```")[0]
    return answer


class Number:
    """A numpy number: == to Python's numbers and others of its kind is numpy's own, else that of its value."""

    def __init__(self, dtype, value):
        import numpy  # here and below, as the scorer runs without it too
        self.value, self.numpy = value, numpy.dtype(dtype).type(value)

    def is_number(self):
        return True

    def __eq__(self, other):
        import numpy
        if not isinstance(other, (int, float, complex, Number)):
            return self.value == other
        with numpy.errstate(all="ignore"):
            return bool(self.numpy == (other.numpy if isinstance(other, Number) else other))

    def __hash__(self):  # they stand in sets and as keys
        return hash(self.value)

    def __repr__(self):
        return repr(self.value)


def number(dtype, value):
    """What stands for the one value of a numpy scalar; those that are no numbers are Python's own."""
    return Number(dtype, value) if dtype in NUMBERS else value


class OfficialArray:
    """A numpy array or scalar as the released evaluator meets it: == has a truth value only between single elements."""

    def __init__(self, shape, flat, dtype):
        self.flat = [number(dtype, flat[0])] if len(flat) == 1 else flat

    def is_number(self):
        return all(isinstance(item, (int, float, Number)) for item in self.flat)

    def __eq__(self, other):
        flat = other.flat if isinstance(other, OfficialArray) else [other]
        while len(flat) == 1 and isinstance(flat[0], (list, tuple, range, deque)):
            flat = [flat[0][0]] if len(flat[0]) == 1 else []
            if flat and isinstance(flat[0], OfficialArray):
                flat = flat[0].flat
            elif flat and type(flat[0]) in (int, float):  # alone it would give way to the other's type
                flat = [number({int: "int64", float: "float64"}[type(flat[0])], flat[0])]
        if len(self.flat) != 1 or len(flat) != 1:
            raise ValueError("the truth value of an array with more than one element is ambiguous")
        return self.flat[0] == flat[0]

    def __hash__(self):
        return hash(self.flat[0])


def nested_list(shape, flat, dtype):
    """A numpy array (row-major `flat` values) as nested lists; without dimensions its value, an empty one []."""
    if not shape:
        return number(dtype, flat[0])
    if not flat or type(flat) is not list or math.prod(shape) != len(flat):  # the last two are forged
        return []
    step = len(flat) // shape[0]
    return [nested_list(shape[1:], flat[i * step:(i + 1) * step], "") for i in range(shape[0])]


def read(outcome, array):
    """(value, bytes it came in) of a reference's outcome, or None where it never counts."""
    try:
        value = sandbox.decode(json.loads(outcome[1]), array) if outcome[0] == "value" else None
    except Exception:  # what the sandbox sent does not decode, such as a set of unhashable items
        return None
    return None if value is None else (value, len(outcome[1]))


class ShortRepr(reprlib.Repr):
    """Short texts of plain data, made here and never by an object's own __repr__; the same in every process."""

    def __init__(self):
        super().__init__()
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = self.maxdeque = 20
        self.maxstring = self.maxlong = self.maxother = SHOWN

    def repr_set(self, value, level):  # the library falls back to the order of hashes, which differ between processes
        items = sorted(self.repr1(item, level - 1) for item in value) if level > 0 else ["..."]
        more = ", ..." if len(items) > self.maxset else ""
        return "{" + ", ".join(items[:self.maxset]) + more + "}" if value else "set()"

    def repr_frozenset(self, value, level):
        return f"frozenset({self.repr_set(value, level) if value else ''})"

    repr_dict_keys = repr_dict_items = repr_set
    repr_OrderedDict = repr_Counter = reprlib.Repr.repr_dict
    repr_Deque = reprlib.Repr.repr_deque


def short_text(outcome):
    """A short text of the result in an outcome from the sandbox, possibly forged; None where the call gave none."""
    kind, wire = outcome
    if kind != "value":
        return None
    if len(wire) > SHOWN_WIRE:
        return f"(a result of {len(wire)} bytes)"
    try:
        text = ShortRepr().repr(sandbox.decode(json.loads(wire), nested_list))
    except Exception:  # an integer of too many digits, or a forged result
        return "(cannot be shown)"
    return text if len(text) <= SHOWN else text[:SHOWN - 3] + "..."


def judge(expected, outcome, array):
    """The verdict on one call: `expected` from `read`, the answer's `outcome` from the sandbox, possibly forged."""
    kind, wire = outcome
    if expected is None:
        return "no reference value"
    if kind != "value":
        return kind
    value, size = expected
    if len(wire) > 4 * size + 4096:  # equal values have like sizes; keeps what is decoded here small
        return "wrong"
    try:
        return "passed" if value == sandbox.decode(json.loads(wire), array) else "wrong"
    except Exception:  # an array's ambiguous truth value, a signalling NaN, or a forged result
        return "wrong"


def run_reference(zygote, texts, calls):
    """`Zygote.run` with a reference's limits."""
    return zygote.run(texts, calls, REFERENCE_S, total=REFERENCE_ALL_S + 2 * max(len(calls) - 10, 0))


class Scorer:
    """Scores on `workers` warm sandboxes; every method may be called from several threads. `tier` names what holds."""

    def __init__(self, workers=2, allow_weak=False):
        """Raises UserError when the sandbox is weak here and `allow_weak` is off."""
        if os.name == "nt":
            raise UserError("scoring runs model-written code, and Windows has no sandbox: use Linux or WSL2")
        try:
            with ThreadPoolExecutor(workers + 1) as pool:  # one more process for the references
                self.zygotes = list(pool.map(lambda _: sandbox.Zygote(), range(workers + 1)))
            self.tier, through = sandbox.self_test(self.zygotes[1])
        except (RuntimeError, OSError) as error:
            raise UserError(f"the scorer's sandbox does not start: {error}") from error
        if self.tier == "weak" and not allow_weak:
            self.close()
            raise UserError(f"the sandbox is not safe here, this gets through: {', '.join(through)}; "
                            "score on Linux with seccomp, or allow a weak sandbox if you trust the model")
        print(f"sandbox: {self.tier} ({self.zygotes[1].layers.decode() or 'no layer of the kernel'}), "
              f"of all that was tried got through: {', '.join(through) or 'nothing'}", file=sys.stderr)
        for zygote in self.zygotes:
            zygote.layers = self.zygotes[1].layers  # one that has others than those tested stops the run
        self.workers = workers
        self.references, self.reference_lock = {}, threading.Lock()
        self.free = queue.SimpleQueue()
        for zygote in self.zygotes[1:]:
            self.free.put(zygote)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """End all its processes."""
        for zygote in self.zygotes:
            zygote.close()

    def score(self, task, answer):
        """The result (see the top of this file) of an answer (text, or None) to a task."""
        calls = list(task["test_cases"].values())
        note = "no answer" if answer is None else ""
        if answer is not None and len(answer.encode("utf-8", "surrogatepass")) > MAX_ANSWER:
            note = f"the answer is longer than {MAX_ANSWER} bytes"
        expected = self.expected(task["ground_truth"], calls)
        texts = {} if note else {"official": official_code(answer), "fixed": answer}
        texts = {mode: text for mode, text in texts.items() if text is not None and any(expected[mode])}
        zygote = self.free.get()
        try:
            got = zygote.run(texts, calls, CALL_S, CALL_S, ANSWER_ALL_S + max(len(calls) - 10, 0) * CALL_S)
        finally:
            self.free.put(zygote)
        none = [("refused", b"")] * len(calls)
        verdicts = [judge(*pair, nested_list) for pair in zip(expected["fixed"], got.get("fixed", none))]
        official = [judge(*pair, OfficialArray) for pair in zip(expected["official"], got.get("official", none))]
        result = {
            "fixed": {"passed": verdicts.count("passed"), "total": len(calls), "calls": verdicts,
                      "expected": expected["texts"],
                      "got": [short_text(outcome) for outcome in got.get("fixed", none)]},
            "official": {"passed": official.count("passed"), "total": len(calls)}, "sandbox": self.tier}
        return {**result, "note": note} if note else result

    def score_many(self, pairs):
        """Yield the result of each (task, answer), in order, scored on all workers at once."""
        pool = ThreadPoolExecutor(self.workers)
        try:
            yield from pool.map(lambda pair: self.score(*pair), pairs)
        finally:
            pool.shutdown(cancel_futures=True)

    def expected(self, reference, calls):
        """What the reference gives for each call, for each mode as `read` returns it, and as short texts. Run once."""
        key = (reference, *calls)
        with self.reference_lock:  # there is one process for references
            if key not in self.references:
                got = run_reference(self.zygotes[0], {"fixed": reference, "official": reference}, calls)
                self.references[key] = {"fixed": [read(outcome, nested_list) for outcome in got["fixed"]],
                                        "official": [read(outcome, OfficialArray) for outcome in got["official"]],
                                        "texts": [short_text(outcome) for outcome in got["fixed"]]}
            return self.references[key]


def share(result, mode="fixed"):
    """Share of the calls passed, 0 to 1; 0.0 for a task without calls. `mode`: "fixed" or "official"."""
    return result[mode]["passed"] / max(result[mode]["total"], 1)


def success(result, mode="fixed"):
    """Whether every call passed, of at least one."""
    return 0 < result[mode]["total"] == result[mode]["passed"]
