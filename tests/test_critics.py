"""Each critic and baseline against a slow computation: one forward pass per message, by hand."""

import json
import math
import random
import sys
from types import SimpleNamespace

import collect
import evaluate
import pytest
import torch
import train_critic
import train_policy
from train_critic import advantage, critic_loss, trajectory_pairs, trajectory_score

from colbench.env.backend.environment import Backend
from colbench.env.backend.human import ScriptedHuman
from colbench.env.backend.mini import mini_tasks
from colbench.env.backend.score import Scorer, share
from colbench.env.data import of_first_tasks
from colbench.env.dialogue import MARKER, play, prompt_messages, states_with_candidates
from colbench.env.hidden_info import with_hidden_info
from colbench.env.metrics import paired
from colbench.lm.adapters import adapters_off, add_lora
from colbench.lm.load import load_model, load_tokenizer
from colbench.lm.logps import message_logps
from colbench.lm.sampling import LocalChat
from colbench.lm.tokens import encode_dialogue, end_of_turn, message_ids
from colbench.look.comparison import compare_runs
from colbench.run.errors import UserError
from colbench.run.files import append_jsonl
from colbench.train.heads import value_head
from colbench.train.judges import JUDGE_PROMPT, ROLLOUTS, judge_scores, rollout_scores
from colbench.train.critics import logprob_scores, other_scores

SYSTEM = "Ask about one missing detail at a time, then answer."


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


@pytest.fixture(scope="module")
def critic():
    """A LoRA model far from its base, with a head that is not zero."""
    torch.manual_seed(0)
    model = add_lora(load_model("tiny", device="cpu"), 4).eval()
    model.value_head = value_head(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "value_head" in name:
                parameter.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def task():
    return mini_tasks("train", 1)[0]


@pytest.fixture(scope="module")
def states(task):
    def state(turn, history, candidates):
        return {"id": task["id"], "sample": 0, "turn": turn, "max_turns": 10, "task": task,
                "candidates": candidates,
                "messages": prompt_messages(SYSTEM, [request, *history])}
    request = {"role": "user", "content": task["problem_description"]}
    asked = [{"role": "assistant", "content": "What is the rebate?"},
             {"role": "user", "content": "The rebate is 3."}]
    questions = ["What is the escort?", "Tell me the rebate.", "How much is the storage?"]
    return [state(1, [], questions),
            state(2, asked, ["What is the insurance?", f"{MARKER} def price(n, d): return n"])]


def settings(**changes):
    return SimpleNamespace(**dict(critic="logprob", no_hidden_info=False, no_length_norm=False,
                                  official=False, tokens_per_step=150, max_tokens=1024,
                                  allow_weak_sandbox=False, seed=0) | changes)


def scores_of(args, states, tokenizer, model, base_logps):
    """The scores train_critic.py ranks by: its own for the paper's critic, else the package's."""
    if args.critic == "logprob":
        with torch.no_grad():
            return train_critic.advantages(args, states, tokenizer, model, base_logps)
    return other_scores(args.critic, states, tokenizer, model, base_logps,
                        max_tokens=args.max_tokens, tokens_per_step=args.tokens_per_step,
                        seed=args.seed, hidden_info=not args.no_hidden_info)


def naive_logps(model, tokenizer, messages, text):
    prompt, _ = encode_dialogue(tokenizer, messages)
    ids = message_ids(tokenizer, text, end_of_turn(tokenizer))
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
    return torch.stack([logps[len(prompt) + k - 1, token] for k, token in enumerate(ids)])


def naive_score(args, model, tokenizer, state, text):
    """The advantage of one candidate, from one sequence's full logits or hidden states."""
    hidden_prompt = with_hidden_info(state["messages"], state["task"]["ground_truth"])
    prompt = state["messages"] if args.no_hidden_info else hidden_prompt
    if args.critic in ("regression", "value"):
        ids, _ = encode_dialogue(tokenizer, prompt)
        message = message_ids(tokenizer, text, end_of_turn(tokenizer))
        with torch.no_grad():
            output = model(input_ids=torch.tensor([ids + message]), output_hidden_states=True)
            last = output.hidden_states[-1][0, -len(message):]
            return (last.mean(0) @ model.value_head.weight[0] + model.value_head.bias[0]).item()
    with adapters_off(model):
        plain_ref = args.official or args.critic == "untrained"
        ref = naive_logps(model, tokenizer, state["messages"] if plain_ref else prompt, text)
        untrained = naive_logps(model, tokenizer, hidden_prompt, text)
    if args.critic == "untrained":
        ratios = untrained - ref
    else:
        ratios = naive_logps(model, tokenizer, prompt, text) - ref
    return (ratios.sum() if args.no_length_norm else ratios.mean()).item()


def base_logps_of(model):
    def base_logps(trees):
        with torch.no_grad(), adapters_off(model):
            return message_logps(model, trees)
    return base_logps


@pytest.mark.parametrize("changes", [
    {}, {"no_hidden_info": True}, {"no_length_norm": True}, {"official": True},
    {"critic": "untrained"}, {"critic": "regression"},
    {"critic": "value", "no_hidden_info": True}])
def test_scores_of_candidates(critic, tokenizer, states, changes):
    args = settings(**changes)
    scores = scores_of(args, states, tokenizer, critic, base_logps_of(critic))
    expected = [[naive_score(args, critic, tokenizer, state, text) for text in state["candidates"]]
                for state in states]
    assert [len(row) for row in scores] == [3, 2]
    for got, expected_row in zip(scores, expected):
        assert got == pytest.approx(expected_row, abs=2e-5)
    # no two scores are equal, so swapped scores would show
    assert len({round(value, 4) for row in scores for value in row}) == 5
    if args.critic == "logprob":  # evaluate.py uses the package's copy
        flags = dict(hidden_info=not args.no_hidden_info, length_norm=not args.no_length_norm,
                     ref_hidden_info=not args.official)
        assert scores == logprob_scores(states, tokenizer, critic, base_logps_of(critic), **flags,
                                        max_tokens=args.max_tokens,
                                        tokens_per_step=args.tokens_per_step)


def test_states_that_are_too_long_have_no_scores(critic, tokenizer, states):
    prompt = with_hidden_info(states[0]["messages"], states[0]["task"]["ground_truth"])
    length = len(encode_dialogue(tokenizer, prompt)[0])
    args = settings(max_tokens=length + 12)
    scores = scores_of(args, states, tokenizer, critic, base_logps_of(critic))
    assert len(scores[0]) == 3 and scores[1] == []


def test_random_critic_is_blind_and_repeatable(critic, tokenizer, states):
    args = settings(critic="random")
    many = [states[0] | {"turn": turn} for turn in range(1, 400)]
    scores = scores_of(args, many, tokenizer, critic, None)
    assert scores == scores_of(args, many, tokenizer, None, None)
    wins = sum(row.index(max(row)) == 0 for row in scores)
    assert 100 < wins < 166  # each of the three candidates wins about a third
    assert 0 <= min(map(min, scores)) < max(map(max, scores)) < 1
    other_seed = settings(critic="random", seed=1)
    assert scores != scores_of(other_seed, many, tokenizer, critic, None)


def test_judge_compares_in_both_orders(critic, tokenizer, states):
    first, second = states[1]["candidates"]
    [[a, b]] = judge_scores(base_logps_of(critic), tokenizer, [states[1]["messages"]],
                            [[first, second]], 4096)
    dialogue = "\n".join(f"{m['role']}: {m['content']}" for m in states[1]["messages"])
    odds = []
    for one, other, sign in ((first, second, 1), (second, first, -1)):
        text = JUDGE_PROMPT.format(dialogue=dialogue, first=one, second=other)
        prompt, _ = encode_dialogue(tokenizer, [{"role": "user", "content": text}])
        with torch.no_grad(), adapters_off(critic):
            logps = critic(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        one_id, two_id = (tokenizer.encode(number, add_special_tokens=False)[0]
                          for number in "12")
        odds.append(sign * (logps[one_id] - logps[two_id]).item())
    assert a == pytest.approx(sum(odds) / 2, abs=1e-4) and b == pytest.approx(-a, abs=1e-4)


def test_rollouts_average_real_rewards(critic, tokenizer, states, task):
    """An answer gets its own score; a question gets the mean reward of the dialogues it leads to.

    The test plays those dialogues one by one.
    """
    candidates = [f"{MARKER} {task['ground_truth']}", f"{MARKER} def price(n, d): return None",
                  "What is the escort?"]
    state = states[1] | {"candidates": candidates}
    with Backend(settings()) as environment:
        [[right, wrong, question]] = rollout_scores(
            [state], tokenizer, critic, environment, human="scripted", max_new_tokens=96,
            batch_tokens=65536, seed=0)
    assert (right, wrong) == (1.0, 0.0)
    human, rewards = ScriptedHuman(), []
    for m in range(ROLLOUTS):
        start = [*state["messages"][1:], {"role": "assistant", "content": "What is the escort?"}]
        start.append({"role": "user", "content": human.reply([task], [start], [0])[0]})
        agent = LocalChat(critic, tokenizer, adapters=False)
        name = f"{task['id']} 0 2 2 {m}"
        [[episode]] = list(play(agent, human, [(task | {"start": start}, name)],
                                agent_prompt=SYSTEM, max_new_tokens=96, n_candidates=1))
        played = episode["dialogue_history"][:len(start)]
        assert [message["content"] for message in played] == [x["content"] for x in start]
        with Scorer() as scorer:
            results = scorer.score_many([(task, episode["answer"])])
            rewards += [share(result, "fixed") for result in results]
    assert question == pytest.approx(sum(rewards) / ROLLOUTS)


def test_scores_of_a_trajectory_by_hand():
    logps = [torch.tensor([1.0, 2.0]), torch.tensor([5.0])]
    ref = [torch.tensor([0.5, 0.5]), torch.tensor([1.0])]
    assert trajectory_score(logps, ref).item() == 1.0 + 4.0  # mean(0.5, 1.5) + mean(4)
    assert trajectory_score(logps, ref, "sum").item() == 0.5 + 1.5 + 4.0
    assert trajectory_score(logps, ref, "trajectory-mean").item() == pytest.approx(6.0 / 3)
    assert advantage(logps[0], ref[0], length_norm=False).item() == 2.0
    loss, a, b = critic_loss(logps, ref, ref, ref, beta=0.1, nll_weight=0.0, score="sum")
    assert (a.item(), b.item()) == (6.0, 0.0)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.6)))


def test_pairs_of_the_released_code():
    trajectories = [{"id": "t", "reward": r} for r in (1.0, 0.6, 0.5, 1.0)]
    assert set(trajectory_pairs(trajectories, 0, 0)) == {(0, 1), (0, 2), (1, 2), (3, 1), (3, 2)}
    pairs = trajectory_pairs(trajectories, 0, 0, chosen_at_least=1.0)
    assert set(pairs) == {(0, 1), (0, 2), (3, 1), (3, 2)}


def test_first_tasks_are_complete():
    trajectories = [{"id": task, "sample": sample} for sample in range(3) for task in "abc"]
    assert [t["id"] for t in of_first_tasks(trajectories, 5)] == list("aaabb")
    assert of_first_tasks(trajectories, 0) == trajectories


# ---- baselines of train_policy.py ----------------------------------------------------------------


@pytest.fixture(scope="module")
def trajectories(task, tmp_path_factory):
    path = tmp_path_factory.mktemp("baseline") / "trajectories.jsonl"
    played = [(1.0, ["What is the rebate?", f"{MARKER} right"]), (0.3, [f"{MARKER} wrong"])]
    for sample, (reward, messages) in enumerate(played):
        history = [{"role": "user", "content": task["problem_description"]}]
        for message in messages:
            history += [{"role": "assistant", "content": message},
                        {"role": "user", "content": "The rebate is 3."}]
        append_jsonl(path, {"id": task["id"], "sample": sample, "task": task, "system": SYSTEM,
                            "dialogue_history": history[:-1], "answer": "x", "reward": reward,
                            "outcome": "answered"})
    return path


def examples_of(algorithm, path, tokenizer, **changes):
    args = SimpleNamespace(**dict(algorithm=algorithm, trajectories=path, max_trajectories=0,
                                  pairs_per_task=0, seed=0, max_tokens=1024) | changes)
    return train_policy.load_baseline(args, Backend, tokenizer)


def test_states_without_a_pair_are_reported(tmp_path, tokenizer):
    append_jsonl(tmp_path / "one.jsonl", {"id": "a", "sample": 0, "turn": 1,
                                          "messages": [{"role": "user", "content": "Write f."}],
                                          "candidates": ["x"], "advantages": [0.0]})
    args = SimpleNamespace(preferences=tmp_path / "one.jsonl", seed=0, pairs_per_state=4,
                           max_tokens=100)
    with pytest.raises(UserError, match="no pair to learn from in 1 states with candidates"):
        train_policy.load_states(args, tokenizer)


def test_baselines_train_only_on_agent_tokens(trajectories, tokenizer):
    texts = [["What is the rebate?", f"{MARKER} right"], [f"{MARKER} wrong"]]
    [example] = examples_of("multi-turn-dpo", trajectories, tokenizer)
    assert example.pairs == [([0, 1], [2])]
    end = end_of_turn(tokenizer)
    for (ids, spans, leaves), messages in zip(example.trees, texts):
        assert leaves == []
        expected = [message_ids(tokenizer, text, end) for text in messages]
        assert [ids[a:b] for a, b in spans] == expected
    [example] = examples_of("rft", trajectories, tokenizer)  # only the successful one
    assert example.pairs == [([0, 1], [])] and len(example.trees) == 1
    with pytest.raises(UserError, match="nothing to learn from.*rft needs a reward of 1"):
        examples_of("rft", trajectories, tokenizer, max_tokens=10)


def test_multi_turn_dpo_by_hand(trajectories, tokenizer, critic):
    """The training loop's loss equals DPO on whole trajectories, computed message by message."""
    [example] = examples_of("multi-turn-dpo", trajectories, tokenizer)
    with torch.no_grad():
        messages = [m for tree in message_logps(critic, example.trees) for m in tree]
        ref = [m for tree in base_logps_of(critic)(example.trees) for m in tree]
    chosen, rejected = example.pairs[0]

    def cat(rows, numbers):
        return torch.cat([rows[i] for i in numbers])

    loss, *_ = train_policy.policy_loss(cat(messages, chosen), cat(messages, rejected),
                                        cat(ref, chosen), cat(ref, rejected), 0.1, 0.01)
    totals, nll = [], None
    for line in map(json.loads, trajectories.read_text().splitlines()):
        total, tokens = 0.0, []
        for i, message in enumerate(line["dialogue_history"]):
            if message["role"] == "assistant":
                prompt = prompt_messages(SYSTEM, line["dialogue_history"][:i])
                theta = naive_logps(critic, tokenizer, prompt, message["content"])
                with adapters_off(critic):
                    base = naive_logps(critic, tokenizer, prompt, message["content"])
                total += (theta - base).sum().item()
                tokens += theta.tolist()
        totals.append(total)
        if nll is None:  # of the chosen trajectory, the first line
            nll = -sum(tokens) / len(tokens)
    expected = math.log1p(math.exp(-0.1 * (totals[0] - totals[1]))) + 0.01 * nll
    assert loss.item() == pytest.approx(expected, abs=1e-4)


# ---- evaluate.py ---------------------------------------------------------------------------------


def test_best_of_n_plays_the_chosen_message(critic, tokenizer, task):
    """The chosen message is played and listed first; the critic sees the usual states."""
    seen = []

    def last(states):
        seen.extend(states)
        return [len(state["candidates"]) - 1 for state in states]

    def key(state):
        return state["id"], state["turn"]

    agent = LocalChat(critic, tokenizer, adapters=False)
    todo = [(task, 0) for task in mini_tasks("train", 6)]

    def episodes_by_id(**more):
        batches = play(agent, ScriptedHuman(), todo, agent_prompt=SYSTEM, max_turns=3,
                       max_new_tokens=32, n_candidates=4, candidate_share=1.0, **more)
        return {episode["id"]: episode for batch in batches for episode in batch}

    plain = episodes_by_id()
    chosen = episodes_by_id(choose=last)
    for name, episode in chosen.items():
        first = episode["dialogue_history"][1]
        other = plain[name]["dialogue_history"][1]
        assert first["candidates"][0] == first["output"] == other["candidates"][-1]
        assert sorted(first["candidates"]) == sorted(other["candidates"])
    made = states_with_candidates(list(chosen.values()), SYSTEM)
    assert sorted(map(key, made)) == sorted(map(key, seen))
    by_key = {key(state): state for state in seen}
    assert all(by_key[key(state)]["messages"] == state["messages"] for state in made)


def test_paired_difference_by_hand():
    difference, (low, high) = paired([(1, 0), (1, 1), (0, 0), (1, 0)], ["a", "b", "c", "d"])
    assert difference == 0.5
    draws, rng = [], random.Random(1)
    for _ in range(20_000):  # the obvious bootstrap
        draws.append(sum(rng.choice([1, 0, 0, 1]) for _ in range(4)) / 4)
    draws.sort()
    assert (low, high) == (draws[500], draws[19_500])
    # the mean is over episodes, the resampling over tasks
    assert paired([(1, 0)] * 3 + [(0, 1)], ["a", "a", "a", "b"])[0] == 0.5


def test_compare_prints_wins_ties_and_losses(tmp_path, capsys):
    def write_episode(run, k, scores):
        line = {"policy": "p", "id": str(k), "sample": 0, "outcome": "answered", "scores": scores}
        append_jsonl(tmp_path / run / "episodes.jsonl", line)

    for run, passed in {"a": [True, True, False], "b": [True, False, False]}.items():
        (tmp_path / run).mkdir()
        for k, right in enumerate(passed):
            write_episode(run, k, result_of(right))
    compare_runs([str(tmp_path / "a"), str(tmp_path / "b")])
    text = capsys.readouterr().out
    assert "3 episodes on 3 tasks" in text and "33.3% -  66.7% =  -33.3%" in text
    assert "wins 0, ties 2, losses 1" in text
    assert "detectable" in text and "human" not in text
    for run, human in (("a", "scripted"), ("b", "http://localhost:8000/v1")):
        args = json.dumps({"env": "backend", "human": human})
        (tmp_path / run / "episodes_args.json").write_text(args)
    compare_runs([str(tmp_path / "a"), str(tmp_path / "b")])
    text = capsys.readouterr().out
    assert ("the human differs, and with it the task: "
            f"scripted in {tmp_path}/a; http://localhost:8000/v1 in") in text
    assert "wins 0, ties 2, losses 1" in text
    with pytest.raises(UserError, match="two policies"):
        compare_runs([str(tmp_path / "a")])
    for run, values in {"c": [0.5, 0.2, 0.9], "d": [0.5, 0.6, 0.8]}.items():  # Frontend Design
        (tmp_path / run).mkdir()
        (tmp_path / run / "episodes_args.json").write_text('{"env": "frontend"}')
        for k, value in enumerate(values):
            write_episode(run, k, {"similarity": value})
    compare_runs([str(tmp_path / "c"), str(tmp_path / "d")])
    text = capsys.readouterr().out
    assert "63.3% -  53.3% =  +10.0%" in text and "wins 1, ties 1, losses 1" in text
    assert text.count(" wins ") == 1
    with pytest.raises(UserError, match="do not compare"):
        compare_runs([str(tmp_path / "a"), str(tmp_path / "d")])


@pytest.mark.parametrize("script, flags, message", [
    (train_critic, "--save-every 0", "at least 1"), (train_critic, "--batch-size 0", "at least 1"),
    (train_critic, "--epochs 0", "at least 1"),
    (train_critic, "--critic untrained --no-hidden-info",
     "--no-hidden-info has no effect with --critic untrained"),
    (train_critic, "--critic value --official", "--official has no effect with --critic value"),
    (train_critic, "--critic judge --lora-rank=8", "--lora-rank has no effect with --critic judge"),
    (train_critic, "--env frontend --critic value", "entirely right"),
    (train_critic, "--env frontend --official", "entirely right"),
    (train_critic, "--official --no-length-norm", "--no-length-norm has no effect with --official"),
    (train_critic, "--env frontend --vision-critic x", "needs --critic regression"),
    (train_critic, "--env frontend --critic regression --vision-critic x --model y",
     "no effect with --vision-critic"),
    (train_policy, "--save-every 0", "at least 1"),
    (train_policy, "--pairs-per-state 0", "at least 1"),
    (train_policy, "--beta -1", "above 0"),
    (train_policy, "--algorithm rft --beta 1", "--beta has no effect with --algorithm rft"),
    (train_policy, "--algorithm multi-turn-dpo --preferences x",
     "--preferences has no effect with"),
    (train_policy, "--trajectories x", "--trajectories has no effect with --algorithm sweet"),
    (evaluate, "--policies base --critic untrained", "needs --best-of"),
    (evaluate, "--policies base --best-of 4", "needs --critic"),
    (evaluate, "--policies base --critic value", "shows"),
    (evaluate, "--policies base --critic none", "no trained critic"),
    (evaluate, "--policies none", "no trained policy"),
    (evaluate, "--policies base http://127.0.0.1:9/v1 --best-of 4 --critic untrained",
     "not with a server"),
    (evaluate, "--policies base --max-new-tokens 0", "at least 1"),
    (evaluate, "--policies base --temperature nan", "0 or more"),
    (evaluate, "--policies base --critic value --shard 1/2", "concatenate the shards"),
    (collect, "--temperature -1", "0 or more"),
    (collect, "--candidate-share 2", "between 0 and 1"),
    (collect, "--add-candidates-to {run}/trajectories.jsonl", "the output itself"),
])
def test_impossible_settings_are_refused_at_once(script, flags, message, tmp_path, monkeypatch):
    (tmp_path / "value").mkdir()
    for name in ("adapter_config.json", "value_head.pt"):
        (tmp_path / "value" / name).touch()
    monkeypatch.chdir(tmp_path)
    argv = ["script", *flags.format(run=tmp_path).split(), "--run", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(UserError, match=message):
        script.parse_args()


@pytest.mark.parametrize("script, flags", [
    (train_critic, "--critic regression --vision-critic x"),
    (evaluate, "--policies base --against x"),
    (collect, "--page-language edits"),
    (collect, "--env frontend --scorer official"),
    (evaluate, "--env frontend --policies base --allow-weak-sandbox"),
])
def test_flags_of_another_environment_are_refused(script, flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", *flags.split()])
    with pytest.raises(SystemExit) as raised:
        script.parse_args()
    assert raised.value.code == 2
    assert "unrecognized arguments: " in capsys.readouterr().err


def result_of(right):
    """The scorer's real result for a task with one test."""
    task = {"id": "t", "problem_description": "f", "ground_truth": "def f(x):\n    return x",
            "test_cases": {"t1": "f(1)"}}
    answer = "def f(x):\n    return " + ("x" if right else "2")
    with Scorer() as scorer:
        return next(scorer.score_many([(task, answer)]))
