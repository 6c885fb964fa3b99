"""Files made or edited by others: any value in a field works or is reported: file, line, field."""
import json
import math
import re
from functools import partial
from types import SimpleNamespace

import collect
import pytest
import train_critic
import train_policy
from accelerate import Accelerator

from colbench.env.backend.environment import Backend
from colbench.env.backend.tasks import load_tasks
from colbench.env.base import environment_of_run
from colbench.env.data import episode_line, load_trajectories, state_line
from colbench.env.dialogue import states_with_candidates
from colbench.env.evidence import evidence
from colbench.env.frontend.environment import Frontend, load_opponent
from colbench.lm.load import load_tokenizer
from colbench.look.comparison import compare_runs
from colbench.look.report import write_report
from colbench.run.errors import UserError
from colbench.run.fields import checked
from colbench.run.files import append_jsonl, repair_jsonl
from colbench.run.settings import read_json
from colbench.train.loop import StepLog
from stages import lines, refused, run


class Nothing:
    """Stands for a missing field."""


VALUES = [None, Nothing, "", "x", 7, -1, 1.5, True, [],
          ["x"], {}, {"a": 1}, 10 ** 400, math.nan, [[]] * 3]
TASK = {"id": "a", "problem_description": "Write f.", "ground_truth": "def f(x):\n    return x + 1",
        "test_cases": {"t1": "f(1)"}}
DIALOGUE = [{"role": "user", "content": "Write f."},
            {"role": "assistant", "content": "What?", "output": "OUTPUT: What?",
             "input": "…", "tokens": 3,
             "read": 20, "written": 6, "candidates": ["What?", "Why?"]},
            {"role": "user", "content": "One.", "leaked": True, "cut": True},
            {"role": "assistant", "content": "I WANT TO ANSWER:\ndef f(x):\n    return x",
             "tokens": 9}]
CALLS = {"passed": 0, "total": 1, "calls": ["wrong"], "expected": ["2"], "got": ["1"]}
TRAJECTORY = {"task": TASK, "dialogue_history": DIALOGUE,
              "answer": "def f(x):\n    return x", "reward": 0.5, "id": "a",
              "sample": 0, "system": "Ask.", "max_turns": 10,
              "outcome": "answered", "error": "none",
              "scores": {"fixed": CALLS, "official": {"passed": 0, "total": 1},
                         "sandbox": "strict", "note": "n"}}
EPISODE = TRAJECTORY | {"policy": "base"}
STATE = {"id": "a", "sample": 0, "turn": 1, "candidates": ["What?", "Why?"],
         "advantages": [0.5, -0.5],
         "messages": [{"role": "system", "content": "Ask."}, DIALOGUE[0]]}
CREDIT = {"policy": "base", "id": "a", "sample": 0, "critic": "c", "weights": "w", "turns": [
    {"advantage": 0.5, "ratios": [[3, 0.5], [5, 0.1]], "candidates": [["What?", 0.5]]}] * 2}
PAGE = {"id": "a", "problem_description": "Make a page.",
        "ground_truth": "<html><body>x</body></html>"}
SHOWN = EPISODE | {"task": PAGE,
                   "scores": {"similarity": 0.5, "measure": "pixels", "renderer": "chromium",
                              "screenshot": "screenshots/1.png", "note": "black"}}
TOOK = {"policy": "base", "episodes": 1, "seconds": 0.5, "requests": 2, "retries": 1}
COST = {"all": 30, "per_episode": 3, "per_solved": 4.5}
EVIDENCE = {"endings": {"right": 1},
            "human": {"replies": 2, "empty": 0.0, "cut": 0.5, "contradicting": 0.5,
                      "contradicting_95": [0.1, 0.9]},
            "tokens": {"agent_read": COST, "uncounted": 1}, "clock": {"seconds": COST},
            "could_have_shown": {"measure": "success", "to": "base", "difference": 0.5},
            "repetitions": [{"k": 2, "pass^k": 0.5, "pass^k_95": [0, 1],
                             "pass@k": 1, "pass@k_95": [0, 1]}]}
LOG = {"step": 0, "loss": 0.7, "margin": 1.0, "skipped": 0,
       "tokens_per_second": 9.0, "peak_memory_gb": 0.1}


def places(value, path=()):
    """The path of every value inside `value`."""
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(part, (dict, list)):
            yield from places(part, (*path, key))


def changed(row, path, value):
    row = json.loads(json.dumps(row))
    *above, last_one = path
    part = row
    for key in above:
        part = part[key]
    if value is Nothing:
        part.pop(last_one)
    else:
        part[last_one] = value
    return row


@pytest.fixture(scope="module")
def readers():
    """file name -> (the line before, a good line, all its readers: functions of the folder)."""
    tokenizer = load_tokenizer("tiny")
    flags = SimpleNamespace(run="r", preset="tiny", seed=0, pairs_per_task=0, max_trajectories=0,
                            official=False, critic="logprob", no_hidden_info=False, max_tokens=1024,
                            pairs_per_state=4, shard=(1, 1), model="tiny")

    def args(folder, **more):
        return SimpleNamespace(**vars(flags) | {name: folder / f"{name}.jsonl" for name in (
            "trajectories", "preferences")} | more)

    def report(folder):
        write_report(folder / "report.html", [folder])

    def baseline(algorithm, folder):
        train_policy.load_baseline(args(folder, algorithm=algorithm), Backend, tokenizer)

    def ranking(folder):
        found = load_trajectories(folder / "trajectories.jsonl", Backend.check_task)
        assert all(state["candidates"] for state in states_with_candidates(found, Backend.prompt))

    def half_done(folder):
        lines = repair_jsonl(folder / "trajectories.jsonl", episode_line(Backend))
        collect.print_summary(args(folder), lines)

    def evaluated(folder):
        lines = repair_jsonl(folder / "episodes.jsonl", episode_line(Backend, policy=True))
        Backend.metrics(lines, {})
        evidence(Backend, {"base": lines}, folder / "episodes.jsonl")

    def pages(folder):
        lines = repair_jsonl(folder / "episodes.jsonl", episode_line(Frontend, policy=True))
        Frontend.metrics(lines)
        load_opponent(f"{folder / 'episodes.jsonl'}#base")

    half = TRAJECTORY | {"reward": 1.0}
    return {
        "tasks": (TASK | {"id": "b"}, TASK, [lambda folder: load_tasks(folder / "tasks.jsonl")]),
        "tasks of pages": (PAGE | {"id": "b"}, PAGE,
                           [lambda folder: Frontend.tasks(folder / "tasks.jsonl")]),
        "trajectories": (half, TRAJECTORY, [
            ranking, half_done, report, partial(baseline, "rft"),
            partial(baseline, "multi-turn-dpo"),
            lambda folder: train_critic.load_examples(args(folder), Backend, tokenizer)]),
        "preferences": (STATE, STATE, [
            lambda folder: train_policy.load_states(args(folder), tokenizer),
            lambda folder: repair_jsonl(folder / "preferences.jsonl", state_line), report]),
        "episodes": (EPISODE | {"policy": "other"}, EPISODE, [
            evaluated, lambda folder: compare_runs([str(folder)]), report]),
        "episodes of pages": (SHOWN | {"policy": "other"}, SHOWN, [pages, report]),
        "advantages": (CREDIT, CREDIT, [report]),
        "episodes_clock": (TOOK, TOOK, [report]),
        "critic_log": (LOG, LOG, [
            lambda folder: StepLog(Accelerator(cpu=True), folder / "critic", None, 5), report])}


FILES = ("tasks", "tasks of pages", "trajectories", "preferences",
         "episodes", "episodes of pages", "advantages",
         "episodes_clock", "critic_log")
SLOW = ("trajectories", "episodes")


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FILES])
def test_any_value_in_any_field_works_or_is_reported(readers, tmp_path, name):
    """Every value of a good line becomes each of VALUES. Every reader of the file works, or reports
    file, line and field. Null is read like a missing field."""
    before, good, functions = readers[name]
    file = tmp_path / f"{name.split()[0]}.jsonl"
    null = {}
    if name in ("advantages", "episodes_clock"):
        append_jsonl(tmp_path / "episodes.jsonl", EPISODE)

    def error_of(line, reader):
        file.write_text(json.dumps(before) + "\n" + json.dumps(line) + "\n")
        try:
            reader(tmp_path)
        except UserError as error:
            return str(error)

    named = rf"{file}:2: .*%s|{file}: |{tmp_path}: "
    assert [error_of(good, reader) for reader in functions] == [None] * len(functions)
    for path in places(good):
        for value in VALUES:
            for k, reader in enumerate(functions):
                error = error_of(changed(good, path, value), reader)
                assert error is None or re.match(named % path[0], error), (path, value)
                if value is None:
                    null[k] = error
                elif value is Nothing and isinstance(path[-1], str):
                    assert error == null[k], path


@pytest.mark.parametrize("name, good", [
    ("episodes_args.json",
     {"env": "backend", "load_in_4bit": False, "temperature": 1.0, "max_new_tokens": 9}),
    ("training_args.json",
     {"critic": "logprob", "no_hidden_info": False, "tokens_per_step": 9, "vision_critic": "x"}),
    ("metrics.json",
     {"audit": {"tasks": "0", "flawed": {}}, "policies": {"base": {"success": 0.5}}}),
    ("metrics.json", {"policies": {"base": EVIDENCE}}),
])
def test_any_value_in_a_settings_file_works_or_is_reported(tmp_path, name, good):
    append_jsonl(tmp_path / "episodes.jsonl", EPISODE)
    file = tmp_path / name
    for path in places(good):
        for value in VALUES:
            file.write_text(json.dumps(changed(good, path, value)))
            try:
                read_json(file)
                environment_of_run(tmp_path)
                write_report(tmp_path / "report.html", [tmp_path])
            except UserError as error:
                text = str(error)
                required = path[-1] in ("tasks", "flawed", "policies", "base") or len(path) > 3
                assert value is not None or required, path
                named = rf"{file}: (.*{path[0]}|not written by evaluate.py)|--env "
                assert re.match(named, text), (path, value, text)


@pytest.mark.parametrize("kind, good, bad", [
    (str, ["", "x"], [7, True, [], {}]),
    (float, [0, -1.5, 10 ** 300], [True, "1", math.nan, math.inf, 10 ** 400]),
    (bool, [True, False], [0, 1, "true"]),
    (range(1, 9), [1, 8.0], [0, 9, 1.5, True, "1", 10 ** 400, math.nan]),
    ({"a", "b"}, ["a"], ["c", 1, ["a"]]),
    ([str], [[], ["x"]], ["x", {}, [None], [7]]),
    ((str, float), [["x", 1]], [["x"], ["x", 1, 2], [1, "x"]]),
    ({"a": str, "b?": str}, [{"a": "x"}], [{}, {"b": "x"}]),
])
def test_kinds(kind, good, bad):
    for value in good:
        assert checked(value, kind, "FILE:3: field") == value
    for value in bad:
        with pytest.raises(UserError, match="FILE:3: field.*(: expected .*, got |: a: missing)"):
            checked(value, kind, "FILE:3: field")
    row = {"a": "x", "b": None, "c": None}
    assert checked(row, {"a": str, "b?": str}, "") == {"a": "x", "c": None}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_lines_of_a_table_library_read_like_those_without_nulls(tmp_path):
    """Table libraries turn integers into floats, and fill fields missing from a line with null."""
    plain = [{"task": TASK, "dialogue_history": DIALOGUE[:2], "sample": 0},
             {"task": TASK | {"id": "b"}, "dialogue_history": DIALOGUE, "sample": 1, "max_turns": 5,
              "system": "Ask."}]
    for row in plain:
        row["dialogue_history"] = [{"role": m["role"], "content": m["content"]}
                                   for m in row["dialogue_history"]]
    fields = dict.fromkeys([*EPISODE, "policy"])
    messages = dict.fromkeys([*DIALOGUE[1], *DIALOGUE[2], "screenshot"])
    table = [fields | row | {
        "sample": float(row["sample"]), "task": row["task"] | {"hidden_information": None},
        "dialogue_history": [messages | m for m in row["dialogue_history"]]} for row in plain]
    table[1]["max_turns"] = 5.0
    made = []
    for name, rows in (("plain", plain), ("table", table)):
        file = write(tmp_path / f"{name}.jsonl", rows)
        run("collect.py", "--run", tmp_path / name, "--add-candidates-to", file,
            "--candidate-share", 0.7, "--n-candidates", 3)
        made.append(lines(tmp_path / name / "trajectories.jsonl"))
        run("train_critic.py", "--run", tmp_path / name, "--critic", "untrained")
        made.append(lines(tmp_path / name / "preferences.jsonl"))
    assert len(made[1]) > 1 and made[1] == made[3]
    without_nulls = dict.fromkeys((f"{name}?" for name in fields), lambda value, _: value)
    for one, other in zip(made[0], made[2]):
        assert one == checked(other, without_nulls, "") | {
            "dialogue_history": one["dialogue_history"], "task": one["task"]}
        assert [m.get("candidates") for m in one["dialogue_history"]] == [
            m.get("candidates") for m in other["dialogue_history"]]


@pytest.mark.parametrize("command, name, good, path, value, says", [
    ("collect.py --add-candidates-to {file}", "made", TRAJECTORY,
     ("dialogue_history", 1, "content"), ["Why?"],
     "dialogue_history[1]: content: expected a string, got a list"),
    ("collect.py --n-tasks 1", "trajectories", TRAJECTORY,
     ("id",), ["a"], "id: expected a string, got a list"),
    ("train_critic.py", "trajectories", TRAJECTORY, ("reward",),
     True, "reward: expected a number, got true"),
    ("train_critic.py", "trajectories", TRAJECTORY, ("dialogue_history", 1, "candidates"), "What?",
     "dialogue_history[1]: candidates: expected a list, got a string"),
    ("train_critic.py", "trajectories", TRAJECTORY, ("reward",),
     Nothing, "reward: missing; score it with collect.py"),
    ("train_policy.py --algorithm rft", "trajectories",
     TRAJECTORY, ("system",), {}, "system: expected a string, got "),
    ("train_policy.py --algorithm multi-turn-dpo", "trajectories",
     TRAJECTORY, ("reward",), 10 ** 400,
     "reward: expected a number, got 1000"),
    ("train_policy.py", "preferences", STATE, ("advantages", 1),
     None, "advantages[1]: expected a number, got n"),
    ("train_policy.py", "preferences", STATE, ("advantages", 1), Nothing,
     "advantages: expected 2, as many as candidates, got 1"),
    ("train_policy.py", "preferences", STATE, ("messages", 1, "role"), "assistant",
     "messages: expected a dialogue that starts"),
    ("evaluate.py --policies base --n-tasks 1", "episodes",
     EPISODE, ("scores", "fixed"), None, "scores: fixed: miss"),
    ("-m colbench.look.comparison {run}", "episodes", EPISODE,
     ("policy",), 7, "policy: expected a string, got 7"),
    ("-m colbench.look.report {run}", "critic_log", LOG,
     ("step",), -1, "step: expected an integer of at least 0"),
    ("evaluate.py --env frontend --policies base --human scripted --measure pixels "
     "--against {file}", "opponent", SHOWN, ("scores",), "x",
     "scores: expected an object, got a string"),
])
def test_scripts_report_what_is_malformed(tmp_path, command, name, good, path, value, says):
    before = good | {"sample": 1, "policy": "other"}
    file = write(tmp_path / f"{name}.jsonl", [before, changed(good, path, value)])
    words = command.format(file=file, run=tmp_path).split()
    folder = [] if words[0] == "-m" else ["--run", tmp_path]
    assert refused(*words, *folder).startswith(f"error: {file}:2: {says}")
