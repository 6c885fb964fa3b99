"""Files after a kill, locks, error messages on bad input, and published tasks and trajectories."""
import ast
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

from colbench.env.backend.tasks import check_task, load_tasks
from colbench.env.data import load_trajectories
from colbench.run.errors import UserError, run_main
from colbench.run.files import (
    append_jsonl,
    lock_run,
    read_jsonl,
    read_so_far,
    repair_jsonl,
    seed_of,
    write_aside,
)

ROOT = Path(__file__).resolve().parents[1]


def python(code, *arguments, **settings):
    """Start another Python with this project on its path."""
    settings["env"] = {**os.environ, "PYTHONPATH": str(ROOT), **settings.get("env", {})}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, **settings)


def task(number=0, **changes):
    row = {"problem_description": f"Add {number}. The signature of the function is: def add(n)",
           "ground_truth": f"def add(n):\n    return n + {number}\n",
           "test_cases": {"test1": "add(1)", "test2": "add(-2)"},
           "hidden_information": "the same again"}
    return {key: value for key, value in {**row, **changes}.items() if value != "absent"}


# as Backend Programming reads them
read_trajectories = partial(load_trajectories, check_task=check_task)


def write(path, rows):
    rows = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(row + "\n" for row in rows))
    return path


# ---- files ---------------------------------------------------------------------------------------


def test_rows_survive_any_text(tmp_path):
    texts = ("plain", "two\nlines\r\n", "line separator \u2028 next \x85", "\ud800 alone", "é 漢",
             "")
    rows = [{"text": text} for text in texts]
    path = tmp_path / "rows.jsonl"
    with open(path, "a", encoding="utf-8") as file:
        for row in rows[:3]:
            append_jsonl(file, row)
            assert read_jsonl(path)[-1] == row  # in the file at once, not in a buffer
    for row in rows[3:]:
        append_jsonl(path, row)
    assert read_jsonl(path) == rows == repair_jsonl(path)
    assert path.read_bytes().count(b"\n") == len(rows)


@pytest.mark.parametrize("line, says", [
    ('{"a": 1', "not valid JSON"),
    ("[1, 2]", "expected a JSON object, got a list"),
    ("null", "got a NoneType"),
    ('{"b": 2}', "a: missing"),
    ("[" * 100_000, "not valid JSON"),
])
def test_a_bad_line_is_named(tmp_path, line, says):
    path = write(tmp_path / "rows.jsonl", ['{"a": 1}'] * 15 + ["", line, '{"a": 1}'])
    with pytest.raises(UserError) as error:
        read_jsonl(path, {"a": range(9)})
    message = str(error.value)
    assert message.startswith(f"{path}:17: ") and says in message and "\n" not in message


def test_undecodable_bytes_and_missing_files_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": "\xff"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2: not valid JSON"):
        read_jsonl(path)
    with pytest.raises(UserError, match="nothing: no such file"):
        read_jsonl(tmp_path / "nothing")
    with pytest.raises(UserError, match="directory"):
        read_jsonl(tmp_path)


def test_repair_at_every_length_of_a_torn_file(tmp_path):
    """Wherever a file was cut, its whole rows are kept and appending works."""
    rows = [{"k": i, "text": "é" * i + "}\n"} for i in range(4)]
    whole = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    path = tmp_path / "rows.jsonl"
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        complete = sum(end - 1 <= length for end in ends)  # a row may lack its newline
        assert repair_jsonl(path) == rows[:complete], length
        append_jsonl(path, {"k": "next"})
        assert read_jsonl(path) == rows[:complete] + [{"k": "next"}], length


def test_repair_changes_nothing_it_does_not_understand(tmp_path):
    absent = tmp_path / "absent.jsonl"
    assert repair_jsonl(absent) == [] and not absent.exists()
    path = write(tmp_path / "rows.jsonl", ['{"a": 1}', '{"a": ', '{"a": 3}'])
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"rows\.jsonl:2: not valid JSON"):
        repair_jsonl(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("last, says", [
    (b'{"a": }\n', "not valid JSON"),
    (b"null\n", "expected a JSON object"),
    (b"\xff\n", "not valid JSON"),
    (b'{"a": ' + b"1" * 5000 + b"}\n", "not valid JSON"),
    (b'[{"a": 1}]', "expected a JSON object"),
    (b"a,b", "not valid JSON"),
])
def test_only_what_a_kill_leaves_is_cut_off(tmp_path, last, says):
    """A kill leaves the beginning of an object; anything else at the end of a file is kept."""
    path = tmp_path / "rows.jsonl"
    for first in (b"", b'{"a": 1}\n'):
        path.write_bytes(first + last)
        for read in (repair_jsonl, read_so_far):
            number = 2 if first else 1
            with pytest.raises(UserError, match=rf"rows\.jsonl:{number}: {says}"):
                read(path)
        assert path.read_bytes() == first + last


def test_kill_in_the_middle_of_appends(tmp_path):
    """kill -9 while 200 kB lines are written: every row whose append returned is in the file."""
    path, rng = tmp_path / "rows.jsonl", random.Random(0)
    code = """if True:
        import sys
        from colbench.run.files import append_jsonl, repair_jsonl
        with open(sys.argv[1], "a", encoding="utf-8") as file:
            for number in range(int(sys.argv[2]), 10**9):
                append_jsonl(file, {"number": number, "text": "x" * 200_000})
                print(number, flush=True)"""
    done = 0
    for _ in range(6):
        writer = python(code, path, done)
        said = [writer.stdout.readline() for _ in range(rng.randint(1, 20))]
        writer.send_signal(signal.SIGKILL)
        said += writer.communicate()[0].splitlines()
        last = int([line for line in said if line.strip()][-1])
        rows = repair_jsonl(path)
        assert [row["number"] for row in rows] == list(range(len(rows)))
        assert all(len(row["text"]) == 200_000 for row in rows) and len(rows) > last
        done = len(rows)


def test_write_aside_is_all_or_nothing(tmp_path):
    def make(text):
        def write_directory(path):
            path.mkdir()
            for name in "ab":
                (path / name).write_text(text)
        return write_directory

    def fail(path):
        path.mkdir()
        (path / "a").write_text("half")
        raise RuntimeError("killed here")

    directory, file = tmp_path / "new" / "model", tmp_path / "metrics.json"
    write_aside(directory, make("one"))
    write_aside(file, lambda path: path.write_text("one"))
    with pytest.raises(RuntimeError):
        write_aside(directory, fail)
    assert (directory / "b").read_text() == "one"
    write_aside(directory, make("two"))  # after the failure
    write_aside(file, lambda path: path.write_text("two"))
    paths = directory / "a", directory / "b", file
    assert [path.read_text() for path in paths] == ["two"] * 3
    assert sorted(os.listdir(tmp_path)) == ["metrics.json", "new"]
    assert os.listdir(tmp_path / "new") == ["model"]


def test_a_replaced_directory_exists_at_every_instant(tmp_path):
    if not shutil.which("uname") or os.uname().sysname != "Linux":
        pytest.skip("only Linux swaps two directories in one step")
    path, stop, missing, looks = tmp_path / "policy", threading.Event(), [], []

    def look():
        while not stop.is_set():
            looks.append(1)
            if not path.is_dir():
                missing.append(1)

    write_aside(path, Path.mkdir)
    watcher = threading.Thread(target=look)
    watcher.start()
    for _ in range(300):
        write_aside(path, Path.mkdir)
    stop.set()
    watcher.join()
    assert len(looks) > 100 and not missing


LOCKED = """if True:
    import sys, time
    from colbench.run.errors import run_main
    from colbench.run.files import lock_run
    def main():
        lock_run(sys.argv[1], sys.argv[2])
        print("mine", flush=True)
        time.sleep(float(sys.argv[3]))
    run_main(main)"""


def test_one_process_at_a_time(tmp_path):
    first = python(LOCKED, tmp_path / "run", "collect", 60)
    assert first.stdout.readline() == "mine\n"
    second = python(LOCKED, tmp_path / "run", "collect", 0)
    out, err = second.communicate()
    assert second.returncode == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert str(first.pid) in err and str(tmp_path / "run") in err
    with pytest.raises(UserError):
        lock_run(tmp_path / "run", "collect")
    other = python(LOCKED, tmp_path / "run", "evaluate", 0)  # another stage may run meanwhile
    assert other.communicate()[0] == "mine\n" and other.returncode == 0
    first.kill()
    first.communicate()
    # kill -9 released it; ours stays although nothing keeps the file object
    lock_run(tmp_path / "run", "collect")
    lock_run(tmp_path / "run", "collect")  # a second time in one process
    assert python(LOCKED, tmp_path / "run", "collect", 0).wait() == 2
    lock_run(tmp_path / "run", "collect").close()
    assert python(LOCKED, tmp_path / "run", "collect", 0).wait() == 0


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    code = """if True:
        import os, sys, time
        from colbench.run.files import lock_run
        lock_run(sys.argv[1])
        if os.fork() == 0:
            os.close(1)
            os.close(2)
            time.sleep(5)
            os._exit(0)"""
    assert python(code, tmp_path).wait() == 0
    with lock_run(tmp_path):
        pass


def test_seeds_are_the_same_everywhere_and_differ(tmp_path):
    code = ("from colbench.run.files import seed_of; "
            "print(seed_of('task', 3, 1), seed_of('é', None, 2.5))")
    runs = {python(code, env={"PYTHONHASHSEED": seed}).communicate()[0]
            for seed in ("0", "1", "77")}
    assert runs == {f"{seed_of('task', 3, 1)} {seed_of('é', None, 2.5)}\n"}
    assert seed_of("task", 3, 1) == 7150438281052249605  # another rule would break every resume
    seeds = {seed_of(name, sample, turn)
             for name in ("1", 1, "a") for sample in range(30) for turn in range(30)}
    assert len(seeds) == 2700
    assert all(0 <= seed < 2**63 for seed in seeds) and max(seeds) > 2**62


def raised_during(interrupt):
    """What torch.save raises when Ctrl-C leaves it with half a file."""
    error = RuntimeError("unexpected pos 5292224 vs 5292116")
    error.__context__ = interrupt
    return error


@pytest.mark.parametrize("raised, code, says", [
    (UserError("tasks.jsonl:17: not\nvalid"), 2, "error: tasks.jsonl:17: not valid\n"),
    (KeyboardInterrupt(), 130, "interrupted: run the same command to resume\n"),
    (raised_during(KeyboardInterrupt()), 130, "interrupted: run the same command to resume\n"),
    (PermissionError(13, "Permission denied", "/there/run"), 2,
     "error: /there/run: Permission denied\n"),
    (OSError(28, "No space left on device"), 2, "error: output: No space left on device\n"),
])
def test_user_and_machine_errors_are_one_line(raised, code, says, capsys):
    def main():
        raise raised
    with pytest.raises(SystemExit) as left:
        run_main(main)
    assert left.value.code == code and capsys.readouterr() == ("", says)


def test_a_bug_keeps_its_traceback_and_a_closed_pipe_is_quiet():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 // 0)
    endless = "while True: print('x' * 1000)"
    at_the_end = "print('first', flush=True); sys.stdin.readline(); print('left in the buffer')"
    for body in (endless, at_the_end):
        code = ("import sys; from colbench.run.errors import run_main\n"
                f"def main():\n    {body}\nrun_main(main)")
        writer = python(code, stdin=subprocess.PIPE)
        writer.stdout.readline()
        writer.stdout.close()
        writer.stdin.close()
        assert writer.wait(timeout=20) == 141 and writer.stderr.read() == ""


# ---- tasks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [lambda calls: calls, json.dumps, repr])
def test_published_tasks_load(tmp_path, form):
    calls = {"test1": "add('it\\'s')", "test2": " add(None)  # why not"}
    rows = [task(n, test_cases=form(calls)) for n in range(4)]
    rows[2]["id"] = "mine"
    rows[3] = rows[0]
    loaded = load_tasks(write(tmp_path / "tasks.jsonl", rows))
    fields = {"id", "problem_description", "ground_truth", "test_cases"}
    assert [set(row) for row in loaded] == [fields] * 4
    assert [row["ground_truth"] for row in loaded] == [row["ground_truth"] for row in rows]
    assert loaded[0]["test_cases"] == calls
    ids = [row["id"] for row in loaded]
    assert re.fullmatch("[0-9a-f]{12}", ids[0])
    assert ids[0] == ids[3] != ids[1] and ids[2] == "mine"
    assert load_tasks(str(tmp_path / "tasks.jsonl"), limit=2) == loaded[:2]


@pytest.mark.parametrize("changes, says", [
    (dict(problem_description="absent"), "problem_description: missing"),
    (dict(problem_description=None), "problem_description: missing"),
    (dict(problem_description=" \n"), "problem_description: empty"),
    (dict(problem_description=["a"]), "problem_description: expected a string, got a list"),
    (dict(ground_truth=""), "ground_truth: empty"),
    (dict(ground_truth={"code": "x"}), "ground_truth: expected a string, got an object"),
    (dict(ground_truth="def add(n):\nreturn n"), "ground_truth: not Python"),
    (dict(ground_truth="x = '\0'"), "ground_truth: not Python"),
    (dict(ground_truth="\ud800"), "ground_truth: not Python"),
    (dict(ground_truth="-" * 200_000 + "1"), "ground_truth: not Python"),
    (dict(test_cases="absent"), "test_cases: missing"),
    (dict(test_cases={}), "test_cases: empty"),
    (dict(test_cases="{}"), "test_cases: empty"),
    (dict(test_cases=None), "test_cases: missing"),
    (dict(test_cases={"test1": None}), "test_cases: empty"),
    (dict(test_cases="[" * 100_000), "test_cases: neither JSON nor a Python dict"),
    (dict(test_cases=["add(1)"]), "test_cases: expected an object {name: call}, got list"),
    (dict(test_cases="['add(1)']"), "test_cases: expected an object {name: call}, got list"),
    (dict(test_cases="add(1)"), "test_cases: neither JSON nor a Python dict"),
    (dict(test_cases="{'test1': 'add(1)'"), "test_cases: neither JSON nor a Python dict"),
    (dict(test_cases="__import__('os').system('true')"),
     "test_cases: neither JSON nor a Python dict"),
    (dict(test_cases={"test1": "add(1)", "test7": 5}),
     "test_cases: test7: expected a call as a string, got int"),
    (dict(test_cases={"test7": "x = add(1)"}), "test_cases: test7: not a Python expression"),
    (dict(test_cases={"test7": ""}), "test_cases: test7: not a Python expression"),
])
def test_a_bad_task_is_named_with_file_line_and_field(tmp_path, changes, says):
    rows = [task(n) for n in range(16)] + [task(16, **changes), task(17)]
    path = write(tmp_path / "tasks.jsonl", rows)
    with pytest.raises(UserError) as error:
        load_tasks(path)
    assert str(error.value).startswith(f"{path}:17: {says}") and "\n" not in str(error.value)
    assert len(load_tasks(path, limit=16)) == 16
    row = {"dialogue_history": [USER, AGENT], "task": task(16, **changes)}
    path = write(tmp_path / "trajectories.jsonl", ["", row])
    with pytest.raises(UserError) as error:
        read_trajectories(path)
    assert str(error.value).startswith(f"{path}:2: task: {says}")


def test_two_tasks_with_one_id_are_named(tmp_path):
    rows = [task(0, id="a"), task(0, id="a"), task(1, id="b"), task(1, id="a")]
    path = write(tmp_path / "tasks.jsonl", rows)
    assert [t["id"] for t in load_tasks(path, limit=3)] == ["a", "a", "b"]  # a task may occur twice
    with pytest.raises(UserError, match="tasks.jsonl:4: id: 'a' is also the id of a .* in line 1"):
        load_tasks(path)


def test_files_without_tasks_and_wrong_sources(tmp_path):
    for source, says in [(write(tmp_path / "empty.jsonl", ["", " "]), "empty.jsonl: no tasks"),
                         (tmp_path / "absent.jsonl", "absent.jsonl: no such file"),
                         ("absent.jsonl", "no such file"), (tmp_path, "directory"),
                         ("mini:dev", "mini:train or mini:test"),
                         ("hf://datasets/owner/dataset", "hf://datasets/owner/dataset/path")]:
        with pytest.raises(UserError, match=says):
            load_tasks(source)


def test_mini_tasks_are_a_source():
    train, test = load_tasks("mini:train", 50), load_tasks("mini:test", 50)
    assert len({row["id"] for row in train + test}) == 100
    for row in train + test:
        ast.parse(row["ground_truth"])
        assert set(row) >= {"problem_description", "test_cases"}
        assert len(row["test_cases"]) == 10


# ---- trajectories --------------------------------------------------------------------------------


def trajectory(number, **changes):
    """As published: no id, sample, reward or candidates."""
    history = [{"role": "user", "content": "Please add."},
               {"role": "assistant", "content": "How much?", "input": "<|begin|>…",
                "output": "OUTPUT: How much?"},
               {"role": "user", "content": f"{number}, please."},
               {"role": "assistant", "content": f" I WANT TO ANSWER: return n + {number}",
                "input": "…", "output": "…"}]
    row = {"task": task(number), "dialogue_history": history, "answer": f" return n + {number}"}
    return {key: value for key, value in {**row, **changes}.items() if value != "absent"}


def test_published_trajectories_with_samples_far_apart(tmp_path):
    """k samples of a task are n_tasks lines apart; ids come from tasks, samples from line order."""
    n_tasks, k = 7, 3
    rows = [trajectory(number) for _ in range(k) for number in range(n_tasks)]
    for line, row in enumerate(rows):
        row["answer"] = f"{row['answer']}  # line {line}"
        row["task"]["test_cases"] = str(row["task"]["test_cases"])
    loaded = read_trajectories(write(tmp_path / "offline.jsonl", rows))
    tasks = load_tasks(write(tmp_path / "tasks.jsonl", [task(n) for n in range(n_tasks)]))
    ids = [row["id"] for row in tasks]
    assert [(row["id"], row["sample"]) for row in loaded] == [
        (ids[line % 7], line // 7) for line in range(21)]
    assert [row["answer"] for row in loaded] == [row["answer"] for row in rows]
    assert all(row["task"]["test_cases"] == task()["test_cases"] for row in loaded)
    assert all("reward" not in row for row in loaded)
    assert loaded[0]["dialogue_history"] == rows[0]["dialogue_history"]  # input, output unchanged
    assert read_trajectories(tmp_path / "offline.jsonl", limit=5) == loaded[:5]


def test_our_own_trajectories_keep_all_fields(tmp_path):
    own = trajectory(1, id="t1", sample=2, reward=0.5, system="You help.", outcome="answered",
                     scores={"fixed": 0.5})
    own["task"] = {**own["task"], "id": "t1", "site": "left"}
    own["dialogue_history"][1]["candidates"] = ["How much?", "Why?"]
    loaded, = read_trajectories(write(tmp_path / "own.jsonl", [own]))
    assert loaded == own


def test_samples_stay_unique_when_files_are_put_together(tmp_path):
    rows = [trajectory(1, id="t", sample=sample) for sample in (0, 1, 1)]
    rows += [trajectory(1, id="t"), trajectory(1, id="t"), trajectory(1)]
    loaded = read_trajectories(write(tmp_path / "both.jsonl", rows))
    assert [row["sample"] for row in loaded] == [0, 1, 2, 3, 4, 0] and loaded[-1]["id"] != "t"


def test_missing_answers_and_broken_dialogues(tmp_path):
    rows = [trajectory(5, answer="absent"), trajectory(5, answer=None)]
    last = trajectory(5, answer=None)
    last["dialogue_history"][-1]["content"] = "the last turn counts"
    last["dialogue_history"][2]["content"] = None
    down = "error: the simulator is down"
    rows += [last, trajectory(5, answer=None, dialogue_history=[USER], outcome=down)]
    loaded = read_trajectories(write(tmp_path / "some.jsonl", rows))
    assert [row["answer"] for row in loaded] == [
        " return n + 5", " return n + 5", "the last turn counts", ""]
    assert loaded[2]["dialogue_history"][2]["content"] == "" and loaded[3]["outcome"] == down
    [row] = read_trajectories(write(tmp_path / "null.jsonl", [trajectory(5, reward=None)]))
    assert "reward" not in row


USER, AGENT = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}


@pytest.mark.parametrize("changes, says", [
    (dict(task="absent"), "task: missing"),
    (dict(task="text"), "task: expected an object, got a string"),
    (dict(dialogue_history="absent"), "dialogue_history: missing"),
    (dict(dialogue_history=[]), "dialogue_history: expected a list of messages"),
    (dict(dialogue_history="hello"), "dialogue_history: expected a list, got a string"),
    (dict(dialogue_history=[USER, "!"]), "dialogue_history[1]: expected an object"),
    (dict(dialogue_history=[USER, {"role": "agent", "content": ""}]),
     "dialogue_history[1]: role: "),
    (dict(dialogue_history=[USER, {"content": ""}]), "dialogue_history[1]: role: "),
    (dict(dialogue_history=[USER, AGENT, {"role": "user", "content": 5}]),
     "dialogue_history[2]: content: expected a string"),
    (dict(dialogue_history=[AGENT, USER]),
     "dialogue_history[0]: role: the user's request comes first"),
    (dict(dialogue_history=[USER, USER]), "dialogue_history: no assistant message"),
    (dict(answer=5), "answer: expected a string"),
    (dict(reward="1"), "reward: expected a number, got a string"),
    (dict(reward=float("nan")), "reward: expected a number, got nan"),
    (dict(sample="first"), "sample: expected an integer of at least 0, got a string"),
])
def test_a_bad_trajectory_is_named_with_file_line_and_field(tmp_path, changes, says):
    rows = [trajectory(n) for n in range(3)] + [trajectory(3, **changes)]
    path = write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(UserError) as error:
        read_trajectories(path)
    assert str(error.value).startswith(f"{path}:4: {says}") and "\n" not in str(error.value)
