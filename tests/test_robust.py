"""Stages under trouble: servers that misbehave, numbers that are no numbers, secrets, tasks that cannot be won."""

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

# ---- servers --------------------------------------------------------------------------------------------------------
TROUBLE = {  # request of the task -> what the server does with every dialogue about it
    "too long": (400, {}, {"error": {"message": "maximum context length is 8192 tokens"}}),
    "busy": (429, QUICK, {"error": {"message": "slow down"}}), "broken": (500, QUICK, {"error": {"message": "cuda"}}),
    "hang up": "hang up", "empty": (200, {}, completion("")), "null": (200, {}, completion(None)),
    "page": (200, {}, "<html>"), "torn": (200, {"Content-Type": "application/json"}, '{"choices": [{"mess'),
    "other": (200, {}, {"choices": "none"}), "endless": (200, {}, completion("word " * 20_000, reason="length")),
}


def write_tasks(path, names):
    rows = [{"id": name, "problem_description": f"{name}: write f.", "ground_truth": "def f(x):\n    return x + 1",
             "test_cases": {"a": "f(1)", "b": "f(2)"}} for name in names]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_trouble_costs_its_own_dialogue(tmp_path):
    """Twenty tasks, ten of them on a server that misbehaves in ten ways. The run ends and counts them, and the same
    command plays them again."""
    names = [name for name in TROUBLE] + [f"fine {k}" for k in range(10)]
    mended = threading.Event()

    def behave(body, earlier):
        name = body["messages"][1]["content"].split(":")[0] if len(body["messages"]) > 1 else ""
        trouble = None if mended.is_set() else TROUBLE.get(name)
        return trouble or "I WANT TO ANSWER:\ndef f(x):\n    return x + 1"

    server = Server(behave)
    try:
        arguments = ["--run", tmp_path, "--tasks", write_tasks(tmp_path / "tasks.jsonl", names), "--n-tasks", 30,
                     "--k", 1, "--model", f"{server.url}#first", "--candidate-share", 0, "--parallel", 8]
        done = run("collect.py", *arguments)
        rows = {row["id"]: row for row in lines(tmp_path / "trajectories.jsonl")}
        assert list(rows) == names
        for name, row in rows.items():
            if name in TROUBLE and name != "endless":
                assert row["outcome"] == "simulation_failed" and row["error"].startswith("agent: "), name
                assert "reward" not in row, name
            else:
                assert row["reward"] == (0.0 if name == "endless" else 1.0)
        assert "9 failed" in done.stdout and "mean reward 0.909" in done.stdout
        counts = [sum(name in last(body) for body in server.requests) for name in TROUBLE]
        assert max(counts[:-1]) <= 10  # bounded: five attempts, twice for a reply without text
        mended.set()
        assert "0 failed" in run("collect.py", *arguments).stdout
        assert [row["outcome"] for row in lines(tmp_path / "trajectories.jsonl")].count("simulation_failed") == 0
    finally:
        server.close()


def test_a_dead_server_ends_the_run_and_the_same_command_goes_on(tmp_path):
    """It answers some requests, then nothing but 503. After its recovery the file is that of one that never failed."""
    state = {"asked": 0, "dies": 9}

    def behave(body, earlier):
        state["asked"] += 1
        if state["asked"] > state["dies"] and state["dies"]:
            return 503, QUICK, {"error": {"message": "shutting down"}}
        said = sum(message["role"] == "assistant" for message in body["messages"])
        return f"question {body['seed'] % 97}?" if said < 1 else "I WANT TO ANSWER:\ndef f(x):\n    return x + 1"

    server = Server(behave)
    try:
        tasks = write_tasks(tmp_path / "tasks.jsonl", [f"t{k}" for k in range(10)])
        arguments = ["--tasks", tasks, "--n-tasks", 10, "--k", 1, "--model", f"{server.url}#first",
                     "--candidate-share", 0, "--parallel", 3]
        stopped = run("collect.py", "--run", tmp_path / "run", *arguments, code=2)
        assert "Traceback" not in stopped.stderr
        assert "shutting down" in [line for line in stopped.stderr.splitlines() if line.startswith("error: ")][-1]
        assert 0 < len(lines(tmp_path / "run/trajectories.jsonl")) < 10
        assert all(row["outcome"] == "answered" for row in lines(tmp_path / "run/trajectories.jsonl"))
        state["dies"] = 0
        run("collect.py", "--run", tmp_path / "run", *arguments)
        run("collect.py", "--run", tmp_path / "straight", *arguments)
        straight = (tmp_path / "straight/trajectories.jsonl").read_bytes()
        assert (tmp_path / "run/trajectories.jsonl").read_bytes() == straight
    finally:
        server.close()


def test_no_secret_in_any_file_or_word(tmp_path):
    """Passwords in addresses and keys in the environment reach the server and nothing else."""
    secrets = ["pass-word-1", "key-in-environment", "hf_token_in_environment", "query-token-2"]
    answer = "I WANT TO ANSWER:\ndef f(x):\n    return x + 1"
    server = Server(lambda body, earlier: "What?" if len(body["messages"]) == 2 else answer)
    address = server.url.replace("http://", f"http://user:{secrets[0]}@") + f"/v1?access={secrets[3]}#first"
    try:
        settings = dict(OPENAI_API_KEY=secrets[1], HF_TOKEN=secrets[2])
        tasks = write_tasks(tmp_path / "tasks.jsonl", ["a", "b"])
        common = ["--run", tmp_path / "run", "--tasks", tasks, "--n-tasks", 2, "--human", address]
        words = ""
        for script, more in (("collect.py", ["--model", address, "--k", 1]), ("evaluate.py", ["--policies", address])):
            done = run(script, *common, *more, **settings)
            words += done.stdout + done.stderr
        server.close()
        done = run("collect.py", *common, "--model", address, "--k", 2, code=2, **settings)  # the server is gone
        words += done.stdout + done.stderr
    finally:
        server.close()
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert len(files) >= 4 and "error: " in words
    with pytest.raises(UserError) as wrong:
        make_human("ftp://user:pass-word-1@host/x?query-token-2")
    words += str(wrong.value)
    for secret in secrets:
        assert secret not in words
        assert [path for path, content in files.items() if secret.encode() in content] == []


# ---- training -------------------------------------------------------------------------------------------------------
def test_steps_without_a_finite_loss_or_gradient_are_counted(tmp_path):
    def step_log(first_step):
        bar = tqdm(range(first_step, 9), initial=first_step, disable=True)
        return training.StepLog(Accelerator(cpu=True), tmp_path / "critic", bar, first_step)

    log = step_log(0)
    seen = []
    steps = [(1.0, 1.0), (math.nan, 1.0), (1.0, math.inf), (1.0, 2.0), (-math.inf, math.nan)]
    for step, (loss, norm) in enumerate(steps):
        log.add(3, loss=torch.tensor(loss), margin=2.0)
        log.add(3, loss=torch.tensor(1.0), margin=2.0)
        log.write(step, log.means(), norm, learning_rate=1e-4)
        seen.append((log.skipped, log.skipped_in_a_row))
    assert seen == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]
    strict = [json.loads(line, parse_constant=lambda word: pytest.fail(word)) for line in open(tmp_path / "critic_log.jsonl")]
    assert [row["loss"] for row in strict] == [1.0, None, 1.0, 1.0, None] and strict[2]["grad_norm"] is None
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
SMALL = {"train_critic": ["--epochs", 1, "--batch-size", 1, "--pairs-per-task", 1, "--save-every", 100],
         "train_policy": ["--epochs", 1, "--batch-size", 1, "--pairs-per-state", 1, "--save-every", 100]}


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """Hand-made trajectories and preferences for sixteen steps of either trainer."""
    folder = tmp_path_factory.mktemp("collected")
    with open(folder / "trajectories.jsonl", "w") as file, open(folder / "preferences.jsonl", "w") as ranked:
        for k, task in enumerate(mini_tasks("train", 16)):
            for sample, text in enumerate(("I WANT TO ANSWER:\nreturn 1", "What is the toll?")):
                history = [{"role": "user", "content": task["problem_description"]},
                           {"role": "assistant", "content": text}]
                file.write(json.dumps({"task": task, "dialogue_history": history, "answer": text,
                                       "reward": float(sample),
                                       "id": task["id"], "sample": sample, "outcome": "limit"}) + "\n")
            ranked.write(json.dumps({"id": task["id"], "sample": 0, "turn": 1, "advantages": [1.0, -1.0],
                                     "candidates": ["a?", "b?"],
                                     "messages": [{"role": "system", "content": "x"}, history[0]]}) + "\n")
    return folder


@pytest.mark.parametrize("name, loss", [("train_critic", "critic_loss"), ("train_policy", "policy_loss")])
def test_bad_steps_are_skipped_and_five_in_a_row_stop_the_run(collected, tmp_path, name, loss):
    source = "trajectories" if name == "train_critic" else "preferences"
    output = name.removeprefix("train_")

    def train(folder, code, **fault):
        return run("-c", FAULTY.format(stage=name, loss=loss, **fault), "--run", folder, f"--{source}",
                   collected / f"{source}.jsonl", *SMALL[name], code=code)

    many = train(tmp_path / "many", 2, factor="inf" if name == "train_policy" else "nan", first=3, last=99)
    assert "Traceback" not in many.stderr
    assert "error: step 6: loss or gradient was NaN or infinite" in many.stderr
    state = torch.load(tmp_path / "many" / f"{output}.checkpoint", weights_only=True)
    assert state["step"] == 7 and all(value.isfinite().all() for value in state["weights"].values())
    again = train(tmp_path / "many", None, factor="1", first=0, last=0)  # mended: it goes on behind step 6
    rows = lines(tmp_path / "many" / f"{output}_log.jsonl")
    assert (tmp_path / "many" / output).exists(), again.stderr
    assert [row["skipped"] for row in rows] == [0, 0, 1, 2, 3, 4, 5] + [5] * 9


def test_messages_that_reach_beyond_the_context_are_left_out(collected, tmp_path):
    """--max-tokens may say more than the model's context: the context counts."""
    rows = lines(collected / "preferences.jsonl")
    rows[0]["candidates"][0] = "word " * 3000
    (tmp_path / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("train_policy.py", "--run", tmp_path, *SMALL["train_policy"], "--max-tokens", 100_000)
    assert "15 pairs at 15 of 16 states; 1 left out for more than 1024 tokens" in done.stdout


# ---- errors of the machine ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("error, says", [
    (MemoryError(), "out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), "out of memory: lower it"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
     "out of memory: lower it"),
    (OSError(27, "File too large"), "File too large"),
    (RuntimeError("I/O error: No space left on device (os error 28)"), "No space"),
])
def test_what_the_machine_lacks_is_one_line(error, says, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as left:
        run_main(main, out_of_memory="lower it")
    words = capsys.readouterr().err
    assert left.value.code == 2 and words.startswith("error: ") and words.count("\n") == 1 and says in words


# ---- the audit ------------------------------------------------------------------------------------------------------
def bad_task(reference, *calls, description="Write f and make it good."):
    return {"id": str(hash(reference)), "problem_description": description, "ground_truth": reference,
            "test_cases": {f"t{i}": call for i, call in enumerate(calls or ("f(1)", "f(2)"))}}


BAD = {
    "hidden code: raises ZeroDivisionError, 2 of 2": bad_task("def f(x):\n    return x / 0"),
    "hidden code: returns None, 1 of 2": bad_task("def f(x):\n    return x if x == 1 else None"),
    "hidden code: needs no_such_module, which": bad_task(
        "import no_such_module\ndef f(x):\n    return no_such_module.f(x)"),
    "hidden code: returns no plain data": bad_task("def f(x):\n    return lambda: x"),
    "hidden code: returns a value that does not equal itself": bad_task("def f(x):\n    return [float('nan')]"),
    "names: a test call uses g, which the description does not": bad_task("def g(x):\n    return x", "g(1)"),
    "names: a test call uses h, which nothing defines": bad_task("def f(x):\n    return x", "f(h)"),
    "names: a test call uses date, which the description": bad_task(
        "from datetime import date\ndef f(x):\n    return x.year", "f(date(2020, 1, 2))"),
    "repeated: 1 of 3": bad_task("def f(x):\n    return x", "f(1)", "f( 1 )", "f(2)"),
    "chance: depends on random numbers": bad_task("import random\ndef f(x):\n    return random.random()"),
    "chance: depends on random": bad_task("import uuid\ndef f(x):\n    return str(uuid.uuid4())"),
    "chance: depends on the clock": bad_task("import datetime\ndef f(x):\n    return datetime.date.today().year"),
    "chance: depends on the clock ": bad_task(
        "from datetime import datetime\ndef f(x):\n    return (datetime.now() - datetime(2020, 1, 1)).days"),
    "chance: depends on  the clock": bad_task("import time\ndef f(x):\n    return time.strftime('%Y-%m')"),
    "chance: depends on the hash order": bad_task("def f(x):\n    return list({'ab', 'cd', 'ef', 'gh', 'ij', 'kl'})"),
}
CLEAN = [
    bad_task("def f(x):\n    return sorted({'a', 'b'})[x - 1]"),
    bad_task("import random\ndef f(x):\n    random.seed(x)\n    return random.random()"),
    bad_task("from datetime import datetime\ndef f(x):\n    return datetime(2020, x, 1).isoformat()"),
    bad_task("def f(g):\n    return g(2)", "f(lambda t: t + 1)", "f(lambda t: [u for u in range(t)])"),
    bad_task("import numpy as np\ndef f(x):\n    return np.arange(3)"), *mini_tasks("test", 5),
]


def test_audit_names_what_is_wrong_and_nothing_else():
    with Scorer(workers=1) as scorer:
        found = audit([*BAD.values(), *CLEAN], scorer)
    for expected, reasons in zip(BAD, found):
        assert len(reasons) == 1 + ("nothing defines" in expected), (expected, reasons)
        assert " ".join(expected.split()) in reasons[0], (expected, reasons)
    assert found[len(BAD):] == [[]] * len(CLEAN)
    assert missing_modules("import os.path, no_such.thing\nfrom . import x") == ["no_such"]


def test_audit_as_a_command_and_in_the_metrics(tmp_path):
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
    first["flawed"]["kept"] = ["as it stands in the file"]
    assert flaws(tasks, first, False) == first  # not computed again
    assert "kept" not in flaws(tasks[1:], first, False)["flawed"]
