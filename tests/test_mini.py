"""The bundled benchmark does what its docstring says, judged by the real scorer and the real scripted human."""

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
        return json.dumps([sorted(re.findall(r"\d+ ?.*# \w+", task["ground_truth"])), task["problem_description"]])
    train, test = ({content(task) for task in mini_tasks(split, 1000)} for split in ("train", "test"))
    assert min(len(train), len(test)) > 980 and not train & test  # a few repeat within a split, none across
    assert mini_tasks("train", 5) == mini_tasks("train", 9)[:5] != mini_tasks("train", 5, seed=1)
    assert len(MEANING) == 120  # no hint stands for two details


def test_references_pass_and_any_line_less_fails(scorer):
    for task in mini_tasks("test", 60):
        assert len(set(task["test_cases"].values())) == 10
        lines = task["ground_truth"].split("\n")
        right = scorer.score(task, task["ground_truth"])
        assert success(right, "fixed") and success(right, "official")
        for i, line in enumerate(lines):
            if "#" in line:
                less = scorer.score(task, "\n".join(lines[:i] + lines[i + 1:]))
                more = scorer.score(task, "\n".join(lines[:i] + [re.sub(r"= (\d+)", r"= 1\1", line)] + lines[i + 1:]))
                assert not success(less, "fixed") and not success(more, "fixed")


class Expert:
    """Knows every hint: what a perfect agent can reach without the reference."""

    def sample(self, conversations, seeds, temperature, max_new_tokens):
        return [[Reply(self.speak(messages), None)] for messages in conversations]

    def speak(self, messages):
        request, said = messages[1]["content"], " ".join(m["content"] for m in messages[2:])
        wanted = [MEANING[word] for word in re.findall(r"\w+", request.split("deal in")[1]) if word in MEANING]
        told = {name: int(number) for name, number in re.findall(r"The (\w+) is (\d+)\.", said)}
        missing = [name for name in wanted if name not in told]
        function = re.search(r"def (\w+)", request)[1]
        return f"What is the {missing[0]}?" if missing else f"{MARKER}\n{code(function, told, comments=False)}"


def test_an_expert_solves_all_and_a_hasty_agent_none(scorer):
    tasks = mini_tasks("test", 100)
    done = [e for batch in play(Expert(), ScriptedHuman(), [(t, 0) for t in tasks], agent_prompt="Ask.") for e in batch]
    assert all(success(scorer.score(e["task"], e["answer"]), "fixed") for e in done)
    assert max(len(e["dialogue_history"]) for e in done) <= 10  # four questions and the answer
    hasty = [scorer.score(task, code(task["ground_truth"].split("(")[0][4:], {})) for task in tasks]
    assert not any(success(result, "fixed") for result in hasty) and sum(share(r, "fixed") for r in hasty) < 10


def test_intervals():
    assert wilson(8, 10) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))  # Wilson 1927
    assert wilson(0, 300)[0] == pytest.approx(0, abs=1e-9) and wilson(0, 300)[1] == pytest.approx(0.01264, abs=1e-4)
    coins = [0.0, 1.0] * 200  # a mean of 400 coin tosses: 0.5 +- 1.96 x 0.025
    low, high = bootstrap(coins, range(400))
    assert low == pytest.approx(0.451, abs=0.006) and high == pytest.approx(0.549, abs=0.006)
    # the same four times tells nothing new
    assert bootstrap(coins * 4, [*range(400)] * 4) == pytest.approx((low, high))
    assert bootstrap([1.0, 0.0, 0.0], ["a", "b", "b"])[1] == 1.0 and bootstrap([], []) == (0.0, 1.0)


def test_more_episodes_of_a_task_do_not_make_more_tasks(scorer):
    task = mini_tasks("test", 1)[0]
    right, wrong = (next(scorer.score_many([(task, answer)])) for answer in (task["ground_truth"], "def f(): 1"))

    def lines(samples):
        return [{"id": str(k), "sample": s, "outcome": "answered",
                 "dialogue_history": [{"role": "assistant", "content": "x"}],
                 "scores": right if k < 30 else wrong} for k in range(100) for s in range(samples)]
    once, often = Backend.metrics(lines(1))["fixed"], Backend.metrics(lines(8))["fixed"]
    assert once["success"] == often["success"] == 0.3 and once["success_95"] == wilson(30, 100)
    never = [line | {"scores": wrong} for line in lines(8)]
    assert Backend.metrics(never)["fixed"]["success_95"] == wilson(0, 100)
    # eight times as many would be a third as wide
    assert often["success_95"] == pytest.approx(once["success_95"], abs=0.02)
