"""Find the tasks of a file that cannot be won, or not fairly, and print them by line.

    python -m colbench.env.backend.audit TASKS [--n-tasks N] [--json]

TASKS is what the scripts accept: a .jsonl file, a hub data set, mini:test.

A task is clean unless one of these holds; the first three make `success` impossible or a matter of
luck:
  hidden code  it raises on a test call, returns None, needs a module that is not installed,
               returns no plain data, takes longer than an answer may (1 s), or returns a value that
               does not equal itself (NaN)
  names        a test call uses a name that the description never mentions or that nothing defines
  chance       the hidden code's results change with the random seed, the hash order of sets, or the
               clock
  repeated     two test calls are the same
The hidden code runs twice in the scorer's sandbox. The second run has another hash seed, other
random numbers and a clock 400 days ahead. If the results differ, more runs find out which of the
three it was.
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
from colbench.env.backend.score import Scorer, judge, nested_list, read, run_hidden_code
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
    """Return the reasons why each task is not clean; an empty list for a clean one."""
    other = sandbox.Zygote(hash_seed="1")
    try:
        # one sandbox runs the unchanged hidden code while others run the changed one
        with ThreadPoolExecutor(1) as pool:
            unchanged = pool.map(lambda task: scorer.expected(
                task["ground_truth"], list(task["test_cases"].values())), tasks)
            return [[*_names(task), *_hidden_code(task, scorer),
                     *_chance(task, scorer, other, expected["fixed"]), *_repeated(task)]
                    for task, expected in zip(tasks, unchanged)]
    finally:
        other.close()


def _names(task: dict) -> list[str]:
    reasons = []
    defined = _defined(task["ground_truth"])
    nodes = [node for call in task["test_cases"].values()
             for node in ast.walk(ast.parse(call.strip(), mode="eval"))]
    names = [node for node in nodes if isinstance(node, ast.Name)]
    loaded = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    stored = {node.id for node in names if isinstance(node.ctx, ast.Store)}  # in comprehensions
    arguments = {node.arg for node in nodes if isinstance(node, ast.arg)}    # of lambdas
    for name in sorted(loaded - stored - arguments - set(vars(builtins))):
        if name not in defined:
            reasons.append(f"names: a test call uses {name}, which nothing defines")
        elif not re.search(rf"\b{re.escape(name)}\b", task["problem_description"]):
            reasons.append(
                f"names: a test call uses {name}, which the description does not mention")
    return reasons


def _defined(code: str) -> set[str]:
    """Return the names that the code binds anywhere."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names


def _hidden_code(task: dict, scorer: Scorer) -> list[str]:
    """Return what is wrong with the hidden code's results on the test calls."""
    calls = list(task["test_cases"].values())
    hidden_code = task["ground_truth"]
    outcomes = run_hidden_code(scorer.zygotes[1], {"fixed": hidden_code}, calls)["fixed"]
    missing = missing_modules(hidden_code)
    reasons = Counter()
    for outcome in outcomes:
        kind, body = outcome
        value = read(outcome, nested_list)
        no_module = body in (b"ModuleNotFoundError", b"ImportError", b"NameError")
        if kind == "raised" and missing and no_module:
            reasons[f"needs {', '.join(missing)}, which is not installed"] += 1
        elif kind == "raised":
            reasons[f"raises {body.decode(errors='replace')[:60]}"] += 1
        elif kind == "value" and body == b"null":
            reasons["returns None"] += 1
        elif kind != "value" or value is None:
            texts = {"timed out": "takes too long", "died": "kills its process"}
            reasons[texts.get(kind, "returns no plain data, or too much")] += 1
        elif judge(value, outcome, nested_list) != "passed":
            reasons["returns a value that does not equal itself"] += 1
    return [f"hidden code: {reason}, {n} of {len(outcomes)} calls"
            for reason, n in reasons.items()]


def missing_modules(code: str) -> list[str]:
    """Return the top-level modules that the code imports and that are not installed."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    names = {name.split(".")[0] for name in names}
    return sorted(name for name in names if name and importlib.util.find_spec(name) is None)


def _chance(task: dict, scorer: Scorer, other: sandbox.Zygote, expected: list) -> list[str]:
    """Return what the results depend on: random numbers, the clock or the hash order of sets."""
    calls = list(task["test_cases"].values())

    def differs(zygote, prefix):
        code = task["ground_truth"]
        if "__future__" not in code:  # a future import must come first
            code = prefix + code
        got = run_hidden_code(zygote, {"fixed": code}, calls)["fixed"]
        return any(first and not same(first, read(outcome, nested_list))
                   for first, outcome in zip(expected, got))

    def same(first, second):
        try:  # two NaNs are equal only as text
            return second is not None and (
                first[0] == second[0] or repr(first[0]) == repr(second[0]))
        except Exception:  # nested too deeply, or a signalling NaN
            return False

    if not differs(other, OTHER_SEED + OTHER_TIME):
        return []
    if differs(scorer.zygotes[1], OTHER_SEED):
        return ["chance: depends on random numbers"]
    causes = []
    if differs(scorer.zygotes[1], OTHER_TIME):
        causes.append("the clock")
    if differs(other, ""):
        causes.append("the hash order of a set")
    return [f"chance: depends on {' and '.join(causes) or 'something that changes between runs'}"]


def _repeated(task: dict) -> list[str]:
    calls = [ast.dump(ast.parse(call.strip(), mode="eval"))
             for call in task["test_cases"].values()]
    n_repeated = len(calls) - len(set(calls))
    if not n_repeated:
        return []
    return [f"repeated: {n_repeated} of {len(calls)} test calls repeat an earlier one"]


def flaws(tasks: list[dict], previous: dict | None, allow_weak: bool) -> dict:
    """Return {"tasks": digest of the tasks, "flawed": {task id: reasons}}.

    previous: what an earlier call returned; it is returned again if the tasks are the same.
    """
    fields = [[task["id"], task["problem_description"], task["ground_truth"], task["test_cases"]]
              for task in tasks]
    digest = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
    if isinstance(previous, dict) and previous.get("tasks") == digest:
        return previous
    with Scorer(workers=1, allow_weak=allow_weak) as scorer:
        reasons_by_task = audit(tasks, scorer)
    flawed = {task["id"]: reasons for task, reasons in zip(tasks, reasons_by_task) if reasons}
    return {"tasks": digest, "flawed": flawed}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks")
    parser.add_argument("--n-tasks", type=int, help="check only the first N tasks (default: all)")
    parser.add_argument("--json", action="store_true",
                        help="print one JSON object per flawed task instead of text")
    parser.add_argument("--allow-weak-sandbox", action="store_true",
                        help="run the code even if the sandbox cannot be made safe")
    args = parser.parse_args()
    if args.n_tasks is not None and args.n_tasks < 1:
        raise UserError("--n-tasks must be at least 1")
    tasks = load_tasks(args.tasks, args.n_tasks)
    path = args.tasks
    numbers = range(1, len(tasks) + 1)
    if not args.tasks.startswith("mini:"):
        path = local_path(args.tasks)
        numbers = [number for number, _ in numbered_rows(path)]
    with Scorer(workers=1, allow_weak=args.allow_weak_sandbox) as scorer:
        reasons_by_task = audit(tasks, scorer)
    for number, task, reasons in zip(numbers, tasks, reasons_by_task):
        if reasons and args.json:
            print(json.dumps({"line": number, "id": task["id"], "reasons": reasons}))
        elif reasons:
            print(f"{path}:{number}: {'; '.join(reasons)}")
    if not args.json:
        kinds = Counter(kind for reasons in reasons_by_task
                        for kind in {reason.split(":")[0] for reason in reasons})
        n_clean = sum(not reasons for reasons in reasons_by_task)
        flawed = ", ".join(f"{kind} {n}" for kind, n in sorted(kinds.items()))
        print(f"{len(tasks)} tasks: {n_clean} clean" + (f"; flaws: {flawed}" if flawed else ""))


if __name__ == "__main__":
    run_main(main)
