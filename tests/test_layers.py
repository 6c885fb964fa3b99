"""The layout: layers import only downwards, each script runs alone, one environment base class."""
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from colbench.env.base import load_environment
from colbench.run.errors import UserError
from stages import refused, run

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("collect", "train_critic", "train_policy", "evaluate")
LAYERS = ("run", "lm", "env", "train", "look")  # from the bottom up
TWENTY = ROOT / "tests" / "twenty_questions.py"


def imported(path: Path) -> set[str]:
    """All modules that a file imports, at any depth."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


@pytest.mark.parametrize("path", [str(p.relative_to(ROOT))
                                  for p in sorted(ROOT.glob("colbench/**/*.py"))])
def test_a_layer_only_imports_layers_below_it(path):
    modules = imported(ROOT / path)
    assert modules.isdisjoint(SCRIPTS)
    parts = Path(path).parts
    if len(parts) > 2:
        allowed = LAYERS[:LAYERS.index(parts[1]) + 1]
        assert {m.split(".")[1] for m in modules if m.startswith("colbench.")} <= {*allowed}
    if parts[1] == "run":
        assert not [m for m in modules if m.split(".")[0] in ("torch", "transformers", "numpy")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_imports_another_or_checks_its_environment(script):
    text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    assert imported(ROOT / f"{script}.py").isdisjoint(SCRIPTS)
    assert not re.search(r"\bfrontend\b|args\.env\b *[=!]=", text.split('"""')[2])


def test_the_top_level_has_no_other_files():
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True,
                             check=True)
    top = {path.split("/")[0] for path in listing.stdout.split()}
    assert {name for name in top if not name.startswith(".")} == {
        "README.md", "requirements.txt", "colbench", "tests",
        *(f"{script}.py" for script in SCRIPTS)}


def test_nothing_happens_at_import(tmp_path):
    """Importing every module leaves warnings, loggers and torch's settings unchanged."""
    modules = [str(p.relative_to(ROOT).with_suffix("")).replace("/", ".")
               for p in ROOT.glob("colbench/**/*.py")]
    code = ("import logging, warnings, torch\n"
            "import accelerate, transformers, tqdm, numpy, peft, playwright, PIL, openai\n"
            "before = len(warnings.filters), logging.getLogger('bitsandbytes').level\n"
            "tiny = torch.tensor([1e-40]) * 1\n"
            f"for name in {modules}:\n"
            "    __import__(name)\n"
            "assert (torch.tensor([1e-40]) * 1 == tiny).all() and tiny.item() > 0\n"
            "after = len(warnings.filters), logging.getLogger('bitsandbytes').level\n"
            "assert before == after\n")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def twenty(tmp_path_factory):
    """A run folder of Twenty Questions and the printed table.

    Each of the four scripts ran in its own folder, with only colbench/.
    """
    home = tmp_path_factory.mktemp("twenty")
    sizes = {"collect": "--n-tasks 8 --k 4 --max-turns 5 --n-candidates 6 --max-new-tokens 24",
             "train_critic": "--epochs 1 --pairs-per-task 2",
             "train_policy": "--epochs 1 --pairs-per-state 1",
             "evaluate": "--max-turns 5 --max-new-tokens 24"}
    for script, flags in sizes.items():
        folder = home / script
        shutil.copytree(ROOT / "colbench", folder / "colbench",
                        ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / f"{script}.py", folder)
        command = [sys.executable, f"{script}.py", "--env", TWENTY, "--run", home / "run",
                   *flags.split()]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    return home / "run", done.stdout


def test_each_script_on_its_own_runs_twenty_questions(twenty):
    folder, output = twenty
    trajectories = [json.loads(line) for line in (folder / "trajectories.jsonl").open()]
    replies = {m["content"] for t in trajectories for m in t["dialogue_history"][1:]
               if m["role"] == "user"}
    assert len(trajectories) == 32 and "No." in replies
    for t in trajectories:  # scored as in twenty_questions.py
        word = t["task"]["ground_truth"]
        share = sum(letter in t["answer"].lower() for letter in set(word)) / len(set(word))
        assert t["reward"] == pytest.approx(share / 10)
        assert t["scores"] == {"letters": round(share, 3)}
    prompts = [m["input"] for t in trajectories for m in t["dialogue_history"]
               if m["role"] == "assistant"]
    assert all("thinks of a word. You have 5 messages" in prompt for prompt in prompts)
    states = [json.loads(line) for line in (folder / "preferences.jsonl").open()]
    assert states and all(len(s["candidates"]) == len(s["advantages"]) for s in states)
    metrics = json.loads((folder / "metrics.json").read_text())["policies"]
    assert set(metrics) == {"base", f"{folder}/policy"} and metrics["base"]["episodes"] == 10
    episodes = [json.loads(line) for line in (folder / "episodes.jsonl").open()]
    rewards = [e["reward"] for e in episodes if e["policy"] == "base"]
    assert metrics["base"]["reward"] == pytest.approx(sum(rewards) / 10)
    assert re.search(r"^ +found +success +95 % interval +reward +turns", output, re.MULTILINE)


def test_comparison_and_report_work_on_twenty_questions(twenty):
    folder, _ = twenty
    printed = run("-m", "colbench.look.comparison", folder).stdout
    assert "10 episodes on 10 tasks" in printed and "reward" in printed
    (folder / "report.html").unlink()
    run("-m", "colbench.look.report", folder)
    assert "I am thinking of a word with" in (folder / "report.html").read_text()


def test_a_file_without_an_environment_is_refused_in_one_line(tmp_path):
    cases = {"class A: pass": "one class that extends",
             "import nothing_like_it": "does not load: ModuleNotFoundError",
             "def (": "does not load: SyntaxError",
             "raise SystemExit(3)": "does not load: SystemExit"}
    for i, (text, message) in enumerate(cases.items()):
        path = tmp_path / f"file{i}.py"
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_environment(str(path))
    with pytest.raises(UserError, match="backend, frontend or an existing FILE.py"):
        load_environment("no_such.py")
    path.write_text("from colbench.env.base import Environment\nclass A(Environment):\n    pass\n")
    (tmp_path / "tasks.jsonl").write_text('{"problem_description": "x", "ground_truth": "y"}\n')
    flags = ["--env", path, "--run", tmp_path / "run", "--tasks", tmp_path / "tasks.jsonl"]
    assert "give it a method `human`" in refused("collect.py", *flags)
    assert not (tmp_path / "run" / "trajectories.jsonl").read_text()
