"""colbench/env/evidence.py against hand computation, brute force, made-up dialogues, and servers
that count for themselves."""
import itertools
import json
import math
import random
import re
import threading

import pytest

from colbench.env.backend.environment import Backend
from colbench.env.backend.human import ScriptedHuman, details
from colbench.env.backend.mini import DETAILS, code, details_of, mini_tasks
from colbench.env.base import Environment
from colbench.env.dialogue import play
from colbench.env.evidence import Clock, could_have_shown, evidence, evidence_remarks
from colbench.env.frontend.environment import Frontend
from colbench.env.humans import ModelHuman
from colbench.env.metrics import mean_95, pass_at, pass_hat, smallest_difference, wilson
from colbench.lm.load import load_model, load_tokenizer
from colbench.lm.sampling import LocalChat
from colbench.lm.server import ServerChat
from colbench.lm.tokens import encode_dialogue
from test_mini import Expert
from test_server import QUICK, Server, completion

# ---- repetitions


def test_pass_k_by_hand_and_by_brute_force():
    # 3 of 6 pairs, 1 of 4 triples
    assert [pass_hat(3, 4, k) for k in (1, 2, 3, 4)] == [0.75, 0.5, 0.25, 0]
    assert [pass_at(1, 4, k) for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1]
    assert pass_at(0, 4, 4) == 0
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert pass_hat(c, n, k) == pytest.approx(sum(map(all, draws)) / len(draws))
            assert pass_at(c, n, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    for p, n, k in ((0.3, 8, 3), (0.9, 5, 5), (0.5, 4, 1)):  # unbiased: the mean over all outcomes
        chance = [math.comb(n, c) * p ** c * (1 - p) ** (n - c) for c in range(n + 1)]
        assert sum(w * pass_hat(c, n, k) for c, w in enumerate(chance)) == pytest.approx(p ** k)
        mean = sum(w * pass_at(c, n, k) for c, w in enumerate(chance))
        assert mean == pytest.approx(1 - (1 - p) ** k)


def line(task, reward=0.0, replies=(), questions=(), **more):
    """An episode: the agent asks, the human replies, then the agent answers."""
    history = [{"role": "user", "content": task["problem_description"]}]
    for i, reply in enumerate(replies):
        history += [{"role": "assistant", "content": questions[i] if questions else "What else?"},
                    {"role": "user", "content": reply}]
    history.append({"role": "assistant", "content": "I WANT TO ANSWER: x"})
    calls = {"passed": int(2 * reward), "total": 2}
    return {"id": task["id"], "sample": 0, "policy": "p",
            "task": task, "outcome": "answered", "reward": reward,
            "scores": {"fixed": calls, "official": calls, "sandbox": "strict"},
            "dialogue_history": history} | more


TASK = {"id": "t",
        "problem_description": "Please write quote(n, d). We deal in porcelain and ferries.",
        "ground_truth": code("quote", {"insurance": 6, "toll": 3})}
FAILED = {"outcome": "simulation_failed"}


def evidence_of(environment, lines, folder):
    return evidence(environment, {"p": lines}, folder / "episodes.jsonl")["p"]


def test_repetitions_over_tasks_with_unequal_counts(tmp_path):
    """Tasks a (2 of 3 right), b (3 of 3), c (0 of 2, one failed): each task counts once."""
    wins = {"a": [1, 0, 1], "b": [1, 1, 1], "c": [0, 0]}
    lines = [line(TASK | {"id": name}, reward=float(win), sample=s) | {"id": name}
             for name, of_task in wins.items() for s, win in enumerate(of_task)]
    lines.append(line(TASK, **FAILED) | {"id": "c"})
    rows = evidence_of(Environment, lines, tmp_path)["repetitions"]
    assert [(row["k"], row["tasks"]) for row in rows] == [(1, 3), (2, 3), (3, 2)]
    expected = [(2 / 3 + 1) / 3, (1 / 3 + 1) / 3, 1 / 2]
    assert [row["pass^k"] for row in rows] == pytest.approx(expected)
    assert [row["pass@k"] for row in rows] == pytest.approx([(2 / 3 + 1) / 3, 2 / 3, 1])
    assert rows[1]["pass^k_95"] == mean_95([1 / 3, 1, 0], "abc") and rows[1]["pass^k_95"][0] == 0
    assert rows[2]["pass@k_95"] == wilson(2, 2)  # both solved: a bootstrap has no width
    assert "repetitions" not in evidence_of(Environment, lines[:1], tmp_path)


def test_smallest_difference_in_closed_form_and_by_simulation():
    pairs = [1.0] * 12 + [-1.0] * 4 + [0.0] * 84  # McNemar: variance (b + c)/n - ((b - c)/n)²
    expected = 2.801585 * math.sqrt((0.16 - 0.08 ** 2) / 99)
    assert smallest_difference(pairs, range(100)) == pytest.approx(expected, rel=1e-6)
    twice = [value for value in pairs for _ in range(2)]  # duplicates add no information
    least = smallest_difference(twice, [i // 2 for i in range(200)])
    assert least == pytest.approx(expected, rel=1e-6)
    least = smallest_difference(pairs, range(100), samples=2)
    assert least == pytest.approx(expected * math.sqrt(2))
    assert smallest_difference([0.0] * 9, range(9)) is smallest_difference([1.0], "a") is None
    rng, found, n = random.Random(0), 0, 200
    least = 2.801585 * math.sqrt(0.3 / n)  # true mean of differences with variance 0.3
    for _ in range(2000):
        values = [rng.gauss(least, math.sqrt(0.3)) for _ in range(n)]
        mean = sum(values) / n
        found += abs(mean) / math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) > 1.96
    assert found / 2000 == pytest.approx(0.8, abs=0.03)


def test_smallest_difference_of_a_comparison():
    def lines(policy, rewards):
        return [line(TASK, reward, policy=policy) | {"id": str(i)}
                for i, reward in enumerate(rewards)]
    one = lines("a", [1, 0, 1, 0, 1])
    other = lines("b", [1, 1, 1, 0, 0]) + [line(TASK, **FAILED) | {"id": "9"}]
    shown = could_have_shown(Environment, {"a": one, "b": other})
    assert shown == {"b": {"measure": "success", "to": "a",
                           "difference": smallest_difference([0, 1, 0, 0, -1], "01234")}}
    alone = could_have_shown(Environment, {"a": one})["a"]["difference"]
    assert alone == pytest.approx(2.801585 * math.sqrt(2 * 0.6 * 0.4 * 5 / 4 / 5), rel=1e-6)


# ---- endings


@pytest.mark.parametrize("label, more", [
    ("right", dict(reward=1.0)), ("right", dict(reward=1.0, outcome="limit")),
    ("at the limit", dict(replies=["The toll is 3.", "The insurance is 6."], outcome="limit")),
    ("answered too early", dict()),
    ("answered too early", dict(replies=["The toll is 3.", "I don't know."])),
    ("answered too early", dict(replies=["The toll is 3.", "Yes, insurance too."])),
    ("wrong though all was told", dict(replies=["The toll is 3.", "The insurance is 6."])),
    ("wrong though all was told",
     dict(replies=["We take a toll of 3, and insurance costs 6 an item."])),
    ("misled by the human", dict(replies=["The toll is 4.", "The insurance is 6."])),
    ("misled by the human", dict(replies=["I don't know."], questions=["What is the toll?"])),
    ("simulator failed", FAILED | dict(error="human: ConnectionError: down")),
    ("agent failed", FAILED | dict(error="agent: RuntimeError: http://x/v1: error 500: no")),
    ("context full", FAILED | dict(error="agent: RuntimeError: context full: 2100 tokens of 2048")),
    ("context full",
     FAILED | dict(error="agent: RuntimeError: http://x: error 400: This model's maximum context "
                   "length is 4096 tokens")),
    ("context full",
     FAILED | dict(error="agent: RuntimeError: http://x: error 400: prompt is too long: 9 tokens")),
])
def test_endings_of_made_up_dialogues(label, more):
    assert Backend.ending(line(TASK, **more)) == label


def test_endings_are_less_specific_if_the_environment_cannot_tell(tmp_path):
    other = TASK | {"ground_truth": "def f(x):\n    return x + 4  # insurance"}
    assert Backend.ending(line(other)) == Environment.ending(line(TASK)) == "wrong"
    assert details_of(other["ground_truth"]) is None
    assert details_of(TASK["ground_truth"]) == {"insurance": 6, "toll": 3}
    scores = {"similarity": 1.0, "screenshot": "a.png"}
    assert Frontend.ending(line(TASK, reward=1.0, scores=scores)) == "answered"
    assert Frontend.ending(line(TASK, scores={"similarity": 0.2})) == "no page"
    lines = [line(TASK, reward=1.0), line(TASK), line(TASK), line(TASK, **FAILED)]
    found = evidence_of(Environment, lines, tmp_path)
    assert found["endings"] == {"right": 1, "wrong": 2, "agent failed": 1}
    assert "contradicting" not in found["human"]


# ---- the human


SHIPPING = {"problem_description": "Please write cost(w): the shipping of a parcel of w grams.",
            "ground_truth": '''\
def cost(w, currency="EUR"):
    rate = 0.15
    if w > 2000:
        return "too_heavy"
    return round(4.5 + w * rate, 2)'''}


@pytest.mark.parametrize("question, reply, wrong", [
    ("What is the toll?", "The toll is 3.", False),
    ("What is the toll?", "It's three euros.", False),
    ("What is the toll?", "It's 4.", True), ("What is the toll?", "The toll is four.", True),
    ("What is the toll?", "I'm not sure about the toll.", True),
    ("What is the toll?", "Toll? I have no idea.", True),
    ("What is the toll?", "It depends on the days.", False),
    ("What is the toll?", "The toll is 3 if it takes more than 2 days.", False),
    ("What are the toll and the insurance?", "The toll is 3 and the insurance is 6.", False),
    ("What are the toll and the insurance?", "The toll is 3 and the insurance is 7.", True),
    ("What is the fuel?", "I don't know.", False),
    ("What is the fuel?", "There is no fuel, so 0.", False),
    ("What is the fuel?", "The fuel is 6.", True), ("What is the fuel?", "It is 8.", True),
    ("Is there a toll of 5?", "No, it is 3, not 5.", False), ("Hello!", "What do you need?", False),
])
def test_contradictions_on_the_mini_benchmark(question, reply, wrong):
    assert Backend.contradicts(TASK, question, reply) == wrong


@pytest.mark.parametrize("question, reply, wrong", [
    ("What is the rate?", "15 % of the weight, plus 4.50.", False),
    ("What is the rate?", "0.15", False),
    ("What is the rate?", "0.25 a gram.", True), ("What is the rate?", "I don't know.", False),
    ("Is there a limit?", "From 2,001 grams on it is \"too_heavy\".", False),
    ("Is there a limit?", "Above 2500 grams it's refused.", True),
    ("What do I return then?", "Return 'overweight'.", True),
    ("And the currency?", "It's in USD.", True),
    ("And the currency?", "It's in EUR, don't convert the customers' money.", False),
    ("Does 300 g cost 49.50?", "Yes, 49.50.", False),
    ("Is it rounded?", "Yes, to two decimals.", False),
])
def test_contradictions_elsewhere(question, reply, wrong):
    assert Backend.contradicts(SHIPPING, question, reply) == wrong


class Wrong(ScriptedHuman):
    """The scripted human, with a share of its replies replaced by wrong ones, which it counts."""

    def __init__(self, share):
        super().__init__()
        self.share, self.rng, self.lies = share, random.Random(0), 0

    def reply(self, tasks, histories, seeds):
        return [self.twisted(text) if self.rng.random() < self.share else text
                for text in super().reply(tasks, histories, seeds)]

    def twisted(self, text):
        self.lies += 1
        if text == "I don't know.":
            return f"The {self.rng.choice(list(DETAILS))} is {self.rng.randint(10, 99)}."
        number = int(text.split()[-1].rstrip("."))
        return self.rng.choice([text.replace(str(number), str(number % 9 + 1)),
                                "I don't know.", "It is 1."])


def test_a_human_that_is_wrong_in_a_fifth_of_its_replies_is_detected(tmp_path):
    found = {}
    for share in (0.0, 0.2):
        human = Wrong(share)
        todo = [(task, 0) for task in mini_tasks("test", 60)]
        lines = [line(e["task"]) | e for batch in play(Expert(), human, todo, agent_prompt="Ask.")
                 for e in batch]
        checks = found[share] = evidence_of(Backend, lines, tmp_path)["human"]
        assert checks["replies"] == human.replies > 180
        assert checks["contradicting"] == pytest.approx(human.lies / human.replies, abs=0.01)
    assert found[0.0]["contradicting"] == 0 and found[0.2]["contradicting"] > 0.15
    assert found[0.0]["contradicting_95"][1] < found[0.2]["contradicting_95"][0]


def test_the_scripted_human_never_contradicts_the_hidden_code():
    club = ("LIMIT = 1_000\nMODE = 'express'\ndef f(x, seats=12):\n"
            "    # Under 18s pay half, members of \"Club 9\" nothing.\n"
            "    return x * -0.5  # the discount")
    steps = "FREQUENCY = 4e6\nSTEP = .5\n# Steps are 100 or 250.\nx = [100,250]"
    for hidden_code in (SHIPPING["ground_truth"], club, steps):
        task = {"ground_truth": hidden_code, "problem_description": "f"}
        said = [detail.sentence for detail in details(hidden_code)]
        assert said and not any(Backend.contradicts(task, "?", sentence) for sentence in said)


def test_empty_and_cut_replies_are_counted(tmp_path):
    replies = [{"role": "user", "content": text} | more for text, more in
               (("yes", {}), ("  ", {}), ("It is", {"cut": True}), ("no", {"leaked": True}))]
    history = [{"role": "user", "content": "f"}]
    for reply in replies:
        history += [{"role": "assistant", "content": "?"}, reply]
    found = evidence_of(Environment, [line(TASK) | {"dialogue_history": history}],
                        tmp_path)["human"]
    assert found == {"replies": 4, "empty": 0.25, "cut": 0.25}


# ---- costs


class Counting:
    """A server that counts the tokens (here: words) it reads and writes; ServerChat sees its usage.

    It refuses every third request at first. Some first drafts of the human's replies leak.
    """

    def __init__(self):
        self.read = self.written = self.refused = 0
        self.lock, self.refusals = threading.Lock(), set()
        self.http = Server(self.behave)

    def behave(self, body, earlier):
        with self.lock:
            words = sum(len(m["content"].split()) for m in body["messages"])
            if words % 3 == 0 and not earlier:
                self.refused += 1
                return 429, QUICK, {"error": {"message": "slow down"}}
            asks = "Reply to the Agent" in body["messages"][-1]["content"]
            ends = len(body["messages"]) > 6
            question = "I WANT TO ANSWER: x" if ends else "What is the toll?"
            text = self.human(body) if asks else question
            self.read, self.written = self.read + words, self.written + len(text.split())
            answer = completion(text, len(text.split()))
            answer["usage"]["prompt_tokens"] = words
            return 200, {}, answer

    def human(self, body):
        leaks = body["temperature"] == 0 and body["seed"] % 2
        return TASK["ground_truth"] if leaks else "The toll is 3."


def test_costs_against_a_server_that_counts(tmp_path):
    server = Counting()
    try:
        agent, player = (ServerChat(server.http.url, "first") for _ in range(2))
        clock = Clock(tmp_path / "episodes.jsonl", "p", (agent, player, None))
        todo = [(TASK | {"id": f"t{i}", "problem_description": "word " * (40 + i)}, 0)
                for i in range(12)]
        lines = []
        for batch in play(agent, ModelHuman(player), todo, agent_prompt="Ask.", parallel=5,
                          n_candidates=3, candidate_share=0.3):
            lines += [episode | {"policy": "p", "reward": float(episode["id"] < "t2")}
                      for episode in batch]
            clock.batch(len(batch))
    finally:
        server.http.close()
    found = evidence_of(Environment, lines, tmp_path)
    tokens, took = found["tokens"], found["clock"]
    assert tokens["agent_read"]["all"] + tokens["human_read"]["all"] == server.read
    assert tokens["agent_written"]["all"] + tokens["human_written"]["all"] == server.written
    assert server.refused > 5 and any(m.get("leaked") for e in lines for m in e["dialogue_history"])
    assert any(len(m.get("candidates", ())) == 3 for e in lines for m in e["dialogue_history"])
    assert took["requests"]["all"] == len(server.http.requests)
    assert took["retries"]["all"] == server.refused
    solved = found["endings"]["right"]
    assert tokens["agent_read"]["per_episode"] == tokens["agent_read"]["all"] / 12 and solved == 4
    assert took["requests"]["per_solved"] == took["requests"]["all"] / solved
    assert "uncounted" not in tokens and took["seconds"]["all"] > 0


def test_costs_of_a_local_model_are_its_tokens():
    tokenizer = load_tokenizer("tiny")
    agent = LocalChat(load_model("tiny"), tokenizer)
    todo = [(mini_tasks("test", 1)[0], 0)]
    [[episode]] = play(agent, ScriptedHuman(), todo, agent_prompt="Ask.", n_candidates=2,
                       candidate_share=0.5, max_turns=4, max_new_tokens=30)
    history, system = episode["dialogue_history"], {"role": "system", "content": "Ask."}
    assert any("candidates" in m for m in history)
    assert any("candidates" not in m for m in history[1::2])
    for i in range(1, len(history), 2):
        prompt = len(encode_dialogue(tokenizer, [system, *history[:i]])[0])
        n = len(history[i].get("candidates", "x"))
        assert history[i]["read"] == n * prompt
        if n > 1:
            assert history[i].get("written", 0) >= history[i]["tokens"] + n - 1
        else:
            assert "written" not in history[i]
    assert not any("read" in m for m in history[::2])  # the scripted human reads nothing


def test_messages_without_usage_are_reported_as_uncounted(tmp_path):
    history = [{"role": "user", "content": "f"}, {"role": "assistant", "content": "?", "tokens": 4},
               {"role": "user", "content": "6", "tokens": 2, "read": 70, "written": 5},
               {"role": "assistant", "content": "x", "tokens": 5, "read": 30}]
    lines = [line(TASK, **FAILED) | {"dialogue_history": history}]
    assert evidence_of(Environment, lines, tmp_path)["tokens"] == {
        "agent_read": {"all": 30, "per_episode": 30, "per_solved": None}, "uncounted": 1,
        "agent_written": {"all": 5, "per_episode": 5, "per_solved": None},
        "human_read": {"all": 70, "per_episode": 70, "per_solved": None},
        "human_written": {"all": 5, "per_episode": 5, "per_solved": None}}


def test_the_clock_resumes_after_a_kill_and_adds_up_shards(tmp_path):
    row = {"policy": "p", "episodes": 3, "seconds": 1.5, "requests": 7, "retries": 1}
    path, episodes = tmp_path / "episodes_clock.jsonl", tmp_path / "episodes.jsonl"
    episodes.write_text("{}\n")
    path.write_text(json.dumps(row) + "\n" + json.dumps(row)[:30])  # torn
    Clock(episodes, "p", ()).batch(2)
    first, second = [json.loads(text) for text in path.read_text().splitlines()]
    assert first == row and second["episodes"] == 2 and second["requests"] == 0
    (tmp_path / "episodes-1of2_clock.jsonl").write_text(json.dumps(row | {"seconds": 100}) + "\n")
    (tmp_path / "episodes-2of2_clock.jsonl").write_text(json.dumps(row | {"policy": "q"}) + "\n")
    took = evidence_of(Environment, [line(TASK, reward=1.0)], tmp_path)["clock"]
    assert took["requests"] == {"all": 14, "per_episode": 14 / 8, "per_solved": 14}
    assert took["seconds"]["all"] == pytest.approx(101.5 + second["seconds"])
    episodes.unlink()  # a new evaluation
    Clock(episodes, "p", ()).batch(1)
    assert [json.loads(text)["episodes"] for text in path.read_text().splitlines()] == [1]


def test_lines_below_the_table(tmp_path):
    lines = [line(TASK, reward=float(i % 2), sample=i // 4, replies=["The toll is 4."])
             | {"id": str(i % 4)} for i in range(8)]
    for one in lines:
        one["dialogue_history"][-1] |= {"tokens": 5, "read": 1000}
    counted = evidence(Backend, {"base": lines}, tmp_path / "episodes.jsonl")
    repeated, least, cost, wrong = evidence_remarks(counted)
    assert repeated.endswith("base 50.0%, 50.0% (k = 2)")
    assert cost == "per episode: base 1,000 tokens read, 5 written"
    assert re.fullmatch(r"smallest detectable difference: base \d+.\d% fixed success to another .*",
                        least)
    assert wrong == "human replies that contradict the hidden information: base 100.0%"
