"""Two critics without training: ask the base model, or play on and see.

train_critic.py and evaluate.py have them as --critic judge and --critic rollout.
"""
from colbench.env.data import failed
from colbench.env.dialogue import play, said
from colbench.lm.logps import pack, tree_tokens
from colbench.lm.sampling import LocalChat
from colbench.lm.tokens import encode_dialogue
from colbench.run.files import seed_of

OPPONENTS = 3  # per candidate, for the judge
ROLLOUTS = 4  # dialogues per candidate
JUDGE_PROMPT = """\
An assistant is talking with a person in order to write a program for them.

{dialogue}

Two messages are proposed for the assistant's next turn. Which of them brings it closer to the \
program that the person has in mind?

Message 1: {first}

Message 2: {second}

Answer with the number of the better message, 1 or 2, and nothing else."""


def judge_scores(base_logps, tokenizer, prompts: list[list[dict]], candidates: list[list[str]],
                 tokens_per_step: int) -> list[list[float]]:
    """Mean log-odds that the base model calls a candidate the better of two; per state a list.

    Each meets the next OPPONENTS candidates in both orders, because models have a position bias.
    prompts: dialogues so far, with c if the judge may see it. base_logps: message_logps of the base
    model.
    """
    verdicts = [tokenizer.encode(number, add_special_tokens=False) for number in "12"]
    comparisons, trees = [], []
    for s, (prompt, texts) in enumerate(zip(prompts, candidates)):
        dialogue = "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
        messages = [said(text)[0] for text in texts]
        for i in range(len(texts)):
            for step in range(1, min(OPPONENTS, len(texts) - 1) + 1):
                j = (i + step) % len(texts)
                for first, second in ((i, j), (j, i)):
                    question = JUDGE_PROMPT.format(
                        dialogue=dialogue, first=messages[first], second=messages[second])
                    ids, _ = encode_dialogue(tokenizer, [{"role": "user", "content": question}])
                    comparisons.append((s, first, second))
                    trees.append((ids, [], verdicts))
    odds = [[[] for _ in texts] for texts in candidates]
    for batch in pack([tree_tokens(tree) for tree in trees], tokens_per_step):
        for k, (one, two) in zip(batch, base_logps([trees[k] for k in batch])):
            s, first, second = comparisons[k]
            odds[s][first].append((one.sum() - two.sum()).item())
            odds[s][second].append((two.sum() - one.sum()).item())
    return [[mean(values) for values in of_state] for of_state in odds]


def rollout_scores(states: list[dict], tokenizer, model, environment, human: str,
                   max_new_tokens: int, batch_tokens: int, seed: int) -> list[list[float]]:
    """Mean reward of ROLLOUTS dialogues that the base model plays on from a candidate.

    Per state a list over candidates. An answer is scored as it is. A dialogue that fails does not
    count. human: as for --human. Seeds come from (id, sample, turn, candidate, rollout).
    """
    agent = LocalChat(model, tokenizer, adapters=False, batch_tokens=batch_tokens)
    human = environment.human(human, agent)
    answers = []  # (state, candidate, task, answer)
    started = {}  # name -> (state, candidate, task, the dialogue with the candidate)
    for s, state in enumerate(states):
        for k, candidate in enumerate(state["candidates"]):
            message = {"role": "assistant", "content": said(candidate)[0]}
            history = [*state["messages"][1:], message]
            answer = environment.answer(history, state["turn"] == state["max_turns"])
            if answer is not None:
                answers.append((s, k, state["task"], answer))
                continue
            for m in range(ROLLOUTS):
                name = f"{state['id']} {state['sample']} {state['turn']} {k} {m}"
                started[name] = s, k, state["task"], history
    by_limits = {}  # play takes one system prompt and one limit of turns
    for name, reply in zip(started, first_replies(human, started, seed)):
        s, _, task, history = started[name]
        if not isinstance(reply, Exception):
            limits = states[s]["messages"][0]["content"], states[s]["max_turns"]
            start = [*history, {"role": "user", "content": reply}]
            by_limits.setdefault(limits, []).append((task | {"start": start}, name))
    for (system, max_turns), todo in by_limits.items():
        for episodes in play(agent, human, todo, agent_prompt=system, answer=environment.answer,
                             max_turns=max_turns, n_candidates=1, max_new_tokens=max_new_tokens,
                             parallel=256, seed=seed):
            for episode in episodes:
                if not failed(episode):
                    s, k, *_ = started[episode["sample"]]
                    answers.append((s, k, episode["task"], episode["answer"]))
    rewards = [[[] for _ in state["candidates"]] for state in states]
    scores = environment.score([(task, answer) for *_, task, answer in answers])
    for (s, k, *_), (reward, _) in zip(answers, scores):
        rewards[s][k].append(reward)
    return [[mean(values) for values in of_state] for of_state in rewards]


def first_replies(human, started: dict, seed: int) -> list:
    """The human's replies to the candidates, from which the dialogues are played on."""
    if not started:
        return []
    tasks = [task for _, _, task, _ in started.values()]
    histories = [history for *_, history in started.values()]
    return human.reply(tasks, histories, [seed_of(seed, name, "rollout") for name in started])


def mean(values: list[float]) -> float:
    """The mean, 0 for an empty list."""
    return sum(values) / max(1, len(values))
