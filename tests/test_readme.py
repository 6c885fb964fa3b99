"""The READMEs: commands run as printed, line references and links are right, recipes work."""
import json
import random
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import stages
from conftest import help_page

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGE = (ROOT / "colbench" / "README.md").read_text(encoding="utf-8")
ALL = [ROOT / folder / "README.md"
       for folder in (".", "colbench", "colbench/env/frontend", "tests")]
NAMES = {  # words in a row of the README's table -> the function at that line
    "c enters": "with_hidden_info",
    "which holds c, is dropped": "without_hidden_info",
    "agent's prompt": "prompt_messages",
    "searched for traces of c": "test_hidden_info_reaches_neither_agent_nor_policy",
    "advantage of a message": "advantage",
    "critic's loss": "critic_loss",
    "pairs of trajectories": "trajectory_pairs",
    "pairs of candidates": "policy_pairs",
    "policy's loss": "policy_loss",
    "rejection fine-tuning": "imitation_loss"}
RECIPES = re.findall(r"^  (\w+\.py), (\w+): .*\n- (.*)\n\+ (.*)$", README, re.MULTILINE)


def commands(text: str) -> list[str]:
    """The commands in a README's bash blocks, with continued lines joined and comments cut."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    lines = [line.split("  #")[0].strip() for line in blocks.splitlines()
             if not line.startswith("#")]
    return [re.sub(r" +", " ", line) for line in lines if line]


def test_the_readme_points_at_the_right_lines():
    rows = re.findall(r"^\| (.+?) \| \[`(\S+?):(\d+)`\]\((\S+?)#L(\d+)\) \|$",
                      README, re.MULTILINE)
    assert len(rows) == len(NAMES)
    for label, file, line, target, anchor in rows:
        assert (file, line) == (target, anchor)
        text = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        [name] = [name for words, name in NAMES.items() if words in label]
        assert text.startswith(f"def {name}("), (label, text)


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_files_in_a_readme_exist(path):
    text = path.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([\w-]+))?\)", text):
        assert not target or (path.parent / target).exists(), target
        if anchor and (not target or target.endswith(".md")):
            linked = path.parent / target if target else path
            titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
                       for title in titles}
            assert anchor in anchors, anchor
    for name in re.findall(r"`((?:colbench|tests)/[\w./]+\w)`", text):
        assert (ROOT / name).exists(), name
    for module in re.findall(r"python -m (colbench[\w.]+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


def test_flags_in_the_readmes_exist():
    """Every script accepts every flag that a command or a table gives it."""
    texts = "\n".join(path.read_text(encoding="utf-8") for path in ALL)
    help_pages = {}
    for command in commands(texts) + re.findall(r"`([^`\n]+)`", texts):
        for part in re.split(r"&&|;", command):
            match = re.match(r"(?:.* )?(collect|train_critic|train_policy|evaluate)\.py ",
                             part.strip())
            if not match:
                continue
            script = match[1]
            frontend = "--env frontend" in part or "--vision-critic" in part
            key = script, "frontend" if frontend else "backend"
            if key not in help_pages:
                help_pages[key] = help_page(*key)
            for flag in re.findall(r"(?<=\s)(--[a-z][\w-]*)", part.split(f"{script}.py")[1]):
                assert re.search(rf"{flag}\b", help_pages[key]), f"{part}: {flag}"
    assert len(help_pages) >= 5


def changed(number: int):
    """The stage script as a module, with one line changed as recipe `number` says."""
    script, function, line, new = RECIPES[number]
    source = (ROOT / script).read_text(encoding="utf-8")
    at = source.index(line)
    assert source.count(line) == 1
    assert source.rindex(f"def {function}(", 0, at) == source.rindex("\ndef ", 0, at) + 1
    module = types.ModuleType(script)
    exec(compile(source.replace(line, new), script, "exec"), module.__dict__)
    return module


def test_recipes_do_what_they_say():
    assert len(RECIPES) == 3
    chosen, ref_chosen = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    rejected, ref_rejected = torch.tensor([-3.0]), torch.tensor([-2.0])
    beta = 0.5
    margin = (-3.0 + 2.5) - (-3.0 + 2.0)  # log-ratio of chosen minus that of rejected: 0.5
    ipo = changed(0).policy_loss(chosen, rejected, ref_chosen, ref_rejected, beta, 0.1)[0].item()
    nll = 0.1 * 1.5
    assert ipo == pytest.approx((margin - 1 / (2 * beta)) ** 2 + nll)  # Azar et al. 2024, eq. 17
    assert changed(1).policy_pairs([0.3, -1.0, 0.9, 0.1], random.Random(0), 4) == [(2, 1)]
    best = changed(2).trajectory_score([torch.tensor([-1.0, -3.0]), torch.tensor([-1.0])],
                                       [torch.tensor([-2.0, -2.0]), torch.tensor([-1.25])])
    assert best.item() == 0.25  # the larger of two turns: 0 and 0.25


def test_the_environment_skeleton_runs(tmp_path):
    [skeleton] = re.findall(r"```python\n(.*?)```", PACKAGE, re.DOTALL)
    assert len(skeleton.splitlines()) <= 25
    (tmp_path / "guess.py").write_text(skeleton)
    flags = ["--env", tmp_path / "guess.py", "--run", tmp_path / "run",
             *"--n-tasks 3 --k 1 --max-turns 3".split()]
    stages.run("collect.py", *flags)
    lines = [json.loads(line) for line in (tmp_path / "run" / "trajectories.jsonl").open()]
    assert [line["id"] for line in lines] == ["number-1", "number-3", "number-5"]
    assert {line["reward"] for line in lines} <= {0.0, 1.0}
    replies = {m["content"] for line in lines for m in line["dialogue_history"][1:]
               if m["role"] == "user"}
    assert replies and replies <= {"Higher.", "Lower.", "Yes."}


@pytest.fixture()
def in_a_clone(tmp_path):
    """A clone's folder, and a function that runs a README command there and returns its output."""
    copy = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(copy)], check=True)

    def run(command):
        command = re.sub(r"\bpython ", f"{sys.executable} ", command)
        done = subprocess.run(command, shell=True, cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        return done.stdout

    return copy, run


def commands_without_gpu_or_hub() -> list[str]:
    runnable = [command for command in commands(README)
                if not re.search(r"llama|tests/run", command)]
    return [re.sub(r"^.*pip install -r requirements.txt && ", "", command) for command in runnable]


@pytest.mark.slow
def test_first_command_ends_with_the_table(in_a_clone):
    """The base model's row matches exactly; the policy's success is within the printed interval.

    The last digits of training depend on the number of threads.
    """
    _, run = in_a_clone
    rows = re.findall(r"^(?:base|runs/tiny/policy) .*$", README, re.MULTILINE)
    table = run(commands_without_gpu_or_hub()[0])
    assert len(rows) == 2 and rows[0] in table
    [success] = re.findall(r"^runs/tiny/policy +([\d.]+)%", table, re.MULTILINE)
    low, high = map(float, re.findall(r"([\d.]+)% \.\. +([\d.]+)%", rows[1])[0])
    assert low <= float(success) <= high


@pytest.mark.slow
def test_commands_that_need_no_gpu_and_no_hub_run_as_printed(in_a_clone):
    """All of them, in the order of the README, with fewer tasks and steps."""
    copy, run = in_a_clone
    runnable = commands_without_gpu_or_hub()
    runnable += re.findall(r"`(python evaluate.py --critic [^`]+)`", README)
    runnable += [line for line in commands(PACKAGE) if "runs/2" in line]  # a second round
    assert runnable[0].startswith("python collect.py && ") and len(runnable) >= 10
    smaller = {"collect.py": " --n-tasks 40 --k 3",
               "train_critic.py": " --epochs 1 --max-trajectories 120",
               "train_policy.py": " --epochs 1", "evaluate.py": " --n-tasks 20"}
    for command in (*runnable, "python -m colbench.env.backend.audit mini:test"):
        run(" && ".join(part + smaller.get(part.split()[1], "")
                        for part in command.split(" && ")))
    assert (copy / "runs" / "tiny" / "report.html").exists()
    assert (copy / "runs" / "tiny" / "advantages.jsonl").exists()
