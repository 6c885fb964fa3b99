"""The README: its commands run as printed, its line numbers and line counts are right, its links lead somewhere."""

import math
import random
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split("  #")[0].strip() for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()
            if line.strip() and not line.startswith("#")]
NAMES = {"with_hidden_info": "with_hidden_info", "advantage of a message": "advantage", "critic's loss": "critic_loss",
         "pairs of trajectories": "make_pairs", "candidates are ranked": "score_candidates", "pairs of candidates": "draw_pairs",
         "policy's loss": "policy_loss", "hidden information c enters": "with_hidden_info", "ten turns": "play",
         "agent's prompt": "prompt_messages", "searched for c": "test_hidden_info_reaches_neither_agent_nor_policy"}
LINES = {"rejection fine-tuning": "chosen.mean()", "the human": "hidden_information=task["}
RECIPES = re.findall(r"^\| ([^|]+) \| (?:`(\w+\.py)`, `(\w+)`|the same) \| (?:`([^`]+)`|the same) \| `([^`]+)` \|$", README, re.MULTILINE)


def test_lines_that_the_readme_points_at():
    rows = re.findall(r"^\| (.+?) \| \[`(\S+?):(\d+)`\]\((\S+?)#L(\d+)\) \|$", README, re.MULTILINE)
    assert len(rows) >= 8
    for what, file, line, target, anchor in rows:
        assert (file, line) == (target, anchor)
        text = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        name = next((name for words, name in NAMES.items() if words in what), None)
        wanted = f"def {name}(" if name else next(words for start, words in LINES.items() if start in what)
        assert wanted in text, (what, text)


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


def changed(number: int):
    """The stage script as a module, with the line of recipe `number` changed as the README says."""
    rows = []
    for _, script, function, line, new in RECIPES:  # "the same" is the row above
        rows.append((script or rows[-1][0], function or rows[-1][1], line or rows[-1][2], new))
    script, function, line, new = rows[number]
    source = (ROOT / script).read_text(encoding="utf-8")
    assert source.count(line) == 1 and source.rindex(f"def {function}(", 0, source.index(line)) == source.rindex("\ndef ", 0, source.index(line)) + 1
    module = types.ModuleType(script)
    exec(compile(source.replace(line, new), script, "exec"), module.__dict__)
    return module


def test_recipes_do_what_they_say():
    assert len(RECIPES) == 5
    logps = [torch.tensor(row) for row in ([-1.0, -2.0], [-3.0], [-1.5, -1.0], [-2.0])]  # π_φ and π_ref of a+, a−: chosen, rejected, ref, ref
    chosen, rejected, ref_chosen, ref_rejected = logps
    beta, ratio = 0.5, (-3.0 + 2.5) - (-3.0 + 2.0)  # log-ratio of a+ minus that of a−: 0.5
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    ipo, conservative = (changed(k).policy_loss(chosen, rejected, ref_chosen, ref_rejected, beta, 0.1)[0].item() for k in (0, 1))
    nll = 0.1 * 1.5
    assert ipo == pytest.approx((ratio - 1 / (2 * beta)) ** 2 + nll)  # Azar et al. 2024, equation 17
    assert conservative == pytest.approx(-0.9 * math.log(sigmoid(beta * ratio)) - 0.1 * math.log(sigmoid(-beta * ratio)) + nll)
    assert changed(2).draw_pairs([0.3, -1.0, 0.9, 0.1], random.Random(0), "halves", 4, 0.2) == [(2, 1)]
    assert changed(3).advantage(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])).item() == -1.0
    best = changed(4).trajectory_score([torch.tensor([-1.0, -3.0]), torch.tensor([-1.0])], [torch.tensor([-2.0, -2.0]), torch.tensor([-1.25])])
    assert best.item() == 0.25  # turns: 0 and 0.25


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
