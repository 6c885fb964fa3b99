"""Compare the speed of our scorer and the released evaluator, on two cores, in one run.

    python tests/bench/scoring.py [TASKS] [--answers N]   # TASKS: mini:test (default) or FILE.jsonl
    python tests/bench/scoring.py --hanging               # time of answers that hang

The released evaluator, re-implemented: it executes hidden code and answer in its own process,
without isolation, with a SIGALRM of one second per call of the answer, and runs the hidden code
again for every answer. Answers are the hidden code in a fence, half of them with one number
changed. Ours gives both scores, `fixed` and `official`. `--hanging` scores the tests' attacks (so
it needs pytest) and slow answers, each on ten calls; the limit is 11 s. Nothing is asserted.
"""
import argparse
import contextlib
import io
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = map(str, (Path(__file__).parents[2], Path(__file__).parents[1]))
from colbench.env.backend.score import Scorer  # noqa: E402
from colbench.env.backend.tasks import load_tasks  # noqa: E402

FENCE = "`" * 3


def time_out(*_):
    raise TimeoutError


def released_evaluator(job):
    """Calls passed by the released evaluator's rules, in this process."""
    hidden_code, answer, calls = job
    blocked = ("import os", "from os", "import sys", "from sys", "sudo", "transformers", "exit(",
               "quit(", "argparse")
    if any(word in answer for word in blocked):
        return 0
    answer = answer.split(FENCE + "python")[1].split(FENCE)[0]
    passed = 0
    signal.signal(signal.SIGALRM, time_out)
    with contextlib.redirect_stdout(io.StringIO()):
        for call in calls:
            values = []
            for code, seconds in ((hidden_code, 0), (answer, 1)):
                names = {}
                try:
                    signal.alarm(seconds)
                    exec(code, {}, names)
                    values.append(eval(call, {}, names))
                except Exception:
                    values.append(None)
                finally:
                    signal.alarm(0)
            try:
                passed += values[0] is not None and bool(values[0] == values[1])
            except ValueError:
                pass
    return passed


def spoiled(code):
    """The code with its last number changed."""
    numbers = list(re.finditer(r"\b\d+\b", code))
    if not numbers:
        return code
    return code[:numbers[-1].start()] + str(int(numbers[-1][0]) + 1) + code[numbers[-1].end():]


def cpu_seconds(pairs):
    """CPU seconds of a scorer and its processes for `pairs`, including start and hidden code."""
    def used():
        processes = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
        return sum(sum(resource.getrusage(who)[:2]) for who in processes)
    before = used()
    with Scorer(workers=2) as scorer:
        list(scorer.score_many(pairs))
        # let zygotes exit: the time of a killed one's children would not be counted
        for zygote in scorer.zygotes:
            zygote.control.close()
            zygote.process.wait()
    return used() - before


SLOW = {
    "0.9 s per call": "def f(x):\n    import time\n    time.sleep(0.9)\n    return x * 2",
    "0.9 s per call, import at the top":
        "import time\ndef f(x):\n    time.sleep(0.9)\n    return x * 2",
    "0.9 s per call, then an example in a fence":
        f"{FENCE}python\ndef f(x):\n    import time\n    time.sleep(0.9 * (x > 0))\n"
        f"    return x * 2\n{FENCE}\nSo:\n{FENCE}python\nprint(f(0))\n{FENCE}",
    "invalid code, slow to parse": "def f(x:\n" * 20_000,
    "every other call loops": "def f(x):\n    while x % 2: pass\n    return x * 2",
    "every other call loops, alarm caught":
        "def f(x):\n    try:\n        while x % 2: pass\n"
        "    except Exception: pass\n    return x * 2",
}


def hanging():
    """Print the time of each attack that takes more than a second."""
    from test_sandbox import CHEATS, HANGS
    good = {"ground_truth": "def f(x):\n    return x * 2",
            "test_cases": {str(k): f"f({k})" for k in range(1, 11)}}
    with Scorer(workers=1) as scorer:
        for name, answer in {**CHEATS, **HANGS, **SLOW}.items():
            start = time.monotonic()
            result = scorer.score(good, answer)
            seconds = time.monotonic() - start
            if seconds > 1:
                print(f"{name:45} {seconds:6.2f} s   fixed {result['fixed']['passed']:2}   "
                      f"official {result['official']['passed']:2} of 10", flush=True)
        start = time.monotonic()
        scorer.score({**good, "ground_truth": HANGS["loop"]}, good["ground_truth"])
        print(f"{'hidden code that loops':45} {time.monotonic() - start:6.2f} s")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="?", default="mini:test")
    parser.add_argument("--answers", type=int, default=1200)
    parser.add_argument("--hanging", action="store_true")
    args = parser.parse_args()
    if args.hanging:
        return hanging()
    tasks = load_tasks(args.tasks)
    pairs = []
    for k in range(args.answers):
        task = tasks[k % len(tasks)]
        code = task["ground_truth"]
        if (k // len(tasks) + k) % 2:
            code = spoiled(code)
        pairs.append((task, f"{FENCE}python\n{code}\n{FENCE}"))

    start = time.monotonic()
    with Scorer(workers=2) as scorer:
        ready = time.monotonic()
        first = list(scorer.score_many(pairs))
        cold = time.monotonic()
        list(scorer.score_many(pairs))
        warm = time.monotonic()
    once, twice = cpu_seconds(pairs), cpu_seconds(pairs + pairs)
    jobs = [(task["ground_truth"], answer, list(task["test_cases"].values()))
            for task, answer in pairs]
    # in a temporary folder: some hidden code writes a file
    with (tempfile.TemporaryDirectory() as folder,
          multiprocessing.Pool(2, os.chdir, [folder]) as pool):
        pool.map(abs, range(2))
        begin = time.monotonic()
        theirs = pool.map(released_evaluator, jobs, chunksize=8)
        end = time.monotonic()

    n = len(pairs)
    agree = sum(ours["official"]["passed"] == passed for ours, passed in zip(first, theirs))
    print(f"{n} answers to {len(tasks)} tasks, {os.cpu_count()} cores, "
          f"load {os.getloadavg()[0]:.1f}")
    for name, seconds in (("released evaluator, 2 processes", end - begin),
                          ("ours, 2 workers, hidden code cached", warm - cold)):
        print(f"{name:35}  {n / seconds:8.0f} answers/s   "
              f"{2000 * seconds / n:6.2f} core-ms per answer")
    print(f"{'ours, 2 workers, with hidden code':35}  {n / (cold - ready):8.0f} answers/s   "
          f"(sandbox ready in {ready - start:.2f} s)")
    print("ours, CPU time of all processes, hidden code cached: "
          f"{1000 * (twice - once) / n:.2f} ms per answer")
    print(f"ratio, cached: {(end - begin) / (warm - cold):.3f} of the released evaluator's "
          "throughput; both scores, in a sandbox")
    print(f"`official` agrees with the released evaluator on {agree} of {n} answers")


if __name__ == "__main__":
    main()
