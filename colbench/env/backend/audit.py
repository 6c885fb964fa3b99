"""Which tasks of a file cannot be won, or not fairly: a benchmark's own mistakes, named by line.

    python -m colbench.env.backend.audit TASKS [--n-tasks N] [--json]

TASKS as for the scripts: a .jsonl file, a hub data set, mini:test.

A task is clean unless one of these holds; the first four make `success` impossible or a matter of luck:
  reference     it raises on a test call, returns None, needs a module that is not installed, returns no plain data, is
                too slow for an answer's second, or its result does not equal itself (NaN)
  names         a test call uses a name that the description never mentions, or one that nothing defines
  chance        the reference's results change with random seed, hash order of sets, or the clock
  repeated      two test calls are the same
The reference runs twice in the scorer's sandbox, the second time with another hash seed, other random numbers and a
clock 400 days on; only where the results differ does it run again to find out which of the three it was.
"""
import argparse
import ast
import builtins
import hashlib
import importlib.util
import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from colbench.env.backend import sandbox
from colbench.env.backend.score import Scorer, judge, nested_list, read, run_reference
from colbench.env.backend.tasks import load_tasks
from colbench.env.data import local_path
from colbench.run.errors import UserError, run_main
from colbench.run.files import numbered_rows

OTHER_SEED = """
def _other_seed():
    import random, sys
    random.seed(12345)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(12345)
_other_seed()
"""
OTHER_TIME = """
def _other_time():
    import datetime, time
    days = 400.3
    for name in ("time", "time_ns"):
        real, step = getattr(time, name), days * 86400 * (10 ** 9 if name == "time_ns" else 1)
        setattr(time, name, lambda real=real, step=type(real())(step): real() + step)
    for name in ("localtime", "gmtime", "ctime"):
        setattr(time, name, lambda seconds=None, real=getattr(time, name):
                real(time.time() if seconds is None else seconds))
    strftime = time.strftime
    time.strftime = lambda form, t=None: strftime(form, time.localtime() if t is None else t)
    class moved(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return real.now(tz) + datetime.timedelta(days)
        @classmethod
        def utcnow(cls):
            return real.utcnow() + datetime.timedelta(days)
        today = now
    real, real_date = datetime.datetime, datetime.date
    class date(real_date):
        @classmethod
        def today(cls):
            return real_date.today() + datetime.timedelta(days)
    datetime.datetime, datetime.date = moved, date
_other_time()
"""


def audit(tasks: list[dict], scorer: Scorer) -> list[list[str]]:
    """The reasons why each task is not clean; empty lists for clean ones."""
    other = sandbox.Zygote(hash_seed="1")
    try:
        with ThreadPoolExecutor(1) as pool:  # one sandbox runs the references as they are, the other the changed ones
            plain = pool.map(
                lambda task: scorer.expected(task["ground_truth"], list(task["test_cases"].values())), tasks)
            return [[*_names(task), *_reference(task, scorer), *_chance(task, scorer, other, expected["fixed"]),
                     *_repeated(task)] for task, expected in zip(tasks, plain)]
    finally:
        other.close()


def _names(task: dict) -> list[str]:
    reasons, defined = [], _defined(task["ground_truth"])
    nodes = [node for call in task["test_cases"].values() for node in ast.walk(ast.parse(call.strip(), mode="eval"))]
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    # of comprehensions
    own = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {node.arg for node in nodes if isinstance(node, ast.arg)}  # of lambdas
    for name in sorted(names - own - set(vars(builtins))):
        if name not in defined:
            reasons.append(f"names: a test call uses {name}, which nothing defines")
        elif not re.search(rf"\b{re.escape(name)}\b", task["problem_description"]):
            reasons.append(f"names: a test call uses {name}, which the description does not mention")
    return reasons


def _defined(code: str) -> set[str]:
    """Names that a reference binds anywhere."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names


def _reference(task: dict, scorer: Scorer) -> list[str]:
    """What is wrong with the reference's results on the test calls."""
    calls = list(task["test_cases"].values())
    outcomes = run_reference(scorer.zygotes[1], {"fixed": task["ground_truth"]}, calls)["fixed"]
    reasons = Counter()
    for outcome in outcomes:
        kind, body = outcome
        value = read(outcome, nested_list)
        missing = missing_modules(task["ground_truth"])
        if kind == "raised" and missing and body in (b"ModuleNotFoundError", b"ImportError", b"NameError"):
            reasons[f"needs {', '.join(missing)}, which is not installed"] += 1
        elif kind == "raised":
            reasons[f"raises {body.decode(errors='replace')[:60]}"] += 1
        elif kind == "value" and body == b"null":
            reasons["returns None"] += 1
        elif kind != "value" or value is None:
            reasons[{"timed out": "takes too long", "died": "kills its process"}.get(
                kind, "returns no plain data, or too much")] += 1
        elif judge(value, outcome, nested_list) != "passed":
            reasons["returns what does not equal itself"] += 1
    return [f"reference: {reason}, {n} of {len(outcomes)} calls" for reason, n in reasons.items()]


def missing_modules(code: str) -> list[str]:
    """Top-level modules that the code imports and that are not installed."""
    names = {(alias.name if isinstance(node, ast.Import) else node.module or "").split(".")[0]
             for node in ast.walk(ast.parse(code)) if isinstance(node, (ast.Import, ast.ImportFrom))
             for alias in node.names}
    return sorted(name for name in names if name and importlib.util.find_spec(name) is None)


def _chance(task: dict, scorer: Scorer, other: sandbox.Zygote, expected: list) -> list[str]:
    calls = list(task["test_cases"].values())

    def differs(zygote, before):
        code = task["ground_truth"] if "__future__" in task["ground_truth"] else before + task["ground_truth"]
        got = run_reference(zygote, {"fixed": code}, calls)["fixed"]
        return any(one and not same(one, read(outcome, nested_list)) for one, outcome in zip(expected, got))

    def same(one, two):
        try:  # NaN only equals by its name
            return two is not None and (one[0] == two[0] or repr(one[0]) == repr(two[0]))
        except Exception:  # nested too deep, or a signalling NaN
            return False

    if not differs(other, OTHER_SEED + OTHER_TIME):
        return []
    if differs(scorer.zygotes[1], OTHER_SEED):
        return ["chance: depends on random numbers"]
    causes = ["the clock"] * differs(scorer.zygotes[1], OTHER_TIME) + ["the hash order of a set"] * differs(other, "")
    return [f"chance: depends on {' and '.join(causes) or 'the moment it runs'}"]


def _repeated(task: dict) -> list[str]:
    calls = [ast.dump(ast.parse(call.strip(), mode="eval")) for call in task["test_cases"].values()]
    twice = len(calls) - len(set(calls))
    return [f"repeated: {twice} of {len(calls)} test calls stand there twice"] if twice else []


def flaws(tasks: list[dict], before: dict | None, allow_weak: bool) -> dict:
    """{"tasks": digest of them, "flawed": {task id: reasons}}.

    before: what an earlier call returned; it is the result where it is of the same tasks.
    """
    what = [[task["id"], task["problem_description"], task["ground_truth"], task["test_cases"]] for task in tasks]
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    if isinstance(before, dict) and before.get("tasks") == digest:
        return before
    with Scorer(workers=1, allow_weak=allow_weak) as scorer:
        found = audit(tasks, scorer)
    return {"tasks": digest, "flawed": {task["id"]: reasons for task, reasons in zip(tasks, found) if reasons}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks")
    parser.add_argument("--n-tasks", type=int, help="the first so many (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object a task that is not clean, instead of text")
    parser.add_argument("--allow-weak-sandbox", action="store_true",
                        help="go on even where the sandbox cannot be made safe")
    args = parser.parse_args()
    if args.n_tasks is not None and args.n_tasks < 1:
        raise UserError("--n-tasks is at least 1")
    tasks = load_tasks(args.tasks, args.n_tasks)
    numbers, where = range(1, len(tasks) + 1), args.tasks
    if not args.tasks.startswith("mini:"):
        where = local_path(args.tasks)
        numbers = [number for number, _ in numbered_rows(where)]
    with Scorer(workers=1, allow_weak=args.allow_weak_sandbox) as scorer:
        found = audit(tasks, scorer)
    for number, task, reasons in zip(numbers, tasks, found):
        if reasons and args.json:
            print(json.dumps({"line": number, "id": task["id"], "reasons": reasons}))
        elif reasons:
            print(f"{where}:{number}: {'; '.join(reasons)}")
    kinds = Counter(kind for reasons in found for kind in {reason.split(":")[0] for reason in reasons})
    if not args.json:
        print(f"{len(tasks)} tasks: {sum(not reasons for reasons in found)} clean"
              + "".join(f", {n} with {kind}" for kind, n in sorted(kinds.items())))


if __name__ == "__main__":
    run_main(main)
