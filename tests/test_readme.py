"""The README: its commands run as printed, its line numbers and line counts are right, its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split("  #")[0].strip() for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()
            if line.strip() and not line.startswith("#")]
NAMES = {"with_hidden_info": "with_hidden_info", "advantage of a message": "advantage", "critic's loss": "critic_loss",
         "pairs of trajectories": "make_pairs", "candidates are ranked": "score_candidates", "pairs of candidates": "draw_pairs",
         "policy's loss": "policy_loss", "hidden information c enters": "with_hidden_info", "ten turns": "play",
         "agent's prompt": "prompt_messages"}


def test_lines_that_the_readme_points_at():
    rows = re.findall(r"^\| (.+?) \| \[`(\S+?):(\d+)`\]\((\S+?)#L(\d+)\) \|$", README, re.MULTILINE)
    assert len(rows) >= 8
    for what, file, line, target, anchor in rows:
        assert (file, line) == (target, anchor)
        text = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        name = next((name for words, name in NAMES.items() if words in what), None)
        assert f"def {name}(" in text if name else "chosen.mean()" in text, (what, text)


def test_line_counts_of_the_map():
    for files, counts in re.findall(r"^\| (`[^|]+`) \| ([\d, ]+) \|", README, re.MULTILINE):
        for file, count in zip(re.findall(r"`([^`]+)`", files), counts.split(", ")):
            if file.endswith(".py"):
                lines = len((ROOT / file).read_text(encoding="utf-8").splitlines())
                assert abs(lines - int(count)) <= 5, f"{file} has {lines} lines, the README says {count}"


def test_files_that_the_readme_names():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README) + re.findall(r"`((?:colbench|tests)/[\w./]+)`", README):
        assert (ROOT / target).exists(), target


def test_flags_that_the_readme_names():
    """Every script accepts every flag that a command or a table of the README gives it."""
    for script in ("collect.py", "train_critic.py", "train_policy.py", "evaluate.py"):
        text = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for command in [c for c in COMMANDS + re.findall(r"`([^`]+)`", README) if c.startswith((script, f"python {script}"))]:
            for flag in re.findall(r"(--[a-z][\w-]*)", command.split("&&")[0]):
                assert flag in text, f"{script} {flag}"


def test_small_commands_run_as_printed(tmp_path):
    for command in ("python -m colbench.audit mini:test",):
        assert command in COMMANDS
        done = subprocess.run([sys.executable, *command.split()[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "300" in done.stdout, done.stderr


@pytest.mark.slow
def test_commands_that_need_no_gpu_and_no_hub_run_as_printed(tmp_path):
    """The first command without its set-up, then all that build on it, in the order of the README; in a copy of the project."""
    copy = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(copy)], check=True)
    wanted = [c for c in COMMANDS if not re.search(r"llama|vllm|hf |pytest|merge|--talk|RUN/|--env frontend", c)]
    first, *rest = [re.sub(r"^.*pip install -r requirements.txt && ", "", command) for command in wanted]
    assert first.startswith("python collect.py && ") and len(rest) >= 5
    for command in (first, *rest):
        done = subprocess.run(command.replace("python ", f"{sys.executable} "), shell=True, cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
    assert (copy / "runs" / "tiny" / "report.html").exists() and (copy / "runs" / "tiny" / "advantages.jsonl").exists()
