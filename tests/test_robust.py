"""Stages under faults: misbehaving servers, NaN losses, secrets, tasks with flaws."""

import json
import math
import threading

import pytest
import torch
from accelerate import Accelerator
from tqdm import tqdm

from colbench.env.backend.audit import audit, flaws, missing_modules
from colbench.env.backend.human import make_human
from colbench.env.backend.mini import mini_tasks
from colbench.env.backend.score import Scorer
from colbench.run.errors import UserError, run_main
from colbench.train import loop as training
from stages import lines, run
from test_server import QUICK, Server, completion, last

# ---- servers -------------------------------------------------------------------------------------
ANSWER = "I WANT TO ANSWER:\ndef f(x):\n    return x + 1"
FAULTS = {  # task id -> the server's reply in every dialogue about that task
    "too long": (400, {}, {"error": {"message": "maximum context length is 8192 tokens"}}),
    "busy": (429, QUICK, {"error": {"message": "slow down"}}),
    "broken": (500, QUICK, {"error": {"message": "cuda"}}),
    "hang up": "hang up",
    "empty": (200, {}, completion("")),
    "null": (200, {}, completion(None)),
    "page": (200, {}, "<html>"),
    "torn": (200, {"Content-Type": "application/json"}, '{"choices": [{"mess'),
    "other": (200, {}, {"choices": "none"}),
    "endless": (200, {}, completion("word " * 20_000, reason="length")),
}


def write_tasks(path, names):
    rows = [{"id": name, "problem_description": f"{name}: write f.",
             "ground_truth": "def f(x):\n    return x + 1",
             "test_cases": {"a": "f(1)", "b": "f(2)"}} for name in names]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_fault_fails_only_its_own_dialogue(tmp_path):
    """Twenty tasks; the server fails ten of them, each in another way.

    The run ends and counts the failures; the same command retries them."""
    names = [*FAULTS] + [f"fine {k}" for k in range(10)]
    recovered = threading.Event()

    def behave(body, earlier):
        name = body["messages"][1]["content"].split(":")[0] if len(body["messages"]) > 1 else ""
        fault = None if recovered.is_set() else FAULTS.get(name)
        return fault or ANSWER

    server = Server(behave)
    try:
        tasks = write_tasks(tmp_path / "tasks.jsonl", names)
        arguments = ["--run", tmp_path, "--tasks", tasks, "--n-tasks", 30, "--k", 1,
                     "--model", f"{server.url}#first", "--candidate-share", 0, "--parallel", 8]
        done = run("collect.py", *arguments)
        rows = {row["id"]: row for row in lines(tmp_path / "trajectories.jsonl")}
        assert list(rows) == names
        for name, row in rows.items():
            if name in FAULTS and name != "endless":
                assert row["outcome"] == "simulation_failed", name
                assert row["error"].startswith("agent: "), name
                assert "reward" not in row, name
            else:
                assert row["reward"] == (0.0 if name == "endless" else 1.0)
        assert "9 failed" in done.stdout and "mean reward 0.909" in done.stdout
        counts = [sum(name in last(body) for body in server.requests) for name in FAULTS]
        assert max(counts[:-1]) <= 10  # bounded: five attempts, twice for a reply without text
        recovered.set()
        assert "0 failed" in run("collect.py", *arguments).stdout
        outcomes = [row["outcome"] for row in lines(tmp_path / "trajectories.jsonl")]
        assert "simulation_failed" not in outcomes
    finally:
        server.close()


def test_a_dead_server_ends_the_run_and_the_same_command_resumes(tmp_path):
    """The server answers nine requests, then only 503. After its recovery the resumed file equals
    that of a server that never failed."""
    state = {"requests": 0, "healthy": 9}  # healthy: how many it answers; 0: all

    def behave(body, earlier):
        state["requests"] += 1
        if state["requests"] > state["healthy"] and state["healthy"]:
            return 503, QUICK, {"error": {"message": "shutting down"}}
        first_turn = all(message["role"] != "assistant" for message in body["messages"])
        return f"question {body['seed'] % 97}?" if first_turn else ANSWER

    server = Server(behave)
    try:
        tasks = write_tasks(tmp_path / "tasks.jsonl", [f"t{k}" for k in range(10)])
        arguments = ["--tasks", tasks, "--n-tasks", 10, "--k", 1, "--model", f"{server.url}#first",
                     "--candidate-share", 0, "--parallel", 3]
        stopped = run("collect.py", "--run", tmp_path / "run", *arguments, code=2)
        assert "Traceback" not in stopped.stderr
        errors = [line for line in stopped.stderr.splitlines() if line.startswith("error: ")]
        assert "shutting down" in errors[-1]
        rows = lines(tmp_path / "run/trajectories.jsonl")
        assert 0 < len(rows) < 10
        assert all(row["outcome"] == "answered" for row in rows)
        state["healthy"] = 0
        run("collect.py", "--run", tmp_path / "run", *arguments)
        run("collect.py", "--run", tmp_path / "straight", *arguments)
        straight = (tmp_path / "straight/trajectories.jsonl").read_bytes()
        assert (tmp_path / "run/trajectories.jsonl").read_bytes() == straight
    finally:
        server.close()


def test_no_secret_in_any_file_or_output(tmp_path):
    """Passwords in addresses and keys in the environment reach the server and nothing else."""
    secrets = ["pass-word-1", "key-in-environment", "hf_token_in_environment", "query-token-2"]
    server = Server(lambda body, earlier: "What?" if len(body["messages"]) == 2 else ANSWER)
    with_password = server.url.replace("http://", f"http://user:{secrets[0]}@")
    address = f"{with_password}/v1?access={secrets[3]}#first"
    try:
        settings = dict(OPENAI_API_KEY=secrets[1], HF_TOKEN=secrets[2])
        tasks = write_tasks(tmp_path / "tasks.jsonl", ["a", "b"])
        common = ["--run", tmp_path / "run", "--tasks", tasks, "--n-tasks", 2, "--human", address]
        printed = ""
        for script, more in (("collect.py", ["--model", address, "--k", 1]),
                             ("evaluate.py", ["--policies", address])):
            done = run(script, *common, *more, **settings)
            printed += done.stdout + done.stderr
        server.close()
        done = run("collect.py", *common, "--model", address, "--k", 2, code=2, **settings)
        printed += done.stdout + done.stderr
    finally:
        server.close()
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert len(files) >= 4 and "error: " in printed
    with pytest.raises(UserError) as raised:
        make_human("ftp://user:pass-word-1@host/x?query-token-2")
    printed += str(raised.value)
    for secret in secrets:
        assert secret not in printed
        assert [path for path, content in files.items() if secret.encode() in content] == []


# ---- training ------------------------------------------------------------------------------------
def test_steps_without_a_finite_loss_or_gradient_are_counted(tmp_path):
    def step_log(first_step):
        bar = tqdm(range(first_step, 9), initial=first_step, disable=True)
        return training.StepLog(Accelerator(cpu=True), tmp_path / "critic", bar, first_step)

    log = step_log(0)
    counts = []
    steps = [(1.0, 1.0), (math.nan, 1.0), (1.0, math.inf), (1.0, 2.0), (-math.inf, math.nan)]
    for step, (loss, norm) in enumerate(steps):
        log.add(3, loss=torch.tensor(loss), margin=2.0)
        log.add(3, loss=torch.tensor(1.0), margin=2.0)
        log.write(step, log.means(), norm, learning_rate=1e-4)
        counts.append((log.skipped, log.skipped_in_a_row))
    assert counts == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]
    rows = [json.loads(line, parse_constant=pytest.fail)  # NaN and Infinity are not JSON
            for line in open(tmp_path / "critic_log.jsonl")]
    assert [row["loss"] for row in rows] == [1.0, None, 1.0, 1.0, None]
    assert rows[2]["grad_norm"] is None
    assert step_log(3).skipped == 2  # resumed after step 2


FAULTY = """
import sys, {stage} as stage
real, calls = stage.{loss}, [0]
def faulty(*args, **settings):
    calls[0] += 1
    loss, *rest = real(*args, **settings)
    return (loss * float({factor!r}) if {first} <= calls[0] <= {last} else loss, *rest)
stage.{loss} = faulty
sys.argv = ["{stage}.py", *sys.argv[1:]]
stage.run_main(stage.main)
"""
COMMON = ["--epochs", 1, "--batch-size", 1, "--save-every", 100]
SMALL = {"train_critic": [*COMMON, "--pairs-per-task", 1],
         "train_policy": [*COMMON, "--pairs-per-state", 1]}


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """Hand-made trajectories and preferences for sixteen steps of either trainer."""
    folder = tmp_path_factory.mktemp("collected")
    trajectories, preferences = [], []
    for task in mini_tasks("train", 16):
        request = {"role": "user", "content": task["problem_description"]}
        for sample, text in enumerate(("I WANT TO ANSWER:\nreturn 1", "What is the toll?")):
            trajectories.append({
                "task": task,
                "dialogue_history": [request, {"role": "assistant", "content": text}],
                "answer": text, "reward": float(sample),
                "id": task["id"], "sample": sample, "outcome": "limit"})
        preferences.append({
            "id": task["id"], "sample": 0, "turn": 1,
            "advantages": [1.0, -1.0], "candidates": ["a?", "b?"],
            "messages": [{"role": "system", "content": "x"}, request]})
    for name, rows in (("trajectories", trajectories), ("preferences", preferences)):
        content = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(content)
    return folder


@pytest.mark.parametrize("name, loss", [("train_critic", "critic_loss"),
                                        ("train_policy", "policy_loss")])
def test_bad_steps_are_skipped_and_five_in_a_row_stop_the_run(collected, tmp_path, name, loss):
    source = "trajectories" if name == "train_critic" else "preferences"
    output = name.removeprefix("train_")

    def train(folder, code, **fault):
        code_with_fault = FAULTY.format(stage=name, loss=loss, **fault)
        return run("-c", code_with_fault, "--run", folder, *SMALL[name],
                   f"--{source}", collected / f"{source}.jsonl", code=code)

    folder = tmp_path / "many"
    factor = "inf" if name == "train_policy" else "nan"
    stopped = train(folder, 2, factor=factor, first=3, last=99)
    assert "Traceback" not in stopped.stderr
    assert "error: step 6: loss or gradient was NaN or infinite" in stopped.stderr
    state = torch.load(folder / f"{output}.checkpoint", weights_only=True)
    assert state["step"] == 7
    assert all(value.isfinite().all() for value in state["weights"].values())
    resumed = train(folder, None, factor="1", first=0, last=0)  # no fault: resumes after step 6
    rows = lines(folder / f"{output}_log.jsonl")
    assert (folder / output).exists(), resumed.stderr
    assert [row["skipped"] for row in rows] == [0, 0, 1, 2, 3, 4, 5] + [5] * 9


def test_messages_that_exceed_the_context_are_left_out(collected, tmp_path):
    """--max-tokens may exceed the model's context; the context is then the limit."""
    rows = lines(collected / "preferences.jsonl")
    rows[0]["candidates"][0] = "word " * 3000
    (tmp_path / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [*SMALL["train_policy"], "--max-tokens", 100_000]
    done = run("train_policy.py", "--run", tmp_path, *arguments)
    assert "15 pairs at 15 of 16 states; 1 left out for more than 1024 tokens" in done.stdout


# ---- errors of the machine -----------------------------------------------------------------------
@pytest.mark.parametrize("error, message", [
    (MemoryError(), "out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), "out of memory: lower it"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
     "out of memory: lower it"),
    (OSError(27, "File too large"), "File too large"),
    (RuntimeError("I/O error: No space left on device (os error 28)"), "No space"),
])
def test_an_error_of_the_machine_is_reported_in_one_line(error, message, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as raised:
        run_main(main, out_of_memory="lower it")
    printed = capsys.readouterr().err
    assert raised.value.code == 2
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert message in printed


# ---- the audit -----------------------------------------------------------------------------------
def make_task(hidden_code, *calls, description="Write f and make it good."):
    return {"id": str(hash(hidden_code)), "problem_description": description,
            "ground_truth": hidden_code,
            "test_cases": {f"t{i}": call for i, call in enumerate(calls or ("f(1)", "f(2)"))}}


BAD = {  # flaw, as the audit words it -> task with that flaw
    "hidden code: raises ZeroDivisionError, 2 of 2": make_task("def f(x):\n    return x / 0"),
    "hidden code: returns None, 1 of 2": make_task("def f(x):\n    return x if x == 1 else None"),
    "hidden code: needs no_such_module, which": make_task(
        "import no_such_module\ndef f(x):\n    return no_such_module.f(x)"),
    "hidden code: returns no plain data": make_task("def f(x):\n    return lambda: x"),
    "hidden code: returns a value that does not equal itself": make_task(
        "def f(x):\n    return [float('nan')]"),
    "names: a test call uses g, which the description does not": make_task(
        "def g(x):\n    return x", "g(1)"),
    "names: a test call uses h, which nothing defines": make_task(
        "def f(x):\n    return x", "f(h)"),
    "names: a test call uses date, which the description": make_task(
        "from datetime import date\ndef f(x):\n    return x.year", "f(date(2020, 1, 2))"),
    "repeated: 1 of 3": make_task("def f(x):\n    return x", "f(1)", "f( 1 )", "f(2)"),
    "chance: depends on random numbers": make_task(
        "import random\ndef f(x):\n    return random.random()"),
    "chance: depends on random": make_task("import uuid\ndef f(x):\n    return str(uuid.uuid4())"),
    "chance: depends on the clock": make_task(
        "import datetime\ndef f(x):\n    return datetime.date.today().year"),
    "chance: depends on the clock ": make_task(
        "from datetime import datetime\n"
        "def f(x):\n    return (datetime.now() - datetime(2020, 1, 1)).days"),
    "chance: depends on  the clock": make_task(
        "import time\ndef f(x):\n    return time.strftime('%Y-%m')"),
    "chance: depends on the hash order": make_task(
        "def f(x):\n    return list({'ab', 'cd', 'ef', 'gh', 'ij', 'kl'})"),
}
CLEAN = [
    make_task("def f(x):\n    return sorted({'a', 'b'})[x - 1]"),
    make_task("import random\ndef f(x):\n    random.seed(x)\n    return random.random()"),
    make_task(
        "from datetime import datetime\ndef f(x):\n    return datetime(2020, x, 1).isoformat()"),
    make_task(
        "def f(g):\n    return g(2)", "f(lambda t: t + 1)", "f(lambda t: [u for u in range(t)])"),
    make_task("import numpy as np\ndef f(x):\n    return np.arange(3)"),
    *mini_tasks("test", 5),
]


def test_audit_reports_each_flaw_and_nothing_else():
    with Scorer(workers=1) as scorer:
        reports = audit([*BAD.values(), *CLEAN], scorer)
    for expected, reasons in zip(BAD, reports):
        assert len(reasons) == 1 + ("nothing defines" in expected), (expected, reasons)
        assert " ".join(expected.split()) in reasons[0], (expected, reasons)
    assert reports[len(BAD):] == [[]] * len(CLEAN)
    assert missing_modules("import os.path, no_such.thing\nfrom . import x") == ["no_such"]


def test_audit_command_and_its_part_in_the_metrics(tmp_path):
    tasks = [*BAD.values()][:3] + CLEAN[:2]
    (tmp_path / "tasks.jsonl").write_text("\n" + "".join(json.dumps(task) + "\n" for task in tasks))
    command = ["-m", "colbench.env.backend.audit", tmp_path / "tasks.jsonl"]
    done = run(*command)
    assert f"{tmp_path}/tasks.jsonl:2: hidden code: raises ZeroDivisionError" in done.stdout
    assert done.stdout.splitlines()[-1] == "5 tasks: 2 clean; flaws: hidden code 3"
    done = run(*command, "--json")
    assert [json.loads(line)["line"] for line in done.stdout.splitlines()] == [2, 3, 4]
    first = flaws(tasks, None, False)
    assert list(first["flawed"]) == [task["id"] for task in tasks[:3]]
    first["flawed"]["kept"] = ["as in the file"]
    assert flaws(tasks, first, False) == first  # read, not computed again
    assert "kept" not in flaws(tasks[1:], first, False)["flawed"]
