"""Stop every stage at random moments: resumed, it must end with the files of an undisturbed run."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from stages import run, start, wait

STAGES = {
    "collect": ["--n-tasks", "6", "--k", "4", "--parallel", "12", "--candidate-share", "0.1",
                "--max-turns", "6"],
    "train_critic": ["--epochs", "1", "--save-every", "2", "--tokens-per-step", "800"],
    "train_policy": ["--epochs", "1", "--save-every", "2", "--batch-size", "4"],
    "evaluate": ["--n-tasks", "6", "--parallel", "4", "--max-turns", "6"],
}


def begin(stage, folder, **settings):
    return start(f"{stage}.py", "--run", "run", *STAGES[stage], cwd=folder, **settings)


def finish(stage, folder, **settings):
    return run(f"{stage}.py", "--run", "run", *STAGES[stage], cwd=folder, code=None, **settings)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """({stage: folder before it}, {stage: folder after it}, {stage: seconds it took})"""
    run("-c", "pass")  # the first start takes seconds
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "run").mkdir()
    before, after, seconds = {}, {}, {}
    for stage in STAGES:
        before[stage] = after.get(list(after)[-1] if after else None, folder.parent / "empty")
        if not after:
            (before[stage] / "run").mkdir(parents=True)
        began = time.monotonic()
        done = finish(stage, folder)
        assert done.returncode == 0, done.stderr
        seconds[stage] = time.monotonic() - began
        after[stage] = Path(shutil.copytree(folder, tmp_path_factory.mktemp("after") / stage))
    return before, after, seconds


def contents(folder):
    """{name: content} of all files of a run, without locks and what depends on the clock."""
    files = {str(path.relative_to(folder)): path.read_bytes()
             for path in (folder / "run").rglob("*")
             if path.is_file() and not path.name.startswith(".lock")
             and path.name != "episodes_clock.jsonl"}
    for name, content in files.items():
        if name.endswith("metrics.json"):
            files[name] = metrics = json.loads(content)
            for policy in metrics["policies"].values():
                assert policy.pop("clock")["seconds"]["all"] > 0
        if name.endswith("report.html"):
            head, data, tail = re.split(rb'(?<=id="data">)(.*)(?=</script>\n<script>)', content)
            data = json.loads(data)
            sections = [section for section in data["table"]["sections"]
                        if section["title"] != "Time and requests per episode"]
            assert len(sections) == len(data["table"]["sections"]) - 1
            data["table"]["sections"] = sections
            files[name] = head, data, tail
        if name.endswith("_log.jsonl"):
            rows = [json.loads(line) for line in content.splitlines()]
            for row in rows:
                row.pop("tokens_per_second", None)
                row.pop("peak_memory_gb", None)
            files[name] = rows
    return files


def assert_same(one, other):
    """Compare the same run, resumed and undisturbed.

    Resumed dialogues and states run in other batches. That changes the last bits of log-probs, so
    now and then a sampled token and its episode. Everything else is byte-equal."""
    one, other = contents(one), contents(other)
    assert sorted(one) == sorted(other)
    differing = {name for name in one if one[name] != other[name]}
    for name in differing & {"run/trajectories.jsonl", "run/episodes.jsonl"}:
        rows, expected = ([json.loads(line) for line in files[name].splitlines()]
                          for files in (one, other))
        assert [key_of(row) for row in rows] == [key_of(row) for row in expected]
        assert sum(a != b for a, b in zip(rows, expected)) <= len(rows) / 10
        differing -= {name, "run/metrics.json", "run/report.html"}
    for name in differing & {"run/preferences.jsonl"}:
        rows, expected = ({key_of(row): row for row in map(json.loads, files[name].splitlines())}
                          for files in (one, other))
        assert rows.keys() == expected.keys() and len(rows) == one[name].count(b"\n")
        for key, row in rows.items():
            assert row.pop("advantages") == pytest.approx(expected[key].pop("advantages"), abs=1e-4)
            assert row == expected[key]
        differing -= {name}
    assert not differing


def key_of(row):
    return [row.get(name) for name in ("policy", "id", "sample", "turn")]


def whole_lines(folder):
    """The whole lines of the files that a stage appends to."""
    files = [folder / "run" / f"{name}.jsonl"
             for name in ("trajectories", "preferences", "episodes")]
    return {line for path in files if path.exists()
            for line in path.read_bytes().split(b"\n")[:-1]}


def error_of(done):
    """The error line of a stage that hit a limit of the machine."""
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    printed = done.stderr.replace("\r", "\n").splitlines()
    return [line for line in printed if line.startswith("error: ")][-1]


def stop_and_resume(undisturbed, stage, folder, rng, stops):
    """Stop the stage `stops` times with random signals; restart it until it ends by itself."""
    before, after, seconds = undisturbed
    while stops:
        shutil.copytree(before[stage], folder)
        kept = whole_lines(folder)
        while True:
            pid = begin(stage, folder)
            if stops:
                time.sleep(rng.uniform(0.02, 0.5) * seconds[stage])
                stop_signal = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT,
                                          signal.SIGHUP, signal.SIGTERM])
                try:
                    os.kill(pid, stop_signal)
                    stops -= 1
                except ProcessLookupError:
                    pass
            done = wait()
            assert kept <= whole_lines(folder)  # no written line is lost or made again
            kept = whole_lines(folder)
            codes = (0, 130, -signal.SIGKILL, -signal.SIGHUP, -signal.SIGTERM)
            assert done.returncode in codes, done.stderr
            assert "Traceback" not in done.stderr
            if done.returncode == 0:
                break
        assert_same(folder, after[stage])
        shutil.rmtree(folder)


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_twice(undisturbed, stage, tmp_path):
    stop_and_resume(undisturbed, stage, tmp_path / "again", random.Random(f"quick {stage}"), 2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_stopped_at_twenty_random_moments(undisturbed, stage, tmp_path):
    stop_and_resume(undisturbed, stage, tmp_path / "again", random.Random(f"slow {stage}"), 20)


@pytest.mark.parametrize("stage, share", [("collect", 0.5), ("train_critic", 0.4),
                                          ("train_policy", 0.9), ("evaluate", 0.5)])
def test_a_full_disk_is_one_line_and_the_rerun_resumes(undisturbed, stage, share, tmp_path):
    """A limit on file size, a share of the stage's largest file, stands in for a full disk."""
    before, after, _ = undisturbed
    new = set(contents(after[stage])) - set(contents(before[stage]))
    limit = int(share * max((after[stage] / name).stat().st_size for name in new))
    folder = tmp_path / "full"
    shutil.copytree(before[stage], folder)
    assert "File too large" in error_of(finish(stage, folder, file_size=limit))
    assert finish(stage, folder).returncode == 0
    assert_same(folder, after[stage])


def test_a_small_disk(undisturbed, tmp_path):
    """A file system of 60 kB: a real ENOSPC."""
    _, after, _ = undisturbed
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=60k", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no permission to mount")
    try:
        assert "No space left on device" in error_of(finish("collect", folder))
        shutil.copytree(folder, tmp_path / "larger")
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    assert finish("collect", tmp_path / "larger").returncode == 0
    assert_same(tmp_path / "larger", after["collect"])


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_falls_back_to_the_previous_one(undisturbed, damage, tmp_path):
    before, after, _ = undisturbed
    folder = tmp_path / "damaged"
    shutil.copytree(before["train_policy"], folder)
    newest, older = folder / "run/policy.checkpoint", folder / "run/policy.checkpoint.previous"
    pid = begin("train_policy", folder)
    while not older.exists():
        assert not (folder / "run/policy").exists()
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    wait()
    data = bytearray(newest.read_bytes() if newest.exists() else older.read_bytes())
    if damage == "cut":
        del data[len(data) // 2:]
    else:
        data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    done = finish("train_policy", folder)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert (done.stdout + done.stderr).count("policy.checkpoint: damaged") == 1
    assert_same(folder, after["train_policy"])
