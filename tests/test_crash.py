"""Every stage is stopped at random moments, as often as it takes, and must end with the files of an undisturbed run.

Stages run as processes of their own, forked from one that has imported torch: a start takes no time, so there are many.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = {
    "collect": ["--n-tasks", "8", "--k", "4", "--parallel", "12", "--candidate-share", "0.2", "--max-turns", "6"],
    "train_critic": ["--epochs", "1", "--save-every", "2", "--tokens-per-step", "800"],
    "train_policy": ["--epochs", "1", "--save-every", "2"],
    "evaluate": ["--n-tasks", "10", "--parallel", "6", "--max-turns", "6"],
}
FORKER = """if True:
    import json, os, resource, sys
    import collect, evaluate, train_critic, train_policy
    from colbench.files import run_main
    for line in sys.stdin:
        stage, folder, arguments, file_size = json.loads(line)
        pid = os.fork()
        if not pid:
            os.setsid()
            os.chdir(folder)
            output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.argv = [stage + ".py", "--run", "run", *arguments]
            if file_size:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
            try:
                run_main(sys.modules[stage].main)
                code = 0
            except SystemExit as left:
                code = left.code
            except BaseException:
                import traceback
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forker:
    def __init__(self):
        self.process = subprocess.Popen([sys.executable, "-c", FORKER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True)

    def start(self, stage, folder, file_size=0):
        """Start a stage in `folder`; returns its process id. One at a time."""
        self.process.stdin.write(json.dumps([stage, str(folder), STAGES[stage], file_size]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self):
        return int(self.process.stdout.readline())

    def run(self, stage, folder, **settings):
        self.start(stage, folder, **settings)
        return self.wait()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(the forker, {stage: folder before it}, {stage: folder after it}, {stage: seconds it took})"""
    forker, folder = Forker(), tmp_path_factory.mktemp("undisturbed")
    (folder / "run").mkdir()
    before, after, seconds = {}, {}, {}
    for stage in STAGES:
        before[stage] = after.get(list(after)[-1] if after else None, folder.parent / "empty")
        if not after:
            (before[stage] / "run").mkdir(parents=True)
        start = time.monotonic()
        assert forker.run(stage, folder) == 0, (folder / "output").read_text()
        seconds[stage] = time.monotonic() - start
        after[stage] = Path(shutil.copytree(folder, tmp_path_factory.mktemp("after") / stage))
    yield forker, before, after, seconds
    forker.process.kill()
    forker.process.wait()


def contents(folder):
    """{name: content} of all files of a run but for locks; of the step logs without what depends on the clock."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in (folder / "run").rglob("*")
             if path.is_file() and not path.name.startswith(".lock")}
    for name, content in files.items():
        if name.endswith("_log.jsonl"):
            rows = [json.loads(line) for line in content.splitlines()]
            files[name] = [{k: v for k, v in row.items() if k not in ("tokens_per_second", "peak_memory_gb")} for row in rows]
    return files


def assert_same(one, other):
    one, other = contents(one), contents(other)
    assert sorted(one) == sorted(other)
    assert [name for name in one if one[name] != other[name]] == []


def last_line(output):
    return [line for line in output.replace("\r", "\n").splitlines() if line.startswith("error: ")][-1]


def stop_and_go(undisturbed, stage, folder, rng, stops):
    """Stop the stage `stops` times in all, with whatever ends a process; start it again until it ends by itself."""
    forker, before, after, seconds = undisturbed
    while stops:
        shutil.copytree(before[stage], folder)
        while True:
            pid = forker.start(stage, folder)
            if stops:
                time.sleep(rng.uniform(0.02, 0.5) * seconds[stage])
                how = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
                try:
                    os.kill(pid, how)
                    stops -= 1
                except ProcessLookupError:
                    pass
            code, output = forker.wait(), (folder / "output").read_text()
            assert code in (0, 130, -signal.SIGKILL, -signal.SIGHUP, -signal.SIGTERM), output
            assert "Traceback" not in output
            if code == 0:
                break
        assert_same(folder, after[stage])
        shutil.rmtree(folder)


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_twice(undisturbed, stage, tmp_path):
    stop_and_go(undisturbed, stage, tmp_path / "again", random.Random(f"quick {stage}"), 2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_stopped_at_twenty_random_moments(undisturbed, stage, tmp_path):
    stop_and_go(undisturbed, stage, tmp_path / "again", random.Random(f"slow {stage}"), 20)


@pytest.mark.parametrize("stage, share", [("collect", 0.5), ("train_critic", 0.4), ("train_policy", 0.9), ("evaluate", 0.5)])
def test_a_full_disk_is_one_line_and_the_rerun_goes_on(undisturbed, stage, share, tmp_path):
    """No file may become larger than a share of the stage's largest, as if the disk were full at that moment."""
    forker, before, after, _ = undisturbed
    new = set(contents(after[stage])) - set(contents(before[stage]))
    limit = int(share * max((after[stage] / name).stat().st_size for name in new))
    folder = tmp_path / "full"
    shutil.copytree(before[stage], folder)
    assert forker.run(stage, folder, file_size=limit) == 2
    output = (folder / "output").read_text()
    assert "Traceback" not in output and "File too large" in last_line(output), output
    assert forker.run(stage, folder) == 0
    assert_same(folder, after[stage])


def test_a_small_disk(undisturbed, tmp_path):
    """A file system of 100 kB: ENOSPC itself."""
    forker, before, after, _ = undisturbed
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount")
    try:
        assert forker.run("collect", folder) == 2
        output = (folder / "output").read_text()
        assert "No space left on device" in last_line(output) and "Traceback" not in output
        shutil.copytree(folder, tmp_path / "larger")
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    assert forker.run("collect", tmp_path / "larger") == 0
    assert_same(tmp_path / "larger", after["collect"])


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(undisturbed, damage, tmp_path):
    forker, before, after, seconds = undisturbed
    folder = tmp_path / "damaged"
    shutil.copytree(before["train_policy"], folder)
    newest, older = folder / "run/policy.checkpoint", folder / "run/policy.checkpoint.previous"
    pid = forker.start("train_policy", folder)
    while not older.exists():
        assert not (folder / "run/policy").exists()
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    forker.wait()
    data = bytearray(newest.read_bytes() if newest.exists() else older.read_bytes())
    if damage == "cut":
        del data[len(data) // 2:]
    else:
        data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    assert forker.run("train_policy", folder) == 0
    output = (folder / "output").read_text()
    assert output.count("policy.checkpoint: damaged") == 1 and "Traceback" not in output
    assert_same(folder, after["train_policy"])
