"""Two ways to rank candidate messages without training: ask the base model, or play the dialogue on and see.

train_critic.py and evaluate.py have them as --critic judge and --critic rollout.
"""

from colbench.env.data import failed
from colbench.env.dialogue import play, said
from colbench.lm.logps import pack, tree_tokens
from colbench.lm.sampling import LocalChat
from colbench.lm.tokens import encode_dialogue
from colbench.run.files import seed_of

OPPONENTS = 3  # of each candidate, for the judge
ROLLOUTS = 4  # dialogues a candidate
JUDGE_PROMPT = """\
An assistant is talking with a person in order to write a program for them.

{dialogue}

Two messages are proposed for the assistant's next turn. Which of them brings it closer to the program that the person \
has in mind?

Message 1: {first}

Message 2: {second}

Answer with the number of the better message, 1 or 2, and nothing else."""


def judge_scores(reference_logps, tokenizer, prompts: list[list[dict]], candidates: list[list[str]],
                 budget: int) -> list[list[float]]:
    """Mean log-odds, for every candidate of every state, that the base model names it the better of two.

    Each is compared with the next OPPONENTS candidates, in both orders, since models prefer a place. prompts: dialogues
    so far, with the hidden reference if the judge may see it. reference_logps: message_logps under the base model.
    """
    verdicts = [tokenizer.encode(number, add_special_tokens=False) for number in "12"]
    jobs, trees = [], []
    for s, (prompt, texts) in enumerate(zip(prompts, candidates)):
        dialogue = "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
        for i in range(len(texts)):
            for step in range(1, min(OPPONENTS, len(texts) - 1) + 1):
                j = (i + step) % len(texts)
                for first, second in ((i, j), (j, i)):
                    text = JUDGE_PROMPT.format(
                        dialogue=dialogue, first=said(texts[first])[0], second=said(texts[second])[0])
                    jobs.append((s, first, second))
                    trees.append((encode_dialogue(tokenizer, [{"role": "user", "content": text}])[0], [], verdicts))
    odds = [[[] for _ in texts] for texts in candidates]
    for group in pack([tree_tokens(tree) for tree in trees], budget):
        for k, (one, two) in zip(group, reference_logps([trees[k] for k in group])):
            s, first, second = jobs[k]
            odds[s][first].append((one.sum() - two.sum()).item())
            odds[s][second].append((two.sum() - one.sum()).item())
    return [[sum(values) / max(1, len(values)) for values in of_state] for of_state in odds]


def rollout_scores(how, environment, states: list[dict], tokenizer, model) -> list[list[float]]:
    """Mean reward, for every candidate of every state, of ROLLOUTS dialogues played on from it by the base model.

    A state: {"id", "sample", "turn", "max_turns", "messages", "candidates", "task"}. An answer is scored as it is. A
    dialogue that fails does not count. Seeds come from (id, sample, turn, candidate, number of the rollout).
    """
    agent = LocalChat(model, tokenizer, adapters=False, batch_tokens=how.batch_tokens)
    human = environment.human(how.human, agent)
    answers, begun = [], []  # (state, candidate, task, answer); (state, candidate, task with the dialogue so far, name)
    for s, state in enumerate(states):
        for k, candidate in enumerate(state["candidates"]):
            content, _ = said(candidate)
            history = [*state["messages"][1:], {"role": "assistant", "content": content}]
            answer = environment.answer(history, state["turn"] == state["max_turns"])
            if answer is not None:
                answers.append((s, k, state["task"], answer))
                continue
            for m in range(ROLLOUTS):
                name = f"{state['id']} {state['sample']} {state['turn']} {k} {m}"
                begun.append((s, k, state["task"] | {"start": history}, name))
    replies = human.reply([task for _, _, task, _ in begun], [task["start"] for _, _, task, _ in begun],
                          [seed_of(how.seed, name, "rollout") for *_, name in begun]) if begun else []
    todo = {}
    for (s, k, task, name), reply in zip(begun, replies):
        if not isinstance(reply, Exception):
            todo[name] = (s, k, task | {"start": [*task["start"], {"role": "user", "content": reply}]})
    by_limits = {}
    for name, (s, k, task) in todo.items():
        by_limits.setdefault((states[s]["messages"][0]["content"], states[s]["max_turns"]), []).append((task, name))
    for (system, max_turns), some in by_limits.items():
        for episodes in play(agent, human, some, agent_prompt=system, answer=environment.answer, max_turns=max_turns,
                             n_candidates=1, max_new_tokens=how.max_new_tokens, parallel=256, seed=how.seed):
            answers += [(*todo[e["sample"]][:2], e["task"], e["answer"]) for e in episodes if not failed(e)]
    rewards = [[[] for _ in state["candidates"]] for state in states]
    for (s, k, *_), (reward, _) in zip(answers, environment.score([(task, answer) for *_, task, answer in answers])):
        rewards[s][k].append(reward)
    return [[sum(values) / max(1, len(values)) for values in of_state] for of_state in rewards]
