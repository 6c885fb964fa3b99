"""The four scripts on Frontend Design, run as by a user, with the embedded model and a browser."""
import json
import os
import re
import shutil
import signal
import time

import pytest
from PIL import Image

import stages
from colbench.env.frontend.environment import win_rate
from colbench.env.frontend.protocol import final_page
from colbench.env.frontend.score import Pixels
from colbench.env.hidden_info import HIDDEN_INFO
from conftest import needs_browser
from stages import lines
from tiny_vision import save_tiny_vision

pytestmark = needs_browser
SMALL = ["--n-tasks", "3", "--k", "3", "--max-turns", "4"]


def run(script, *args):
    return stages.run(script, "--env", "frontend", *args)


def refused(script, *args):
    return stages.refused(script, "--env", "frontend", *args)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a small complete run, and what evaluate.py printed."""
    directory = tmp_path_factory.mktemp("run")
    run("collect.py", "--run", directory, *SMALL, "--candidate-share", "0.5")
    run("train_critic.py", "--run", directory, "--epochs", 1)
    run("train_policy.py", "--run", directory, "--epochs", 1)
    evaluated = run("evaluate.py", "--run", directory, "--n-tasks", 2, "--max-turns", 3)
    return directory, evaluated.stdout


def test_files_of_a_run(finished):
    directory, _ = finished
    trajectories = lines(directory / "trajectories.jsonl")
    assert len({(t["id"], t["sample"]) for t in trajectories}) == len(trajectories) == 9
    for t in trajectories:
        shots = [m["screenshot"] for m in t["dialogue_history"] if "screenshot" in m]
        shots += [t["scores"]["reference_screenshot"], *filter(None, [t["scores"]["screenshot"]])]
        for path in shots:  # relative to the file
            assert Image.open(directory / path).width == 1366
        assert t["answer"] == (final_page(t["dialogue_history"], "edits") or "")
        picture = t["scores"]["screenshot"]
        measured = Pixels().similarities([(picture and directory / picture,
                                           directory / t["scores"]["reference_screenshot"])])[0]
        assert t["reward"] == t["scores"]["similarity"] == pytest.approx(measured)
        assert t["scores"]["measure"] == "pixel similarity"
        assert t["scores"]["renderer"].startswith("chromium ")
    assert any("screenshot" in m for t in trajectories for m in t["dialogue_history"])
    assert lines(directory / "preferences.jsonl")
    assert (directory / "policy" / "adapter_config.json").exists()


def test_hidden_page_reaches_neither_agent_nor_policy(finished):
    directory, _ = finished
    dialogues = lines(directory / "trajectories.jsonl") + lines(directory / "episodes.jsonl")
    seen = [m["input"] for t in dialogues
            for m in t["dialogue_history"] if m["role"] == "assistant"]
    seen += [json.dumps(row["messages"]) for row in lines(directory / "preferences.jsonl")]
    assert len(seen) > 30
    for text in seen:
        assert HIDDEN_INFO.strip() not in text and "<html" not in text and "bg-" not in text


def test_win_rate_and_the_table(finished):
    directory, printed = finished
    metrics = json.loads((directory / "metrics.json").read_text())
    episodes = lines(directory / "episodes.jsonl")
    policy = str(directory / "policy")
    expected = win_rate([e for e in episodes if e["policy"] == policy],
                        [e for e in episodes if e["policy"] == "base"])
    got = metrics["policies"][policy]["against"]
    assert got["n"] == expected["n"] == 2 and got["win_rate"] == expected["win_rate"]
    assert "against" not in metrics["policies"]["base"]
    assert "win rate against base" in printed and "pixel similarity" in printed
    # against another run: here against its own base policy, so all ties
    again = run("evaluate.py", "--run", directory, "--n-tasks", 2, "--max-turns", 3,
                "--policies", "base", "--against", f"{directory}/episodes.jsonl#base")
    against = json.loads((directory / "metrics.json").read_text())["policies"]["base"]["against"]
    assert (against["win_rate"], against["ties"], against["n"]) == (0.5, 1.0, 2)
    assert re.search(r"episodes.jsonl\b.* complete\b", again.stdout)


def test_resume_renders_nothing_twice(finished, tmp_path):
    """A run that lost its last lines replays them from existing pictures, with the same result."""
    directory, _ = finished
    shutil.copytree(directory / "screenshots", tmp_path / "screenshots")
    whole = (directory / "trajectories.jsonl").read_bytes()
    kept = whole.split(b"\n")[:5]
    (tmp_path / "trajectories.jsonl").write_bytes(b"\n".join(kept) + b'\n{"id": "torn')
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "screenshots").iterdir()}
    run("collect.py", "--run", tmp_path, *SMALL, "--candidate-share", "0.5")
    assert (tmp_path / "trajectories.jsonl").read_bytes() == whole
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "screenshots").iterdir()}
    assert after == before
    again = run("collect.py", "--run", tmp_path, *SMALL, "--candidate-share", "0.5")
    assert re.search(r"trajectories.jsonl\b.* complete\b", again.stdout)


@pytest.mark.slow
def test_vision_critic(finished, tmp_path):
    directory, _ = finished
    shutil.copytree(directory / "screenshots", tmp_path / "screenshots")
    trajectories = lines(directory / "trajectories.jsonl")
    kept = 0
    for message in (m for t in trajectories for m in t["dialogue_history"] if "candidates" in m):
        kept += 1
        message["candidates"] = message["candidates"][:2] if kept < 3 else []
    text = "".join(json.dumps(t) + "\n" for t in trajectories)
    (tmp_path / "trajectories.jsonl").write_text(text)
    vision = save_tiny_vision(tmp_path / "vision")
    args = ("--run", tmp_path, "--critic", "regression", "--vision-critic", vision,
            "--pairs-per-task", 1, "--epochs", 2, "--batch-size", 1, "--save-every", 1,
            "--lora-rank", 2)
    run("train_critic.py", *args)
    log = lines(tmp_path / "critic_log.jsonl")
    assert log[0]["margin"] == 0 and log[0]["grad_norm"] > 0
    rows = lines(tmp_path / "preferences.jsonl")
    assert rows and all(len(row["candidates"]) == len(row["advantages"]) for row in rows)
    assert "task" not in rows[0] and "<html" not in json.dumps(rows)
    # interrupted while ranking
    (tmp_path / "preferences.jsonl").write_text(json.dumps(rows[0]) + "\n")
    run("train_critic.py", *args)
    again = lines(tmp_path / "preferences.jsonl")
    assert again[0] == rows[0] and len(again) == len(rows)
    assert re.search(r"preferences.jsonl\b.* complete\b", run("train_critic.py", *args).stdout)

    (tmp_path / "preferences.jsonl").unlink()
    message = refused("train_critic.py", "--run", tmp_path, "--critic", "regression",
                      "--lora-rank", 2)
    assert "was trained with --vision-critic" in message
    message = refused("evaluate.py", "--run", tmp_path, "--policies", "base",
                      "--critic", tmp_path / "critic", "--best-of", 2)
    assert "sees pictures" in message

    undisturbed = (tmp_path / "critic" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "critic")
    pid, deadline = stages.start("train_critic.py", "--env", "frontend", *args), time.time() + 120
    while not (tmp_path / "critic.checkpoint.previous").exists() and time.time() < deadline:
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    assert stages.wait().returncode == -9 and not (tmp_path / "critic").exists(), "ended too early"
    assert "with --beta 3.0, not 0.2" in refused("train_critic.py", *args, "--beta", 0.2)
    run("train_critic.py", *args)
    assert (tmp_path / "critic" / "adapter_model.safetensors").read_bytes() == undisturbed
    again = lines(tmp_path / "critic_log.jsonl")
    assert [(row["step"], row["loss"]) for row in again] == [
        (row["step"], row["loss"]) for row in log]
    assert lines(tmp_path / "preferences.jsonl") == rows
    assert not (tmp_path / "critic.checkpoint").exists()


@pytest.mark.parametrize("args, words", [
    (["--measure", "/no/such/clip"], "--measure pixels"),
    (["--tasks", "pages:nothing"], "pages:train or pages:test"),
    (["--human", "self"], "sees no pictures"), (["--tasks", "mini:train"], "no such file"),
])
def test_bad_settings_are_reported_in_one_line(tmp_path, args, words):
    assert words in refused("collect.py", "--run", tmp_path, *SMALL, *args)
