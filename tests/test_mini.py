"""The mini benchmark does what its docstring says, with the real scorer and scripted human."""

import json
import re

import pytest

from colbench.env.backend.environment import Backend
from colbench.env.backend.human import ScriptedHuman
from colbench.env.backend.mini import DETAILS, code, mini_tasks
from colbench.env.backend.score import Scorer, share, success
from colbench.env.dialogue import MARKER, play
from colbench.env.metrics import bootstrap, wilson
from colbench.lm.server import Reply

MEANING = {hint: name for name, (_, hints) in DETAILS.items() for hint in hints.split()}


@pytest.fixture(scope="module")
def scorer():
    with Scorer() as scorer:
        yield scorer


def test_thousands_of_distinct_tasks_and_no_overlap():
    def content(task):
        lines = sorted(re.findall(r"\d+ ?.*# \w+", task["ground_truth"]))
        return json.dumps([lines, task["problem_description"]])

    train = {content(task) for task in mini_tasks("train", 1000)}
    test = {content(task) for task in mini_tasks("test", 1000)}
    assert min(len(train), len(test)) > 980  # a few repeat within a split
    assert not train & test
    assert mini_tasks("train", 5) == mini_tasks("train", 9)[:5] != mini_tasks("train", 5, seed=1)
    assert len(MEANING) == 120  # no hint points to two details


def test_hidden_code_passes_and_any_changed_line_fails(scorer):
    for task in mini_tasks("test", 60):
        assert len(set(task["test_cases"].values())) == 10
        lines = task["ground_truth"].split("\n")
        right = scorer.score(task, task["ground_truth"])
        assert success(right, "fixed") and success(right, "official")
        for i, line in enumerate(lines):
            if "#" in line:
                changed = re.sub(r"= (\d+)", r"= 1\1", line)
                for middle in ([], [changed]):
                    code = "\n".join(lines[:i] + middle + lines[i + 1:])
                    assert not success(scorer.score(task, code), "fixed")


class Expert:
    """Knows every hint: the best possible without the hidden code."""

    def sample(self, conversations, seeds, temperature, max_new_tokens):
        return [[Reply(self.speak(messages), None)] for messages in conversations]

    def speak(self, messages):
        request = messages[1]["content"]
        said = " ".join(m["content"] for m in messages[2:])
        words = re.findall(r"\w+", request.split("deal in")[1])
        details = [MEANING[word] for word in words if word in MEANING]
        told = {name: int(number) for name, number in re.findall(r"The (\w+) is (\d+)\.", said)}
        missing = [name for name in details if name not in told]
        if missing:
            return f"What is the {missing[0]}?"
        function = re.search(r"def (\w+)", request)[1]
        return f"{MARKER}\n{code(function, told, comments=False)}"


def test_an_expert_solves_all_and_a_hasty_agent_none(scorer):
    tasks = mini_tasks("test", 100)
    batches = play(Expert(), ScriptedHuman(), [(t, 0) for t in tasks], agent_prompt="Ask.")
    done = [episode for batch in batches for episode in batch]
    assert all(success(scorer.score(e["task"], e["answer"]), "fixed") for e in done)
    assert max(len(e["dialogue_history"]) for e in done) <= 10  # four questions and the answer
    functions = [task["ground_truth"].split("(")[0][4:] for task in tasks]
    hasty = [scorer.score(task, code(function, {})) for task, function in zip(tasks, functions)]
    assert not any(success(result, "fixed") for result in hasty)
    assert sum(share(result, "fixed") for result in hasty) < 10


def test_intervals():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Wilson 1927
    assert wilson(0, 300)[0] == pytest.approx(0, abs=1e-9)
    assert wilson(0, 300)[1] == pytest.approx(0.01264, abs=1e-4)
    coins = [0.0, 1.0] * 200  # the mean of 400 coin tosses: 0.5 ± 1.96 x 0.025
    low, high = bootstrap(coins, range(400))
    assert low == pytest.approx(0.451, abs=0.006)
    assert high == pytest.approx(0.549, abs=0.006)
    # four copies add no information
    assert bootstrap(coins * 4, [*range(400)] * 4) == pytest.approx((low, high))
    assert bootstrap([1.0, 0.0, 0.0], ["a", "b", "b"])[1] == 1.0
    assert bootstrap([], []) == (0.0, 1.0)


def test_more_episodes_of_a_task_do_not_make_more_tasks(scorer):
    task = mini_tasks("test", 1)[0]
    right = scorer.score(task, task["ground_truth"])
    wrong = scorer.score(task, "def f(): 1")

    def lines(samples):
        return [{"id": str(k), "sample": s, "outcome": "answered",
                 "dialogue_history": [{"role": "assistant", "content": "x"}],
                 "scores": right if k < 30 else wrong} for k in range(100) for s in range(samples)]

    once = Backend.metrics(lines(1))["fixed"]
    often = Backend.metrics(lines(8))["fixed"]
    assert once["success"] == often["success"] == 0.3
    assert once["success_95"] == wilson(30, 100)
    never = [line | {"scores": wrong} for line in lines(8)]
    assert Backend.metrics(never)["fixed"]["success_95"] == wilson(0, 100)
    # with eight times as many tasks the interval would be a third as wide
    assert often["success_95"] == pytest.approx(once["success_95"], abs=0.02)
