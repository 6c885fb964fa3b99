"""--shard i/n: the shards' files together are the file of one whole run."""

import json
from pathlib import Path

import pytest

from colbench.lm.load import load_tokenizer
from colbench.run.errors import UserError
from colbench.run.shards import shard, shard_path, shards_hint
from stages import refused, run


def lines(*paths):
    return [line for path in paths for line in path.read_text().splitlines()]


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "/4", "1/", "1/0", "-1/4", "1/4/2", "a/b",
                                  "1.0/2", "", "１/4"])
def test_invalid_shard(text):
    with pytest.raises(UserError, match="--shard .*expected i/n"):
        shard(text)


def test_shard():
    texts = ("1/1", "1/4", "4/4", "10/12")
    assert [shard(text) for text in texts] == [(1, 1), (1, 4), (4, 4), (10, 12)]
    path = "runs/a.b/trajectories.jsonl"
    assert shard_path(path, (2, 4)) == Path("runs/a.b/trajectories-2of4.jsonl")
    assert shard_path(path, (1, 1)) == Path(path)
    hint = shards_hint(Path("r/episodes-2of4.jsonl"), (2, 4))
    assert "cat r/episodes-*of4.jsonl > r/episodes.jsonl, " in hint
    # the scripts' own slicing: each task once, sizes differ by at most one
    parts = [list(range(10))[i - 1::4] for i in (1, 2, 3, 4)]
    assert sorted(sum(parts, [])) == list(range(10))
    assert {len(part) for part in parts} == {2, 3}


def test_an_invalid_shard_is_reported_in_one_line(tmp_path):
    for script in ("collect.py", "evaluate.py"):
        line = refused(script, "--run", tmp_path, "--shard", "3/2")
        assert line.startswith("error: --shard 3/2: ")


def test_collect_in_shards(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    sizes = ["--n-tasks", 5, "--k", 2, "--candidate-share", "0.1"]
    run("collect.py", "--run", whole, *sizes)
    expected = lines(whole / "trajectories.jsonl")
    for i in (2, 1):
        done = run("collect.py", "--run", parts, *sizes, "--shard", f"{i}/2")
        assert f"cat {parts}/trajectories-*of2.jsonl > {parts}/trajectories.jsonl" in done.stdout
    files = [parts / f"trajectories-{i}of2.jsonl" for i in (1, 2)]
    assert [len(lines(file)) for file in files] == [6, 4]
    assert sorted(lines(*files)) == sorted(expected)
    joined = parts / "trajectories.jsonl"
    joined.write_text("\n".join(lines(*files)) + "\n")  # cat
    assert lines(joined) != expected
    assert "already complete" in run("collect.py", "--run", parts, *sizes).stdout
    assert joined.read_bytes() == (whole / "trajectories.jsonl").read_bytes()
    joined.write_text("\n".join(lines(files[0])) + "\n")  # one is missing: the run makes the rest
    run("collect.py", "--run", parts, *sizes)
    assert joined.read_bytes() == (whole / "trajectories.jsonl").read_bytes()

    # --add-candidates-to in shards; with more shards than trajectories, some are empty
    bare = [json.loads(line) for line in expected[:2]]
    for row in bare:
        for message in row["dialogue_history"]:
            message.pop("candidates", None)
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    for i in (2, 3):
        run("collect.py", "--run", tmp_path / "added", "--shard", f"{i}/3",
            "--add-candidates-to", tmp_path / "bare.jsonl", "--candidate-share", 0.5)
    second, third = (lines(tmp_path / "added" / f"trajectories-{i}of3.jsonl") for i in (2, 3))
    [row] = map(json.loads, second)
    assert (row["id"], row["sample"]) == (bare[1]["id"], bare[1]["sample"])
    assert third == []


def test_evaluate_in_shards(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    sizes = ["--n-tasks", 5, "--k", 2, "--policies", "base"]
    table = run("evaluate.py", "--run", whole, *sizes).stdout
    for i in (2, 1):
        done = run("evaluate.py", "--run", parts, *sizes, "--shard", f"{i}/2")
        assert f"cat {parts}/episodes-*of2.jsonl > {parts}/episodes.jsonl" in done.stdout
    files = [parts / f"episodes-{i}of2.jsonl" for i in (1, 2)]
    assert sorted(lines(*files)) == sorted(lines(whole / "episodes.jsonl"))
    metrics = [json.loads((parts / f"metrics-{i}of2.json").read_text()) for i in (1, 2)]
    assert [row["policies"]["base"]["episodes"] for row in metrics] == [6, 4]
    (parts / "episodes.jsonl").write_text("\n".join(lines(*files)) + "\n")  # cat
    done = run("evaluate.py", "--run", parts, *sizes)
    assert "already complete" in done.stdout
    assert [row for row in done.stdout.splitlines() if row.startswith("base ")] == [
        row for row in table.splitlines() if row.startswith("base ")]  # the table of the whole run
    assert (parts / "episodes.jsonl").read_bytes() == (whole / "episodes.jsonl").read_bytes()
    got, expected = (json.loads((folder / "metrics.json").read_text())["policies"]["base"]
                     for folder in (parts, whole))
    clock_files = [parts / f"episodes-{i}of2_clock.jsonl" for i in (1, 2)]
    clock = [json.loads(line) for line in lines(*clock_files)]
    assert got.pop("clock")["seconds"]["all"] == pytest.approx(sum(row["seconds"] for row in clock))
    del expected["clock"]
    assert got == expected and got["repetitions"][-1]["k"] == 2
    episodes = list(map(json.loads, lines(whole / "episodes.jsonl")))
    tokenizer = load_tokenizer("tiny")
    assert sum(got["endings"].values()) == 10 and got["human"]["contradicting"] == 0
    assert got["endings"].get("right", 0) == sum(episode["reward"] == 1 for episode in episodes)
    prompts = [message["input"] for episode in episodes for message in episode["dialogue_history"]
               if message["role"] == "assistant"]
    assert got["tokens"]["agent_read"]["all"] == sum(
        len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts)
    assert f"{got['tokens']['agent_read']['per_episode']:,.0f} tokens read" in table
