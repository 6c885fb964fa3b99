"""The four scripts as a user runs them, with the embedded model and small sizes."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file, save_file

from colbench.env.hidden_info import HIDDEN_INFO
from stages import ROOT, lines, refused, run, start, wait
from test_server import Server

SMALL = ["--n-tasks", "12", "--k", "4", "--candidate-share", "0.2"]
FEW = ["--max-trajectories", "16", "--batch-size", "2"]  # of those 48
CRITIC = ["--epochs", "4", "--learning-rate", "3e-4"]
ANSWER = "I WANT TO ANSWER:\ndef f(x):\n    return x"


def without_clock(rows):
    return [{k: v for k, v in row.items() if k not in ("tokens_per_second", "peak_memory_gb")} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole small run."""
    directory = tmp_path_factory.mktemp("run")
    for script, *args in (["collect.py", *SMALL], ["train_critic.py", *CRITIC], ["train_policy.py", "--epochs", "1"],
                          ["evaluate.py", "--n-tasks", "8"]):
        run(script, "--run", directory, *args)
    return directory


@pytest.fixture()
def collected(finished, tmp_path):
    """A directory in which only stage 1 has run."""
    shutil.copy(finished / "trajectories.jsonl", tmp_path)
    return tmp_path


def test_files_of_a_run(finished):
    trajectories = lines(finished / "trajectories.jsonl")
    assert len({(t["id"], t["sample"]) for t in trajectories}) == len(trajectories) == 48
    for t in trajectories:
        assert {"task", "dialogue_history", "answer", "reward"} <= t.keys() and 0 <= t["reward"] <= 1
        turns = [m for m in t["dialogue_history"] if m["role"] == "assistant"]
        assert 1 <= len(turns) <= 10 and all({"content", "input", "output"} <= m.keys() for m in turns)
        assert all(len(m["candidates"]) == 16 and m["candidates"][0] == m["output"] for m in turns if "candidates" in m)
    share = sum("candidates" in m for t in trajectories for m in t["dialogue_history"]) / sum(
        m["role"] == "assistant" for t in trajectories for m in t["dialogue_history"])
    assert 0.15 < share < 0.25  # asked for were 0.2
    for row in lines(finished / "preferences.jsonl"):
        assert len(row["candidates"]) == len(set(row["candidates"])) == len(row["advantages"])
    log = lines(finished / "critic_log.jsonl")
    assert {"loss", "margin", "rewards/accuracies", "rewards/chosen", "rewards/rejected", "rewards/margins",
            "logps/chosen", "logps/rejected", "log_ratio/chosen", "log_ratio/rejected", "margin/nats",
            "grad_norm", "learning_rate", "tokens_per_second", "peak_memory_gb"} <= log[0].keys()
    assert [row["step"] for row in log] == list(range(len(log)))
    assert abs(log[0]["margin"]) < 1e-3  # at the first step critic and reference are equal
    assert abs(log[0]["log_ratio/chosen"]) < 1e-3
    metrics = json.loads((finished / "metrics.json").read_text())["policies"]
    assert list(metrics) == ["base", str(finished / "policy")]
    low, high = metrics["base"]["fixed"]["success_95"]
    assert low <= metrics["base"]["fixed"]["success"] <= high


def test_hidden_info_reaches_neither_agent_nor_policy(finished):
    seen = [m["input"] for t in lines(finished / "trajectories.jsonl") + lines(finished / "episodes.jsonl")
            for m in t["dialogue_history"] if m["role"] == "assistant"]
    seen += [json.dumps(row["messages"]) for row in lines(finished / "preferences.jsonl")]
    assert len(seen) > 400
    for text in seen:
        assert HIDDEN_INFO.strip() not in text and "  # " not in text  # only references have comments


def test_finished_stages_do_nothing(finished):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file() and ".lock" not in path.name}
    for script, args in [("collect.py", SMALL), ("train_critic.py", CRITIC), ("train_policy.py", ["--epochs", 1]),
                         ("evaluate.py", ["--n-tasks", 8])]:
        assert "already" in run(script, "--run", finished, *args).stdout
    for path, content in before.items():
        assert path.read_bytes() == content, path


@pytest.mark.parametrize("script, changed, says", [
    ("collect.py", [*SMALL, "--temperature", "0.7"], "trajectories.jsonl: made with --temperature 1.0, not 0.7;"),
    ("train_critic.py", [*CRITIC, "--nll-weight", "0.5"], "critic: made with --nll-weight 0.3, not 0.5;"),
    ("train_policy.py", ["--epochs", 1, "--beta", "0.5"], "policy: made with --beta 1.0, not 0.5;")])
def test_other_flags_in_a_finished_run_are_named_and_change_nothing(finished, script, changed, says):
    before = {path: path.read_bytes() for path in finished.glob("*.jsonl")}
    done = run(script, "--run", finished, *changed, "--tokens-per-step" if "train" in script else "--parallel", 900)
    [warning] = [line for line in done.stderr.splitlines() if "warning: " in line]
    assert says in warning and "900" not in warning  # how fast is no matter
    assert {path: path.read_bytes() for path in finished.glob("*.jsonl")} == before


def test_results_do_not_stand_under_flags_or_weights_that_did_not_make_them(finished, tmp_path):
    run_folder = tmp_path / "run"
    shutil.copytree(finished, run_folder)
    policy, critic = run_folder / "policy", run_folder / "critic"
    args = ["--run", run_folder, "--n-tasks", 8, "--policies", "base", policy]  # the policy is in another place now
    before = {path.name: path.read_bytes() for path in run_folder.glob("*.json*")}
    assert "made with --max-turns 10, not 1;" in refused("evaluate.py", *args, "--max-turns", 1)
    assert {path.name: path.read_bytes() for path in run_folder.glob("*.json*")} == before
    run("evaluate.py", *args, "--critic", critic)  # plays the policy under its new name
    credit = (run_folder / "advantages.jsonl").read_bytes()
    for folder in (policy, critic):  # other weights in the same folders
        weights = load_file(folder / "adapter_model.safetensors")
        save_file({name: tensor * 1.5 for name, tensor in weights.items()}, folder / "adapter_model.safetensors")
    assert f"was made with earlier weights of {policy}; delete it" in refused("evaluate.py", *args)
    other = ["--run", tmp_path / "other", "--model", "tiny-frontend", "--n-tasks", 1]
    assert f"{policy}: was trained on another model than" in refused("evaluate.py", *other, "--policies", policy)
    run("evaluate.py", "--run", run_folder, "--n-tasks", 8, "--policies", "base", "--critic", critic)
    assert (run_folder / "advantages.jsonl").read_bytes() != credit
    rows = (run_folder / "preferences.jsonl").read_bytes().splitlines(keepends=True)
    (run_folder / "preferences.jsonl").write_bytes(b"".join(rows[:-1]))
    shutil.copy(finished / "preferences_weights.json", run_folder)
    stored = json.loads((run_folder / "preferences_weights.json").read_text())
    (run_folder / "preferences_weights.json").write_text(json.dumps({str(critic): value for value in stored.values()}))
    assert f"was made with earlier weights of {critic}; delete it" in refused(
        "train_critic.py", "--run", run_folder, *CRITIC)
    assert (run_folder / "preferences.jsonl").read_bytes() == b"".join(rows[:-1])


def test_same_seed_same_trajectories(finished, tmp_path):
    run("collect.py", "--run", tmp_path, *SMALL)
    assert (tmp_path / "trajectories.jsonl").read_bytes() == (finished / "trajectories.jsonl").read_bytes()


def kill_when(ready, *command):
    """Start a script, kill -9 it as soon as ready() holds."""
    pid, deadline = start(*command), time.time() + 120
    while not ready():
        assert time.time() < deadline
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    assert wait().returncode == -9, "it ended before it could be killed"


def test_collect_goes_on_after_kill(tmp_path):
    output = tmp_path / "trajectories.jsonl"
    command = ["collect.py", "--run", tmp_path, "--n-tasks", 8, "--k", 4, "--parallel", 8]
    kill_when(lambda: output.exists() and output.read_bytes().count(b"\n") >= 8, *command)
    before = output.read_bytes().rsplit(b"\n", 1)[0].split(b"\n")
    run(*command)
    rows = lines(output)
    assert len({(t["id"], t["sample"]) for t in rows}) == len(rows) == 32
    assert set(before) <= set(output.read_bytes().split(b"\n"))  # nothing that was written is lost or made again


def test_critic_goes_on_after_kill(collected, tmp_path_factory):
    straight = tmp_path_factory.mktemp("straight")
    shutil.copy(collected / "trajectories.jsonl", straight)
    args = ["--epochs", "2", "--save-every", "2", *FEW]
    run("train_critic.py", "--run", straight, *args)
    log = collected / "critic_log.jsonl"
    command = ["train_critic.py", "--run", collected, *args]
    kill_when(lambda: log.exists() and log.read_bytes().count(b"\n") >= 3, *command)
    assert (collected / "critic.checkpoint").exists() and not (collected / "critic").exists()
    begun = {path: path.read_bytes() for path in collected.glob("[!.]*.*") if "ref_logps" not in path.name}
    assert "critic.checkpoint: made with --no-hidden-info False, not True" in refused(
        *command, "--no-hidden-info")
    trajectories = (collected / "trajectories.jsonl").read_bytes()
    (collected / "trajectories.jsonl").write_bytes(b"".join(trajectories.splitlines(keepends=True)[:24]))
    assert "critic.checkpoint: was trained on different data" in refused(*command)
    (collected / "trajectories.jsonl").write_bytes(trajectories)
    assert {path: path.read_bytes() for path in begun} == begun
    run(*command)
    assert without_clock(lines(log)) == without_clock(lines(straight / "critic_log.jsonl"))
    assert (collected / "preferences.jsonl").read_bytes() == (straight / "preferences.jsonl").read_bytes()


def same_losses(got, expected):
    assert len(got) == len(expected) > 3
    for one, other in zip(got, expected):
        for name in ("loss", "grad_norm", "margin", "logps/chosen"):
            assert one[name] == pytest.approx(other[name], rel=2e-3, abs=2e-4), name


def test_losses_do_not_depend_on_the_budget(collected):
    args = ["--run", collected, "--epochs", 1, *FEW]
    run("train_critic.py", *args)
    expected, ranked = lines(collected / "critic_log.jsonl"), lines(collected / "preferences.jsonl")
    shutil.rmtree(collected / "critic")
    assert "holds another critic's ranking; delete it" in refused("train_critic.py", *args)
    (collected / "preferences.jsonl").unlink()
    run("train_critic.py", *args, "--tokens-per-step", 300)
    same_losses(lines(collected / "critic_log.jsonl"), expected)
    again = lines(collected / "preferences.jsonl")
    assert [row["candidates"] for row in again] == [row["candidates"] for row in ranked]
    assert all(a["advantages"] == pytest.approx(b["advantages"], abs=2e-3) for a, b in zip(again, ranked))


@pytest.mark.slow
def test_losses_do_not_depend_on_the_number_of_processes(collected):
    def train(name, *launch):
        few = FEW if name == "critic" else ["--batch-size", 8]
        command = [sys.executable, *launch, ROOT / f"train_{name}.py", "--run", collected, "--epochs", 1, *few]
        done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"})
        assert done.returncode == 0, done.stderr[-3000:]
        assert bool(re.search("^  processes +2$", done.stdout, re.MULTILINE)) == bool(launch)
        shutil.rmtree(collected / name)
        return lines(collected / f"{name}_log.jsonl")

    # accelerate's own launcher starts several processes on GPUs only
    two_processes = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]
    expected = train("critic")
    ranked = lines(collected / "preferences.jsonl")
    (collected / "preferences.jsonl").unlink()
    same_losses(train("critic", *two_processes), expected)
    again = lines(collected / "preferences.jsonl")
    assert [row["candidates"] for row in again] == [row["candidates"] for row in ranked]
    assert all(a["advantages"] == pytest.approx(b["advantages"], abs=2e-3) for a, b in zip(again, ranked))
    expected = train("policy")
    same_losses(train("policy", *two_processes), expected)


@pytest.mark.slow
def test_full_fine_tuning(collected):
    run("train_critic.py", "--run", collected, "--lora-rank", 0, "--learning-rate", "1e-3", "--epochs", 1, *FEW)
    run("train_policy.py", "--run", collected, "--lora-rank", 0, "--learning-rate", "1e-3", "--epochs", 1)
    assert (collected / "policy" / "config.json").exists()  # a whole model

    def played(name, *policies):
        out = run("evaluate.py", "--run", collected / name, "--n-tasks", 4, "--max-turns", 4, "--policies",
                  *policies).stdout
        assert all(str(policy) in out for policy in policies)
        return [line for line in lines(collected / name / "episodes.jsonl") if line["policy"] == "base"]

    assert played("both", collected / "policy", "base") == played("alone",
                                                                  "base")  # the base model is still there beside it


def test_critic_learns(finished):
    log = lines(finished / "critic_log.jsonl")
    first, last = log[:5], log[-5:]
    assert sum(row["margin"] for row in last) / 5 > sum(row["margin"] for row in first) / 5 + 0.1
    assert sum(row["rewards/accuracies"] for row in last) / 5 > 0.7


def test_displacement_is_told(finished, collected):
    """Without its NLL term and with a small β the loss makes the chosen messages less likely too: one line says so,
    and which flags help. With the preset's there is none."""
    flags = ["--run", collected, "--preferences", finished / "preferences.jsonl", "--pairs-per-state", 2, "--epochs", 3,
             "--batch-size", 4]
    done = run("train_policy.py", *flags, "--beta", 0.1, "--nll-weight", 0, "--learning-rate", "2e-3")
    told = [line for line in done.stderr.splitlines() if "likelihood displacement" in line]
    assert len(told) == 1 and "--nll-weight" in told[0] and "--beta" in told[0]
    log = lines(collected / "policy_log.jsonl")
    nats = float(re.search(r"nats +([\d.]+) per message", done.stdout)[1])
    fallen = [sum(row["log_ratio/chosen"] for row in log[i - 20:i]) / 20 for i in range(20, len(log) + 1)]
    assert min(fallen) < -0.1 * nats
    shutil.rmtree(collected / "policy")
    assert "displacement" not in run("train_policy.py", *flags).stderr


COUNTED = """
import sys
from transformers import AutoModelForCausalLM
import evaluate
load, loaded = AutoModelForCausalLM.from_pretrained, []
AutoModelForCausalLM.from_pretrained = lambda *a, **k: (loaded.append(a), load(*a, **k))[1]
evaluate.main()
print("models loaded:", len(loaded))
"""


def test_one_model_plays_four_roles(finished, tmp_path):
    """Policy, base agent, human, critic and reference in one process load one model; bare it is the base."""
    def play(name, *policies):
        done = run("-c", COUNTED, "--run", tmp_path / name, "--n-tasks", 4, "--max-turns", 3, "--max-new-tokens", 24,
                   "--human", "self", "--policies", *policies)
        assert "models loaded: 1" in done.stdout
        return lines(tmp_path / name / "episodes.jsonl")

    together = play("together", finished / "policy", "base", "--critic", finished / "critic")
    alone = play("alone", "base")
    assert [line for line in together if line["policy"] == "base"] == alone
    credit = lines(tmp_path / "together" / "advantages.jsonl")
    assert len(credit) == 8 and any(abs(turn["advantage"]) > 1e-4 for row in credit for turn in row["turns"])


def test_published_shape(finished, tmp_path):
    """No rewards, no candidates, samples n_tasks lines apart: through scoring, candidates, critic."""
    published = tmp_path / "published.jsonl"
    with open(published, "w") as file:
        for t in lines(finished / "trajectories.jsonl")[:30]:
            history = [{k: m[k] for k in ("role", "content", "input", "output") if k in m}
                       for m in t["dialogue_history"]]
            task = {k: v for k, v in t["task"].items() if k != "id"} | {"test_cases": str(t["task"]["test_cases"])}
            file.write(json.dumps({"task": task, "dialogue_history": history, "answer": t["answer"]}) + "\n")
    shutil.copy(published, tmp_path / "trajectories.jsonl")
    assert "trajectories.jsonl:1: id: missing" in refused("collect.py", "--run", tmp_path)
    (tmp_path / "trajectories.jsonl").unlink()
    run("collect.py", "--run", tmp_path, "--add-candidates-to", published, "--candidate-share", "0.05")
    rows = lines(tmp_path / "trajectories.jsonl")
    assert [t["reward"] for t in rows] == [t["reward"] for t in lines(finished / "trajectories.jsonl")[:30]]
    assert any("candidates" in m for t in rows for m in t["dialogue_history"])
    run("train_critic.py", "--run", tmp_path, "--epochs", 1, *FEW)
    assert lines(tmp_path / "preferences.jsonl")


TASK = {"problem_description": "Write f.", "ground_truth": "def f(x):\n    return x", "test_cases": {"t1": "f(1)"}}


def bad_inputs():
    good, t = json.dumps(TASK), {**TASK, "test_cases": {}}
    return {
        "missing file": (["collect.py", "--tasks", "none.jsonl"], None, ["none.jsonl"]),
        "broken line 17": (["collect.py", "--tasks", "in.jsonl"], "\n".join([good] * 16 + ["{"] + [good]),
                           ["in.jsonl:17"]),
        "empty tasks": (["collect.py", "--tasks", "in.jsonl"], "", ["in.jsonl"]),
        "task without tests": (["collect.py", "--tasks", "in.jsonl"], good + "\n" + json.dumps(t),
                               ["in.jsonl:2", "test"]),
        "unknown model": (["collect.py", "--tasks", "in.jsonl", "--model", "no/such-model"], good, ["no/such-model"]),
        "server refused": (["collect.py", "--tasks", "in.jsonl", "--human", "http://127.0.0.1:9/v1"], good,
                           ["127.0.0.1:9"]),
        "unknown human": (["collect.py", "--tasks", "in.jsonl", "--human", "nobody"], good, ["nobody"]),
        "no trajectories": (["train_critic.py"], None, ["trajectories.jsonl"]),
        "no preferences": (["train_policy.py"], None, ["preferences.jsonl"]),
        "no policy": (["evaluate.py"], None, ["policy"]),
        "no reward": (["train_critic.py", "--trajectories", "in.jsonl"], json.dumps(
            {"task": TASK,
             "dialogue_history": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
             "answer": "y"}), ["in.jsonl:1", "reward"]),
        "no pairs": (["train_critic.py", "--trajectories", "in.jsonl"], "\n".join(json.dumps(
            {"task": TASK,
             "dialogue_history": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
             "answer": "y", "reward": 0.0}) for _ in range(3)), ["in.jsonl", "no pair"]),
    }


@pytest.mark.parametrize("case", bad_inputs())
def test_bad_input_is_one_line_and_exit_code_2(case, tmp_path):
    (script, *args), content, words = bad_inputs()[case]
    if content is not None:
        (tmp_path / "in.jsonl").write_text(content)
    done = run(script, *args, "--run", tmp_path / "run", code=2, cwd=tmp_path)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr
    assert all(word in errors[0] for word in words), errors[0]
    left = [p for p in (tmp_path / "run").glob("*") if not p.name.startswith(".lock") and p.stat().st_size]
    assert not left, left


@pytest.mark.parametrize("command, flag, other", [
    ("train_critic.py --critic regression --no-length-norm", "--no-length-norm", "--critic regression"),
    ("train_critic.py --critic regression --nll-weight=0.1", "--nll-weight", "--critic regression"),
    ("train_critic.py --critic value --official", "--official", "--critic value"),
    ("train_critic.py --critic value --beta 0.1", "--beta", "--critic value"),
    ("train_critic.py --critic value --pairs-per-task 1", "--pairs-per-task", "--critic value"),
    ("train_critic.py --critic judge --lora-rank 4", "--lora-rank", "--critic judge"),
    ("train_critic.py --critic untrained --no-hidden-info", "--no-hidden-info", "--critic untrained"),
    ("train_critic.py --critic rollout --epochs 1", "--epochs", "--critic rollout"),
    ("train_critic.py --official --no-length-norm", "--no-length-norm", "--official"),
    ("train_critic.py --official --nll-weight 0", "--nll-weight", "--official"),
    ("train_policy.py --trajectories x.jsonl", "--trajectories", "--algorithm sweet"),
    ("train_policy.py --pairs-per-task 1", "--pairs-per-task", "--algorithm sweet"),
    ("train_policy.py --algorithm multi-turn-dpo --pairs-per-state 1", "--pairs-per-state",
     "--algorithm multi-turn-dpo"),
    ("train_policy.py --algorithm rft --beta 0.1", "--beta", "--algorithm rft"),
    ("train_policy.py --algorithm rft --preferences x.jsonl", "--preferences", "--algorithm rft"),
    ("evaluate.py --policies base --best-of 4", "--best-of", "--critic"),
    ("evaluate.py --policies base --critic judge", "--critic judge", "--best-of"),
    ("evaluate.py --policies http://127.0.0.1:9/v1 --critic judge --best-of 4", "--best-of", "server"),
])
def test_flags_that_would_have_no_effect_are_refused(command, flag, other, tmp_path):
    line = refused(*command.split(), "--run", tmp_path / "run")
    assert line.startswith("error: ") and flag in line and other in line
    if not command.startswith("evaluate"):
        assert line == f"error: {flag} has no effect with {other}: leave one of them out"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def write_tasks(path, names):
    path.write_text("".join(json.dumps(TASK | {"id": name, "problem_description": f"{name}: write f."}) + "\n"
                            for name in names))
    return path


@pytest.mark.parametrize("script, output", [("collect.py", "trajectories.jsonl"), ("evaluate.py", "episodes.jsonl")])
def test_what_an_error_ended_is_played_again(script, output, tmp_path):
    """The server cannot stand one task. Once it is mended, the same command plays that one again and no other."""
    sick = {"b"}

    def behave(body, earlier):
        name = body["messages"][1]["content"].split(":")[0] if len(body["messages"]) > 1 else ""
        return (400, {}, {"error": {"message": "no"}}) if name in sick else ANSWER

    server = Server(behave)
    try:
        tasks = write_tasks(tmp_path / "tasks.jsonl", "abc")
        agent = {"collect.py": ["--model", f"{server.url}#first", "--k", 1, "--candidate-share", 0],
                 "evaluate.py": ["--policies", f"{server.url}#first"]}[script]
        command = [script, "--run", tmp_path / "run", "--tasks", tasks, "--n-tasks", 3, *agent]
        run(*command)
        first = lines(tmp_path / "run" / output)
        assert [row["outcome"] for row in first] == ["answered", "simulation_failed", "answered"]
        sick.clear()
        server.requests.clear()
        assert "1 of 3" in run(*command).stdout
        assert {body["messages"][1]["content"] for body in server.requests
                if len(body["messages"]) > 1} == {"b: write f."}
        second = lines(tmp_path / "run" / output)
        assert second[::2] == first[::2] and [row["reward"] for row in second] == [1, 1, 1]
        assert "already" in run(*command).stdout
    finally:
        server.close()


def test_a_policy_on_a_server_beside_the_base_model(tmp_path):
    """Its row has the address for a name. The episodes of the base model are those that it plays alone."""
    server = Server(lambda body, earlier: ANSWER)
    try:
        address, common = f"{server.url}/v1#second", ["--n-tasks", 3, "--max-turns", 3]
        run("evaluate.py", "--run", tmp_path / "both", *common, "--policies", "base", address)
        both = lines(tmp_path / "both" / "episodes.jsonl")
        assert [row["policy"] for row in both] == ["base"] * 3 + [address] * 3
        assert list(json.loads((tmp_path / "both" / "metrics.json").read_text())["policies"]) == ["base", address]
        assert {body["model"] for body in server.requests} == {"second"}
        assert all(row["answer"] == ANSWER.partition("\n")[2] for row in both[3:])
        run("evaluate.py", "--run", tmp_path / "alone", *common, "--policies", "base")
        assert lines(tmp_path / "alone" / "episodes.jsonl") == both[:3]
    finally:
        server.close()


def test_comparison_of_runs(finished, tmp_path):
    """Differences on shared episodes by hand; the same policy under two runs' names is all ties."""
    printed = run("-m", "colbench.look.comparison", finished).stdout
    episodes = lines(finished / "episodes.jsonl")
    solved = {(row["policy"], row["id"]): row["reward"] == 1 for row in episodes}
    tasks, policy = {row["id"] for row in episodes}, str(finished / "policy")
    pairs = [(solved[policy, task], solved["base", task]) for task in tasks]
    wins, losses = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    assert f"{policy}  against  base: 8 episodes on 8 tasks" in printed
    [row] = [line for line in printed.splitlines() if re.match("  fixed +success", line)]
    assert f"= {(wins - losses) / 8:+7.1%}" in row
    assert row.endswith(f"wins {wins}, ties {8 - wins - losses}, losses {losses}")
    (tmp_path / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in episodes
                                                     if row["policy"] == "base"))
    printed = run("-m", "colbench.look.comparison", finished, tmp_path).stdout
    assert f"{tmp_path}: base  against  {finished}: base: 8 episodes" in printed
    assert "wins 0, ties 8, losses 0" in printed
    assert "expected at least two policies" in refused("-m", "colbench.look.comparison", tmp_path)


CAPPED = """
import resource, runpy, sys
peak = int(open("/proc/self/status").read().split("VmPeak:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (peak + 500_000_000,) * 2)
runpy.run_path("train_critic.py", run_name="__main__")
"""


def test_out_of_memory_is_one_line_that_names_the_flag(collected):
    """A real allocation that fails: address space is capped at little more than the imports take, and one forward pass
    takes everything."""
    done = run("-c", CAPPED, "--run", collected, "--tokens-per-step", 1_000_000, code=2)
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        "error: out of memory: lower --tokens-per-step (the batch stays the same) or --max-tokens; then run the "
        "same command to resume"]


def test_reference_log_probs_are_computed_once(collected):
    """Another run on the same pairs takes them from the file; a cut file is completed, and the losses are the same."""
    args = ["--run", collected, "--epochs", 1, *FEW]
    run("train_critic.py", *args)
    cache, log = collected / "critic_ref_logps.jsonl", lines(collected / "critic_log.jsonl")
    whole, first = cache.read_bytes(), cache.stat().st_mtime_ns
    shutil.rmtree(collected / "critic")
    (collected / "preferences.jsonl").unlink()
    run("train_critic.py", *args)
    assert cache.stat().st_mtime_ns == first
    assert without_clock(lines(collected / "critic_log.jsonl")) == without_clock(log)
    shutil.rmtree(collected / "critic")
    (collected / "preferences.jsonl").unlink()
    cache.write_bytes(whole[:len(whole) // 2])
    run("train_critic.py", *args, "--learning-rate", "2e-3")
    assert cache.read_bytes() == whole
    assert lines(collected / "critic_log.jsonl")[0]["loss"] == log[0]["loss"]
