"""The GPU script at a small size: every part finishes and measures something."""
import json
import math
import runpy
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow  # a minute: nine processes that import torch
def test_every_part_of_the_gpu_script_measures_something(tmp_path):
    command = [sys.executable, "tests/gpu/run.py", tmp_path, "--smoke",
               "--wheels", tmp_path / "none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert not [row for row in rows if "error" in row], done.stdout + done.stderr
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["part"] for row in rows} == {
        "correct", "step", "sample", "scripts", "dpo", "continuous"}
    assert all(math.isfinite(row["value"]) for row in rows)
    assert all(row["met"] for row in rows if row["part"] == "correct" and row.get("target"))
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(table) == 1 + len(rows) and "smoke test" in done.stdout


def test_a_part_that_hangs_or_fails_does_not_stop_the_others(tmp_path):
    """The time limit kills it and everything it started; the reason is one line."""
    run = runpy.run_path(str(ROOT / "tests" / "gpu" / "run.py"))["run"]
    child = ("import subprocess, sys; subprocess.run(['sleep', '97.531']); "
             f"open('{tmp_path}/late', 'w')")
    log = tmp_path / "log"
    assert run([sys.executable, "-c", child], log, 1, None) == "time limit of 1 s"
    deadline = time.monotonic() + 10  # a killed process may take a moment to disappear
    while any("97.531" in (process.info["cmdline"] or ())
              for process in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    broken = "import sys; print('much'); sys.exit('no such card')"
    assert run([sys.executable, "-c", broken], log, 9, None) == "exit code 1: no such card"
    assert run([sys.executable, "-c", "print(1)"], log, 9, None) == ""
