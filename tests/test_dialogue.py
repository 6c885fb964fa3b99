"""The turn protocol, with scripted agents and humans."""
import json

import pytest

from colbench.env.data import failed
from colbench.env.dialogue import answer_of, failures, play, said, without_server_failures
from colbench.lm.server import Reply
from colbench.run.errors import UserError
from colbench.run.files import seed_of
from stages import lines, run
from test_server import Server as HttpServer

PROMPT = "Ask, then answer."
TASKS = [{"id": f"t{i}", "problem_description": f"request {i}",
          "ground_truth": f"def f():\n    return {i}  # SECRET"} for i in range(6)]


class Agent:
    """Says what `speak(messages, seed)` returns; keeps everything it was shown."""

    def __init__(self, speak):
        self.speak, self.shown, self.batches = speak, [], []

    def sample(self, conversations, seeds, temperature, max_new_tokens):
        self.batches.append(len(conversations))
        self.shown += conversations
        return [[self.speak(messages, seed) for seed in row]
                for messages, row in zip(conversations, seeds)]


class Human:
    def __init__(self, speak=lambda task: "yes"):
        self.speak = speak

    def reply(self, tasks, histories, seeds):
        assert all(history[-1]["role"] == "assistant" for history in histories)
        self.leaked = [task["id"] == "t3" for task in tasks]
        return [self.speak(task) for task in tasks]


def turns(messages):
    return sum(m["role"] == "assistant" for m in messages)


def episodes(agent, human, todo, **settings):
    batches = play(agent, human, todo, agent_prompt=PROMPT, **settings)
    return {(e["id"], e["sample"]): e for batch in batches for e in batch}


def test_the_marker_or_the_last_turn_ends_the_episode():
    def speak(messages, seed):
        if messages[1]["content"] == "request 1" and turns(messages) == 2:
            return Reply("fine. I WANT TO ANSWER:\n```python\nx\n```", 3)
        return Reply(f"question {turns(messages)}", 3)
    done = episodes(Agent(speak), Human(), [(task, 0) for task in TASKS[:2]], max_turns=5)
    early, late = done["t1", 0], done["t0", 0]
    assert (early["outcome"], early["answer"]) == ("answered", "```python\nx\n```")
    assert turns(early["dialogue_history"]) == 3
    assert (late["outcome"], late["answer"]) == ("limit", "question 4")
    assert turns(late["dialogue_history"]) == 5
    for episode in done.values():  # the answer comes last, without a human reply
        roles = [m["role"] for m in episode["dialogue_history"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_published_output_rule():
    assert said("thinking OUTPUT: say this OUTPUT: and not this") == (
        "say this", "thinking OUTPUT: say this ")
    assert said(" plain ") == ("plain", " plain ")
    # a marker before OUTPUT: is only a thought
    content, _ = said("I WANT TO ANSWER: x OUTPUT: a question?")
    history = [{"role": "user", "content": "I WANT TO ANSWER: I, the human"},
               {"role": "assistant", "content": content}]
    assert answer_of(history, last_turn=False) is None
    assert answer_of(history, last_turn=True) == "a question?"
    history[-1]["content"] = "I WANT TO ANSWER: a I WANT TO ANSWER: b"
    assert answer_of(history, last_turn=False) == "a"


def test_thoughts_are_kept_but_neither_searched_nor_shown():
    def speak(messages, seed):
        if turns(messages) == 2:
            return Reply("I WANT TO ANSWER: x", 1, "")
        return Reply(f"question {turns(messages)}", 1, "I WANT TO ANSWER: no OUTPUT: no")

    class Thinker(Human):
        thoughts = ["SECRET"]

        def reply(self, tasks, histories, seeds):
            assert "thoughts" not in str(histories) and "ANSWER" not in str(histories)
            return super().reply(tasks, histories, seeds)

    agent = Agent(speak)
    done = episodes(agent, Thinker(), [(TASKS[0], 0)], candidate_share=1.0, n_candidates=2)
    [episode] = done.values()
    history = episode["dialogue_history"]
    assert [m.get("thoughts") for m in history] == [
        None, "I WANT TO ANSWER: no OUTPUT: no", "SECRET",
        "I WANT TO ANSWER: no OUTPUT: no", "SECRET", None]
    assert [m["content"] for m in history[1:]] == [
        "question 0", "yes", "question 1", "yes", "I WANT TO ANSWER: x"]
    assert episode["answer"] == "x"
    assert history[1]["output"] == "question 0" == history[1]["candidates"][1]
    assert "SECRET" not in str(agent.shown) and "no OUTPUT" not in str(agent.shown)


def test_an_error_only_ends_its_own_dialogue():
    def speak(messages, seed):
        if messages[1]["content"] == "request 2" and turns(messages) == 1:
            return RuntimeError("context full")
        return Reply("I WANT TO ANSWER: x" if turns(messages) == 2 else "question", 1)
    human = Human(lambda task: ConnectionError("down") if task["id"] == "t4" else "yes")
    done = episodes(Agent(speak), human, [(task, 0) for task in TASKS])
    outcomes = {key[0]: episode["outcome"] for key, episode in done.items()}
    assert outcomes["t2"] == outcomes["t4"] == "simulation_failed"
    assert {key[0]: e["error"] for key, e in done.items() if "error" in e} == {
        "t2": "agent: RuntimeError: context full", "t4": "human: ConnectionError: down"}
    assert all(failed(done[t, 0]) == (t in ("t2", "t4")) for t in outcomes)
    assert failed({"outcome": "error: human: as older files have it"})
    assert all(outcomes[t] == "answered" for t in ("t0", "t1", "t3", "t5"))
    assert any(m.get("leaked") for m in done["t3", 0]["dialogue_history"])
    assert not any(m.get("leaked") for m in done["t0", 0]["dialogue_history"])


def random_speaker(messages, seed):
    number = seed_of(seed, messages[-1]["content"]) % 5
    if number == 0 and turns(messages):
        return Reply("I WANT TO ANSWER: done", 1)
    return Reply(f"question {seed % 1000}", 1)


def test_episodes_do_not_depend_on_what_runs_with_them():
    todo = [(task, sample) for sample in range(4) for task in TASKS]
    together = episodes(Agent(random_speaker), Human(), todo, parallel=64, candidate_share=0.4)
    one_by_one = episodes(Agent(random_speaker), Human(), todo[::-1], parallel=1,
                          candidate_share=0.4)
    assert together == one_by_one and len(together) == 24
    # samples of one task differ
    assert len({str(e["dialogue_history"]) for e in together.values()}) > 12


def test_candidates():
    todo = [(task, sample) for sample in range(10) for task in TASKS]
    messages = {}
    for share in (0.0, 0.3, 1.0):
        done = episodes(Agent(random_speaker), Human(), todo, candidate_share=share, n_candidates=5)
        messages[share] = [m for key in sorted(done) for m in done[key]["dialogue_history"]
                           if m["role"] == "assistant"]
    assert not any("candidates" in m for m in messages[0.0])
    assert all("candidates" in m for m in messages[1.0])
    assert 0.2 < sum("candidates" in m for m in messages[0.3]) / len(messages[0.3]) < 0.4
    # candidates do not change the dialogue
    assert [m["content"] for m in messages[0.0]] == [m["content"] for m in messages[1.0]]
    assert all(len(m["candidates"]) == 5 for m in messages[1.0])
    assert all(m["candidates"][0] == m["output"] for m in messages[1.0])


def test_parallel_bounds_the_batch_and_the_hidden_code_is_never_shown():
    agent = Agent(random_speaker)
    episodes(agent, Human(), [(task, s) for s in range(5) for task in TASKS], parallel=7)
    assert max(agent.batches) == 7
    assert "SECRET" not in str(agent.shown)


class Server:
    """Counts its health checks and fails the one numbered `dies_at`."""

    def __init__(self, dies_at=99):
        self.checks, self.dies_at = 0, dies_at

    def check(self):
        self.checks += 1
        if self.checks == self.dies_at:
            raise UserError("no answer")


def batch(signs):
    """One episode per sign: "+" answered, "-" failed."""
    failure = {"outcome": "simulation_failed", "error": "human: x"}
    return [{"outcome": "answered"} if sign == "+" else dict(failure) for sign in signs]


def passed_on(batches):
    """The episodes that were written, and the error that ended the run (or None)."""
    written = []
    try:
        for episodes in batches:
            written += episodes
    except UserError as error:
        return written, str(error)
    return written, None


def test_dialogue_failures_are_kept_and_server_failures_are_not():
    server = Server()
    batches = map(batch, ["++", "+-", "-", "++", "-"])
    written, error = passed_on(without_server_failures(batches, [server]))
    assert len(written) == 8 and sum(map(failed, written)) == 3
    assert error is None and server.checks == 3
    batches = map(batch, ["++", "+-", "+--", "+"])
    written, error = passed_on(without_server_failures(batches, [Server(dies_at=2)]))
    assert error == "no answer" and len(written) == 4 and not any(map(failed, written))


def test_a_run_stops_when_everything_fails():
    batches = map(batch, ["+++", "----", "+", "---", "--", "+"])
    written, error = passed_on(without_server_failures(batches, [], window=5))
    assert len(written) == 8 and sum(map(failed, written)) == 4
    assert error.startswith("the last 5 dialogues all failed (human: x)")
    batches = map(batch, ["+++", "----"])
    written, error = passed_on(without_server_failures(batches, [], window=5))
    assert len(written) == 7 and error is None  # the run is over: they count as failed


def test_failures_are_reported_and_an_error_only_if_all_fail():
    assert failures(batch("++")) is failures([]) is None
    assert failures(batch("+-+-")) == "2 of 4 dialogues failed, the last one because of: human: x"
    with pytest.raises(UserError, match="all 3 dialogues failed.*human: x.*to retry them"):
        failures(batch("---"))


@pytest.mark.slow
def test_the_scripts_report_why_dialogues_fail(tmp_path):
    """If a server refuses all: one line, exit code 2. If it then refuses fewer, a rerun resumes."""
    refused = {"names": ["bad"]}

    def behave(body, earlier):
        if any(name in str(body["messages"]) for name in refused["names"]):
            return 400, {}, {"error": {"message": "maximum context length is 7"}}
        return "I WANT TO ANSWER:\ndef f(x):\n    return x + 1"

    server = HttpServer(behave)
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps({
        "id": name, "problem_description": f"{name}: write f.",
        "ground_truth": "def f(x):\n    return x + 1",
        "test_cases": {"a": "f(1)"}}) + "\n" for name in ("bad", "good")))
    reason = f"the last one because of: agent: RuntimeError: {server.url}/v1: error 400: "
    scripts = (("collect.py", ["--candidate-share", 0, "--model"], "trajectories.jsonl"),
               ("evaluate.py", ["--policies"], "episodes.jsonl"))
    try:
        for script, more, file in scripts:
            arguments = ["--run", tmp_path / script, "--tasks", tasks, "--n-tasks", 2, "--k", 1,
                         *more, f"{server.url}#first"]
            path = tmp_path / script / file
            refused["names"] = ["bad", "good"]
            done = run(script, *arguments, code=2)
            assert "Traceback" not in done.stderr
            assert f"\nerror: all 2 dialogues failed, {reason}" in f"\n{done.stderr}"
            assert [line["outcome"] for line in lines(path)] == ["simulation_failed"] * 2
            refused["names"] = ["bad"]
            assert f"1 of 2 dialogues failed, {reason}" in run(script, *arguments).stdout
            refused["names"] = []
            assert "dialogues failed" not in run(script, *arguments).stdout
            assert [line["reward"] for line in lines(path)] == [1.0, 1.0]
    finally:
        server.close()
