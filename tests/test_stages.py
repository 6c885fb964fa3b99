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
FEW = ["--max-trajectories", "16", "--batch-size", "2"]  # of the 48 that SMALL gives
CRITIC = ["--epochs", "4", "--learning-rate", "3e-4"]
ANSWER = "I WANT TO ANSWER:\ndef f(x):\n    return x"


def without_clock(rows):
    varying = ("tokens_per_second", "peak_memory_gb")
    return [{k: v for k, v in row.items() if k not in varying} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small run of all stages."""
    directory = tmp_path_factory.mktemp("run")
    run("collect.py", "--run", directory, *SMALL)
    run("train_critic.py", "--run", directory, *CRITIC)
    run("train_policy.py", "--run", directory, "--epochs", "1")
    run("evaluate.py", "--run", directory, "--n-tasks", "8")
    return directory


@pytest.fixture()
def collected(finished, tmp_path):
    """A directory in which only stage 1 has run."""
    shutil.copy(finished / "trajectories.jsonl", tmp_path)
    return tmp_path


def agent_messages(rows):
    return [m for row in rows for m in row["dialogue_history"] if m["role"] == "assistant"]


def test_files_of_a_run(finished):
    trajectories = lines(finished / "trajectories.jsonl")
    assert len({(t["id"], t["sample"]) for t in trajectories}) == len(trajectories) == 48
    for t in trajectories:
        assert {"task", "dialogue_history", "answer", "reward"} <= t.keys()
        assert 0 <= t["reward"] <= 1
        turns = agent_messages([t])
        assert 1 <= len(turns) <= 10
        assert all({"content", "input", "output"} <= m.keys() for m in turns)
        for m in turns:
            if "candidates" in m:
                assert len(m["candidates"]) == 16 and m["candidates"][0] == m["output"]
    with_candidates = sum("candidates" in m for t in trajectories for m in t["dialogue_history"])
    share = with_candidates / len(agent_messages(trajectories))
    assert 0.15 < share < 0.25  # SMALL asks for 0.2
    for row in lines(finished / "preferences.jsonl"):
        assert len(row["candidates"]) == len(set(row["candidates"])) == len(row["advantages"])
    log = lines(finished / "critic_log.jsonl")
    assert {"loss", "margin", "rewards/accuracies",
            "rewards/chosen", "rewards/rejected", "rewards/margins",
            "logps/chosen", "logps/rejected",
            "log_ratio/chosen", "log_ratio/rejected", "margin/nats",
            "grad_norm", "learning_rate", "tokens_per_second", "peak_memory_gb"} <= log[0].keys()
    assert [row["step"] for row in log] == list(range(len(log)))
    assert abs(log[0]["margin"]) < 1e-3  # the critic starts as the base model (π_ref)
    assert abs(log[0]["log_ratio/chosen"]) < 1e-3
    metrics = json.loads((finished / "metrics.json").read_text())["policies"]
    assert list(metrics) == ["base", str(finished / "policy")]
    low, high = metrics["base"]["fixed"]["success_95"]
    assert low <= metrics["base"]["fixed"]["success"] <= high


def test_hidden_info_reaches_neither_agent_nor_policy(finished):
    episodes = lines(finished / "trajectories.jsonl") + lines(finished / "episodes.jsonl")
    prompts = [m["input"] for m in agent_messages(episodes)]
    prompts += [json.dumps(row["messages"]) for row in lines(finished / "preferences.jsonl")]
    assert len(prompts) > 400
    for prompt in prompts:
        assert HIDDEN_INFO.strip() not in prompt
        assert "  # " not in prompt  # only the hidden code has comments


def test_finished_stages_do_nothing(finished):
    before = {path: path.read_bytes() for path in finished.rglob("*")
              if path.is_file() and ".lock" not in path.name}
    for script, args in [("collect.py", SMALL), ("train_critic.py", CRITIC),
                         ("train_policy.py", ["--epochs", 1]), ("evaluate.py", ["--n-tasks", 8])]:
        assert "already" in run(script, "--run", finished, *args).stdout
    for path, content in before.items():
        assert path.read_bytes() == content, path


@pytest.mark.parametrize("script, changed, message", [
    ("collect.py", [*SMALL, "--temperature", "0.7"],
     "trajectories.jsonl: made with --temperature 1.0, not 0.7;"),
    ("train_critic.py", [*CRITIC, "--nll-weight", "0.5"],
     "critic: made with --nll-weight 0.3, not 0.5;"),
    ("train_policy.py", ["--epochs", 1, "--beta", "0.5"],
     "policy: made with --beta 1.0, not 0.5;"),
])
def test_other_flags_in_a_finished_run_only_give_a_warning(finished, script, changed, message):
    before = {path: path.read_bytes() for path in finished.glob("*.jsonl")}
    speed_flag = "--tokens-per-step" if "train" in script else "--parallel"
    done = run(script, "--run", finished, *changed, speed_flag, 900)
    [warning] = [line for line in done.stderr.splitlines() if "warning: " in line]
    assert message in warning
    assert "900" not in warning  # flags that only change the speed are not compared
    assert {path: path.read_bytes() for path in finished.glob("*.jsonl")} == before


def test_results_of_other_flags_or_weights_are_refused(finished, tmp_path):
    run_folder = tmp_path / "run"
    shutil.copytree(finished, run_folder)
    policy, critic = run_folder / "policy", run_folder / "critic"
    common = ["--run", run_folder, "--n-tasks", 8]
    args = [*common, "--policies", "base", policy]  # the policy has another path now
    before = {path.name: path.read_bytes() for path in run_folder.glob("*.json*")}
    assert "made with --max-turns 10, not 1;" in refused("evaluate.py", *args, "--max-turns", 1)
    assert {path.name: path.read_bytes() for path in run_folder.glob("*.json*")} == before
    run("evaluate.py", *args, "--critic", critic)  # plays the policy under its new path
    credit = (run_folder / "advantages.jsonl").read_bytes()
    for folder in (policy, critic):  # other weights in the same folders
        file = folder / "adapter_model.safetensors"
        save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file)
    assert f"was made with earlier weights of {policy}; delete it" in refused("evaluate.py", *args)
    other = ["--run", tmp_path / "other", "--model", "tiny-frontend", "--n-tasks", 1,
             "--policies", policy]
    assert f"{policy}: was trained on another model than" in refused("evaluate.py", *other)
    run("evaluate.py", *common, "--policies", "base", "--critic", critic)
    assert (run_folder / "advantages.jsonl").read_bytes() != credit
    rows = (run_folder / "preferences.jsonl").read_bytes().splitlines(keepends=True)
    (run_folder / "preferences.jsonl").write_bytes(b"".join(rows[:-1]))
    shutil.copy(finished / "preferences_weights.json", run_folder)
    fingerprints = run_folder / "preferences_weights.json"
    stored = json.loads(fingerprints.read_text())
    fingerprints.write_text(json.dumps({str(critic): value for value in stored.values()}))
    assert f"was made with earlier weights of {critic}; delete it" in refused(
        "train_critic.py", "--run", run_folder, *CRITIC)
    assert (run_folder / "preferences.jsonl").read_bytes() == b"".join(rows[:-1])


def test_same_seed_same_trajectories(finished, tmp_path):
    run("collect.py", "--run", tmp_path, *SMALL)
    first, second = ((folder / "trajectories.jsonl").read_bytes()
                     for folder in (finished, tmp_path))
    assert first == second


def kill_when(ready, *command):
    """Start a script; kill -9 it as soon as ready() is true."""
    pid = start(*command)
    deadline = time.time() + 120
    while not ready():
        assert time.time() < deadline
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    assert wait().returncode == -9, "it ended before it could be killed"


def test_collect_resumes_after_kill(tmp_path):
    output = tmp_path / "trajectories.jsonl"
    command = ["collect.py", "--run", tmp_path, "--n-tasks", 8, "--k", 4, "--parallel", 8]
    kill_when(lambda: output.exists() and output.read_bytes().count(b"\n") >= 8, *command)
    before = output.read_bytes().rsplit(b"\n", 1)[0].split(b"\n")
    run(*command)
    rows = lines(output)
    assert len({(t["id"], t["sample"]) for t in rows}) == len(rows) == 32
    assert set(before) <= set(output.read_bytes().split(b"\n"))  # nothing is lost or made again


def test_critic_resumes_after_kill(collected, tmp_path_factory):
    straight = tmp_path_factory.mktemp("straight")
    shutil.copy(collected / "trajectories.jsonl", straight)
    args = ["--epochs", "2", "--save-every", "2", *FEW]
    run("train_critic.py", "--run", straight, *args)
    log = collected / "critic_log.jsonl"
    command = ["train_critic.py", "--run", collected, *args]
    kill_when(lambda: log.exists() and log.read_bytes().count(b"\n") >= 3, *command)
    assert (collected / "critic.checkpoint").exists() and not (collected / "critic").exists()
    before = {path: path.read_bytes() for path in collected.glob("[!.]*.*")
              if "ref_logps" not in path.name}
    assert "critic.checkpoint: made with --no-hidden-info False, not True" in refused(
        *command, "--no-hidden-info")
    trajectories = collected / "trajectories.jsonl"
    content = trajectories.read_bytes()
    trajectories.write_bytes(b"".join(content.splitlines(keepends=True)[:24]))
    assert "critic.checkpoint: was trained on different data" in refused(*command)
    trajectories.write_bytes(content)
    assert {path: path.read_bytes() for path in before} == before
    run(*command)
    assert without_clock(lines(log)) == without_clock(lines(straight / "critic_log.jsonl"))
    resumed, uninterrupted = ((folder / "preferences.jsonl").read_bytes()
                              for folder in (collected, straight))
    assert resumed == uninterrupted


def assert_same_losses(log, expected):
    assert len(log) == len(expected) > 3
    for row, expected_row in zip(log, expected):
        for name in ("loss", "grad_norm", "margin", "logps/chosen"):
            assert row[name] == pytest.approx(expected_row[name], rel=2e-3, abs=2e-4), name


def assert_same_ranking(rows, expected):
    assert [row["candidates"] for row in rows] == [row["candidates"] for row in expected]
    for row, expected_row in zip(rows, expected):
        assert row["advantages"] == pytest.approx(expected_row["advantages"], abs=2e-3)


def test_losses_do_not_depend_on_tokens_per_step(collected):
    args = ["--run", collected, "--epochs", 1, *FEW]
    run("train_critic.py", *args)
    expected_log = lines(collected / "critic_log.jsonl")
    expected_ranking = lines(collected / "preferences.jsonl")
    shutil.rmtree(collected / "critic")
    assert "holds another critic's ranking; delete it" in refused("train_critic.py", *args)
    (collected / "preferences.jsonl").unlink()
    run("train_critic.py", *args, "--tokens-per-step", 300)
    assert_same_losses(lines(collected / "critic_log.jsonl"), expected_log)
    assert_same_ranking(lines(collected / "preferences.jsonl"), expected_ranking)


@pytest.mark.slow
def test_losses_do_not_depend_on_the_number_of_processes(collected):
    def train(name, *launch):
        few = FEW if name == "critic" else ["--batch-size", 8]
        command = [sys.executable, *launch, ROOT / f"train_{name}.py", "--run", collected,
                   "--epochs", 1, *few]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True,
                              env=variables)
        assert done.returncode == 0, done.stderr[-3000:]
        assert bool(re.search("^  processes +2$", done.stdout, re.MULTILINE)) == bool(launch)
        shutil.rmtree(collected / name)
        return lines(collected / f"{name}_log.jsonl")

    # accelerate's own launcher starts several processes only on GPUs
    two_processes = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]
    expected_log = train("critic")
    expected_ranking = lines(collected / "preferences.jsonl")
    (collected / "preferences.jsonl").unlink()
    assert_same_losses(train("critic", *two_processes), expected_log)
    assert_same_ranking(lines(collected / "preferences.jsonl"), expected_ranking)
    expected_log = train("policy")
    assert_same_losses(train("policy", *two_processes), expected_log)


@pytest.mark.slow
def test_full_fine_tuning(collected):
    flags = ["--run", collected, "--lora-rank", 0, "--learning-rate", "1e-3", "--epochs", 1]
    run("train_critic.py", *flags, *FEW)
    run("train_policy.py", *flags)
    assert (collected / "policy" / "config.json").exists()  # a whole model

    def base_episodes(name, *policies):
        printed = run("evaluate.py", "--run", collected / name, "--n-tasks", 4, "--max-turns", 4,
                      "--policies", *policies).stdout
        assert all(str(policy) in printed for policy in policies)
        episodes = lines(collected / name / "episodes.jsonl")
        return [row for row in episodes if row["policy"] == "base"]

    # a whole model as a policy leaves the base model unchanged
    both = base_episodes("both", collected / "policy", "base")
    assert both == base_episodes("alone", "base")


def test_critic_learns(finished):
    log = lines(finished / "critic_log.jsonl")

    def mean(name, rows):
        return sum(row[name] for row in rows) / len(rows)

    assert mean("margin", log[-5:]) > mean("margin", log[:5]) + 0.1
    assert mean("rewards/accuracies", log[-5:]) > 0.7


def test_likelihood_displacement_gives_a_warning(finished, collected):
    """A small β without the NLL term makes the chosen messages less likely too.

    One line says so and names the flags that help. The preset's values give no such line."""
    flags = ["--run", collected, "--preferences", finished / "preferences.jsonl",
             "--pairs-per-state", 2, "--epochs", 3, "--batch-size", 4]
    done = run("train_policy.py", *flags, "--beta", 0.1, "--nll-weight", 0,
               "--learning-rate", "2e-3")
    [warning] = [line for line in done.stderr.splitlines() if "likelihood displacement" in line]
    assert "--nll-weight" in warning and "--beta" in warning
    log = lines(collected / "policy_log.jsonl")
    nats = float(re.search(r"nats +([\d.]+) per message", done.stdout)[1])
    ratios = [row["log_ratio/chosen"] for row in log]
    running_means = [sum(ratios[i - 20:i]) / 20 for i in range(20, len(log) + 1)]
    assert min(running_means) < -0.1 * nats
    shutil.rmtree(collected / "policy")
    assert "displacement" not in run("train_policy.py", *flags).stderr


COUNTED = """
import sys
from transformers import AutoModelForCausalLM
import evaluate
load = AutoModelForCausalLM.from_pretrained
loaded = []
def counted_load(*args, **settings):
    loaded.append(args)
    return load(*args, **settings)
AutoModelForCausalLM.from_pretrained = counted_load
evaluate.main()
print("models loaded:", len(loaded))
"""


def test_one_loaded_model_fills_all_roles(finished, tmp_path):
    """Policy, base agent, human, critic and π_ref share one model in memory.

    Without an adapter it is the base model."""
    def play(name, *policies):
        done = run("-c", COUNTED, "--run", tmp_path / name, "--n-tasks", 4, "--max-turns", 3,
                   "--max-new-tokens", 24, "--human", "self", "--policies", *policies)
        assert "models loaded: 1" in done.stdout
        return lines(tmp_path / name / "episodes.jsonl")

    together = play("together", finished / "policy", "base", "--critic", finished / "critic")
    alone = play("alone", "base")
    assert [row for row in together if row["policy"] == "base"] == alone
    credit = lines(tmp_path / "together" / "advantages.jsonl")
    assert len(credit) == 8
    assert any(abs(turn["advantage"]) > 1e-4 for row in credit for turn in row["turns"])


def test_published_format(finished, tmp_path):
    """The released data: no rewards, no candidates, samples of a task n_tasks lines apart."""
    published = tmp_path / "published.jsonl"
    original = lines(finished / "trajectories.jsonl")[:30]
    with open(published, "w") as file:
        for t in original:
            history = [{k: m[k] for k in ("role", "content", "input", "output") if k in m}
                       for m in t["dialogue_history"]]
            task = {k: v for k, v in t["task"].items() if k != "id"}
            task["test_cases"] = str(task["test_cases"])
            row = {"task": task, "dialogue_history": history, "answer": t["answer"]}
            file.write(json.dumps(row) + "\n")
    trajectories = tmp_path / "trajectories.jsonl"
    shutil.copy(published, trajectories)
    assert "trajectories.jsonl:1: id: missing" in refused("collect.py", "--run", tmp_path)
    trajectories.unlink()
    run("collect.py", "--run", tmp_path, "--add-candidates-to", published,
        "--candidate-share", "0.05")
    rows = lines(trajectories)
    assert [t["reward"] for t in rows] == [t["reward"] for t in original]
    assert any("candidates" in m for t in rows for m in t["dialogue_history"])
    run("train_critic.py", "--run", tmp_path, "--epochs", 1, *FEW)
    assert lines(tmp_path / "preferences.jsonl")


TASK = {"problem_description": "Write f.", "ground_truth": "def f(x):\n    return x",
        "test_cases": {"t1": "f(1)"}}


def bad_inputs():
    """{name: (command, content of in.jsonl or None, words of the error)}"""
    collect = ["collect.py", "--tasks", "in.jsonl"]
    critic = ["train_critic.py", "--trajectories", "in.jsonl"]
    good = json.dumps(TASK)
    no_tests = json.dumps({**TASK, "test_cases": {}})
    history = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    unscored = {"task": TASK, "dialogue_history": history, "answer": "y"}
    failed = json.dumps({**unscored, "reward": 0.0})
    return {
        "missing file": (["collect.py", "--tasks", "none.jsonl"], None, ["none.jsonl"]),
        "broken line 17": (collect, "\n".join([good] * 16 + ["{"] + [good]), ["in.jsonl:17"]),
        "empty tasks": (collect, "", ["in.jsonl"]),
        "task without tests": (collect, f"{good}\n{no_tests}", ["in.jsonl:2", "test"]),
        "unknown model": ([*collect, "--model", "no/such-model"], good, ["no/such-model"]),
        "server refused": ([*collect, "--human", "http://127.0.0.1:9/v1"], good, ["127.0.0.1:9"]),
        "unknown human": ([*collect, "--human", "nobody"], good, ["nobody"]),
        "no trajectories": (["train_critic.py"], None, ["trajectories.jsonl"]),
        "no preferences": (["train_policy.py"], None, ["preferences.jsonl"]),
        "no policy": (["evaluate.py"], None, ["policy"]),
        "no reward": (critic, json.dumps(unscored), ["in.jsonl:1", "reward"]),
        "no pairs": (critic, "\n".join([failed] * 3), ["in.jsonl", "no pair"]),
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
    written = [path for path in (tmp_path / "run").glob("*")
               if not path.name.startswith(".lock") and path.stat().st_size]
    assert not written, written


@pytest.mark.parametrize("command, flag, other", [
    ("train_critic.py --critic regression --no-length-norm", "--no-length-norm",
     "--critic regression"),
    ("train_critic.py --critic regression --nll-weight=0.1", "--nll-weight", "--critic regression"),
    ("train_critic.py --critic value --official", "--official", "--critic value"),
    ("train_critic.py --critic value --beta 0.1", "--beta", "--critic value"),
    ("train_critic.py --critic value --pairs-per-task 1", "--pairs-per-task", "--critic value"),
    ("train_critic.py --critic judge --lora-rank 4", "--lora-rank", "--critic judge"),
    ("train_critic.py --critic untrained --no-hidden-info", "--no-hidden-info",
     "--critic untrained"),
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
    ("evaluate.py --policies http://127.0.0.1:9/v1 --critic judge --best-of 4", "--best-of",
     "server"),
])
def test_flags_that_would_have_no_effect_are_refused(command, flag, other, tmp_path):
    line = refused(*command.split(), "--run", tmp_path / "run")
    assert line.startswith("error: ") and flag in line and other in line
    if not command.startswith("evaluate"):
        assert line == f"error: {flag} has no effect with {other}: leave one of them out"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def write_tasks(path, names):
    rows = [TASK | {"id": name, "problem_description": f"{name}: write f."} for name in names]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("script, output", [("collect.py", "trajectories.jsonl"),
                                            ("evaluate.py", "episodes.jsonl")])
def test_failed_episodes_are_retried(script, output, tmp_path):
    """The server fails on one task. After its repair the same command retries that task only."""
    failing = {"b"}

    def behave(body, earlier):
        name = body["messages"][1]["content"].split(":")[0] if len(body["messages"]) > 1 else ""
        return (400, {}, {"error": {"message": "no"}}) if name in failing else ANSWER

    server = Server(behave)
    try:
        tasks = write_tasks(tmp_path / "tasks.jsonl", "abc")
        agent = {"collect.py": ["--model", f"{server.url}#first", "--k", 1, "--candidate-share", 0],
                 "evaluate.py": ["--policies", f"{server.url}#first"]}[script]
        command = [script, "--run", tmp_path / "run", "--tasks", tasks, "--n-tasks", 3, *agent]
        run(*command)
        first = lines(tmp_path / "run" / output)
        outcomes = [row["outcome"] for row in first]
        assert outcomes == ["answered", "simulation_failed", "answered"]
        failing.clear()
        server.requests.clear()
        assert "1 of 3" in run(*command).stdout
        descriptions = {body["messages"][1]["content"] for body in server.requests
                        if len(body["messages"]) > 1}
        assert descriptions == {"b: write f."}
        second = lines(tmp_path / "run" / output)
        assert second[::2] == first[::2]
        assert [row["reward"] for row in second] == [1, 1, 1]
        assert "already" in run(*command).stdout
    finally:
        server.close()


def test_a_policy_on_a_server_together_with_the_base_model(tmp_path):
    """Its name is its address. The base model plays the same episodes as without it."""
    server = Server(lambda body, earlier: ANSWER)
    try:
        address = f"{server.url}/v1#second"
        common = ["--n-tasks", 3, "--max-turns", 3]
        run("evaluate.py", "--run", tmp_path / "both", *common, "--policies", "base", address)
        both = lines(tmp_path / "both" / "episodes.jsonl")
        assert [row["policy"] for row in both] == ["base"] * 3 + [address] * 3
        metrics = json.loads((tmp_path / "both" / "metrics.json").read_text())
        assert list(metrics["policies"]) == ["base", address]
        assert {body["model"] for body in server.requests} == {"second"}
        assert all(row["answer"] == ANSWER.partition("\n")[2] for row in both[3:])
        run("evaluate.py", "--run", tmp_path / "alone", *common, "--policies", "base")
        assert lines(tmp_path / "alone" / "episodes.jsonl") == both[:3]
    finally:
        server.close()


def test_comparison_of_runs(finished, tmp_path):
    """Checks the differences by hand; a policy compared with its own copy gives only ties."""
    printed = run("-m", "colbench.look.comparison", finished).stdout
    episodes = lines(finished / "episodes.jsonl")
    solved = {(row["policy"], row["id"]): row["reward"] == 1 for row in episodes}
    tasks = {row["id"] for row in episodes}
    policy = str(finished / "policy")
    pairs = [(solved[policy, task], solved["base", task]) for task in tasks]
    wins = sum(a > b for a, b in pairs)
    losses = sum(a < b for a, b in pairs)
    assert f"{policy}  against  base: 8 episodes on 8 tasks" in printed
    [row] = [line for line in printed.splitlines() if re.match("  fixed +success", line)]
    assert f"= {(wins - losses) / 8:+7.1%}" in row
    assert row.endswith(f"wins {wins}, ties {8 - wins - losses}, losses {losses}")
    base = "".join(json.dumps(row) + "\n" for row in episodes if row["policy"] == "base")
    (tmp_path / "episodes.jsonl").write_text(base)
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
    """A real failed allocation: one forward pass needs more than the cap on the address space."""
    done = run("-c", CAPPED, "--run", collected, "--tokens-per-step", 1_000_000, code=2)
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        "error: out of memory: lower --tokens-per-step (the batch stays the same) or --max-tokens; "
        "then run the same command to resume"]


def test_ref_logps_are_computed_once(collected):
    """Another run on the same pairs reads them from the file.

    A truncated file is completed. The losses stay the same."""
    args = ["--run", collected, "--epochs", 1, *FEW]
    run("train_critic.py", *args)
    cache = collected / "critic_ref_logps.jsonl"
    log = lines(collected / "critic_log.jsonl")
    content, written_at = cache.read_bytes(), cache.stat().st_mtime_ns
    shutil.rmtree(collected / "critic")
    (collected / "preferences.jsonl").unlink()
    run("train_critic.py", *args)
    assert cache.stat().st_mtime_ns == written_at
    assert without_clock(lines(collected / "critic_log.jsonl")) == without_clock(log)
    shutil.rmtree(collected / "critic")
    (collected / "preferences.jsonl").unlink()
    cache.write_bytes(content[:len(content) // 2])
    run("train_critic.py", *args, "--learning-rate", "2e-3")
    assert cache.read_bytes() == content
    assert lines(collected / "critic_log.jsonl")[0]["loss"] == log[0]["loss"]
