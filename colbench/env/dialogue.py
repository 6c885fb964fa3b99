"""The turn protocol of ColBench: an agent talks with a simulated human, then answers.

One turn: the agent sees the dialogue so far, never the hidden information, and says something. A
message with `I WANT TO ANSWER:` ends the episode; what follows the marker is the answer. The tenth
message ends it too, and its whole text is then the answer. Otherwise the human, who alone sees the
hidden information, replies.

As in the published data, only the part of a message after `OUTPUT:` (up to a second `OUTPUT:`) is
said; before it the agent thinks. Thoughts in a model's own marks (colbench/lm/texts.py) are not
part of the message: they are kept next to it, not searched for these words, and never shown again.

collect.py and evaluate.py both call `play`.
"""
from colbench.env.data import FAILED, failed
from colbench.lm.server import ServerChat
from colbench.lm.texts import MARKER, spent_on, usage_fields
from colbench.lm.tokens import render
from colbench.run.errors import UserError
from colbench.run.files import append_jsonl, seed_of

MAX_TURNS = 10


def said(raw: str) -> tuple[str, str]:
    """(what the human sees, what is kept of the raw text), by the published `OUTPUT:` rule."""
    pieces = raw.split("OUTPUT:")
    if len(pieces) == 1:
        return raw.strip(), raw
    return pieces[1].strip(), "OUTPUT:".join(pieces[:2])


def answer_of(history: list[dict], last_turn: bool) -> str | None:
    """The answer in the agent's latest message if that ends the episode, else None."""
    content = history[-1]["content"]
    if MARKER in content:
        return content.split(MARKER)[1].strip()
    return content if last_turn else None


def prompt_messages(system: str, history: list[dict]) -> list[dict]:
    """What the agent sees: the system prompt, role and content of every message. Nothing else."""
    messages = [{"role": message["role"], "content": message["content"]} for message in history]
    return [{"role": "system", "content": system}] + messages


def system_prompt(trajectory: dict, agent_prompt: str, max_turns: int = MAX_TURNS) -> str:
    """The system prompt of a trajectory, or agent_prompt if it has none."""
    return trajectory.get("system", agent_prompt.replace("{max_turns}", str(max_turns)))


def whole_dialogue(trajectory: dict, agent_prompt: str) -> list[dict]:
    """The messages of a trajectory, system prompt included."""
    return prompt_messages(system_prompt(trajectory, agent_prompt), trajectory["dialogue_history"])


def states_with_candidates(trajectories: list[dict], agent_prompt: str) -> list[dict]:
    """The states at which candidates were sampled.

    {"id", "sample", "turn" (from 1), "max_turns", "messages" (what the agent saw), "candidates"
    (exact duplicates dropped), "task"}.
    """
    states = []
    for trajectory in trajectories:
        system = system_prompt(trajectory, agent_prompt)
        max_turns = trajectory.get("max_turns", MAX_TURNS)
        turn = 0
        for i, message in enumerate(trajectory["dialogue_history"]):
            turn += message["role"] == "assistant"
            if message.get("candidates"):
                states.append({
                    "id": trajectory["id"], "sample": trajectory["sample"], "turn": turn,
                    "max_turns": max_turns,
                    "messages": prompt_messages(system, trajectory["dialogue_history"][:i]),
                    "candidates": list(dict.fromkeys(message["candidates"])),
                    "task": trajectory["task"]})
    return states


def play(agent, human, todo, *, agent_prompt, answer=answer_of, max_turns=MAX_TURNS,
         n_candidates=16, candidate_share=0.0, temperature=1.0, max_new_tokens=1024, parallel=64,
         seed=0, choose=None):
    """Play many dialogues side by side; yields lists of finished episodes as they end.

    agent: anything with `.sample` (LocalChat, ServerChat). human: anything with `.reply`
    (colbench.env.humans). todo: list of (task, sample number); a task with "start" (a dialogue that
    ends with the human's message) is played on from there. answer: (history, last turn?) -> the
    answer if the latest message ends the episode, else None.

    At a candidate_share of the turns n_candidates messages are sampled. The first is played; it is
    the one that would have been played without the others. choose (best-of-N): states as in
    `states_with_candidates` -> the number of the candidate to play, which then comes first.

    Seeds come from (seed, task id, sample, turn). An error of agent or human ends its own dialogue
    with outcome "simulation_failed" and an "error". An episode is a line of trajectories.jsonl
    without scores.
    """
    system = agent_prompt.replace("{max_turns}", str(max_turns))
    waiting, active = list(reversed(todo)), []
    while waiting or active:
        while waiting and len(active) < parallel:  # refill
            active.append(new_episode(*waiting.pop(), system, max_turns))

        prompts = [prompt_messages(system, episode["dialogue_history"]) for episode in active]
        seeds = [message_seeds((seed, e["id"], e["sample"], len(e["dialogue_history"])),
                               candidate_share, n_candidates) for e in active]
        replies = agent.sample(prompts, seeds, temperature=temperature,
                               max_new_tokens=max_new_tokens)
        if choose:
            put_best_first(choose, active, prompts, replies)
        for episode, prompt, messages in zip(active, prompts, replies):
            add_agent_turn(agent, episode, prompt, messages, answer)

        asking = [episode for episode in active if episode["outcome"] is None]
        if asking:
            add_human_replies(human, asking, seed)
        finished = [episode for episode in active if episode["outcome"]]
        active = [episode for episode in active if not episode["outcome"]]
        if finished:
            yield finished


def new_episode(task: dict, sample, system: str, max_turns: int) -> dict:
    """An episode before the agent's first message."""
    request = {"role": "user", "content": task["problem_description"]}
    return {"id": task["id"], "sample": sample, "task": task, "system": system,
            "max_turns": max_turns, "answer": None, "outcome": None,
            "dialogue_history": list(task.get("start") or [request])}


def message_seeds(names: tuple, candidate_share: float, n_candidates: int) -> list[int]:
    """Seeds of the messages to sample: n_candidates at a share of the turns, otherwise one.

    names: (seed, task id, sample, number of messages so far)."""
    is_state = seed_of(*names, "candidates") / 2**63 < candidate_share
    n_messages = n_candidates if is_state else 1
    return [seed_of(*names, "agent", k) for k in range(n_messages)]


def put_best_first(choose, active: list[dict], prompts: list[list[dict]], replies: list[list]):
    """Move the chosen one of each dialogue's sampled messages to the front."""
    sound = [i for i, messages in enumerate(replies)
             if len(messages) > 1 and not any(isinstance(m, Exception) for m in messages)]
    states = [{"id": active[i]["id"], "sample": active[i]["sample"],
               "turn": (len(active[i]["dialogue_history"]) + 1) // 2,
               "max_turns": active[i]["max_turns"], "messages": prompts[i],
               "candidates": [said(message.text)[1] for message in replies[i]],
               "task": active[i]["task"]} for i in sound]
    for i, best in zip(sound, choose(states) if states else ()):
        replies[i].insert(0, replies[i].pop(best))


def add_agent_turn(agent, episode: dict, prompt: list[dict], messages: list, answer) -> None:
    """Add the first of `messages` to the episode; end the episode if it is an answer."""
    error = next((message for message in messages if isinstance(message, Exception)), None)
    if error is not None:
        episode["outcome"] = FAILED
        episode["error"] = f"agent: {type(error).__name__}: {error}"
        return
    content, output = said(messages[0].text)
    turn = {"role": "assistant", "content": content, "output": output}
    turn |= usage_fields(messages[0]._replace(spent=spent_on(*messages)))  # all candidates count
    tokenizer = getattr(agent, "tokenizer", None)
    if tokenizer:  # a server does not show its chat template
        turn["input"] = render(tokenizer, prompt)
    turn = {name: value for name, value in turn.items() if value is not None}
    if messages[0].thoughts:
        turn["thoughts"] = messages[0].thoughts
    if len(messages) > 1:
        turn["candidates"] = [said(message.text)[1] for message in messages]
    history = episode["dialogue_history"]
    history.append(turn)
    turns = sum(message["role"] == "assistant" for message in history)
    episode["answer"] = answer(history, False)
    if episode["answer"] is not None:
        episode["outcome"] = "answered"
    elif turns == episode["max_turns"]:
        episode["answer"] = answer(history, True)
        if episode["answer"] is not None:
            episode["outcome"] = "limit"


def add_human_replies(human, episodes: list[dict], seed: int) -> None:
    """Add the human's reply to each episode, with the metadata that the human keeps about it."""
    tasks = [episode["task"] for episode in episodes]
    histories = [prompt_messages("", episode["dialogue_history"])[1:] for episode in episodes]
    seeds = [seed_of(seed, episode["id"], episode["sample"], len(episode["dialogue_history"]),
                     "human") for episode in episodes]
    texts = human.reply(tasks, histories, seeds)
    nothing = [None] * len(episodes)
    notes = getattr(human, "notes", None) or nothing  # on the agent's message: its screenshot
    leaked = getattr(human, "leaked", None) or nothing
    thoughts = getattr(human, "thoughts", None) or nothing
    about = getattr(human, "about", None) or nothing
    for i, (episode, text) in enumerate(zip(episodes, texts)):
        if notes[i]:
            episode["dialogue_history"][-1] |= notes[i]
        if isinstance(text, Exception):
            episode["outcome"] = FAILED
            episode["error"] = f"human: {type(text).__name__}: {text}"
            continue
        reply = {"role": "user", "content": text}
        if leaked[i]:
            reply["leaked"] = True
        if thoughts[i]:
            reply["thoughts"] = thoughts[i]
        episode["dialogue_history"].append(reply | (about[i] or {}))


def servers_of(agent, human) -> list[ServerChat]:
    """The servers that play agent or human."""
    chats = agent, getattr(human, "chat", None)
    return [chat for chat in chats if isinstance(chat, ServerChat)]


def without_server_failures(batches, servers, window: int = 50):
    """Pass on what `play` yields, except for failures that a server caused.

    After a failure each server is pinged. If one does not answer, its UserError ends the run before
    the failed dialogues are passed on, so that the same command retries them. So does the failure
    of `window` dialogues in a row.
    """
    held = []
    for episodes in batches:
        bad = [episode for episode in episodes if failed(episode)]
        if len(bad) < len(episodes):
            yield [episode for episode in episodes if not failed(episode)]
        if bad:
            for server in servers:
                server.check()
        if len(bad) < len(episodes) and held:
            yield held
            held = []
        held += bad
        if len(held) >= window:
            raise UserError(f"the last {len(held)} dialogues all failed ({held[-1]['error']}) and "
                            "are not kept; fix the cause, then repeat the command to resume")
    if held:
        yield held


def score_and_append(env, batches, output, bar, **names):
    """Score the episodes in `batches`, append each to the open file `output`, yield each batch.

    env: the environment, entered. bar: tqdm's. names: more fields of each line."""
    rewards = []
    for episodes in batches:
        unscored = [episode for episode in episodes
                    if "reward" not in episode and not failed(episode)]
        scores = env.score([(episode["task"], episode["answer"]) for episode in unscored])
        for episode, (reward, details) in zip(unscored, scores, strict=True):
            episode["reward"], episode["scores"] = float(reward), details
        for episode in episodes:
            episode |= names
            append_jsonl(output, episode)
        rewards += [episode["reward"] for episode in episodes if "reward" in episode]
        n = max(1, len(rewards))
        bar.update(len(episodes))
        bar.set_postfix(reward=f"{sum(rewards) / n:.3f}", success=f"{rewards.count(1) / n:.3f}")
        yield episodes


def failures(lines: list[dict], whose: str = "") -> str | None:
    """A sentence about the failed dialogues among `lines`, None without any.

    UserError if all of them failed."""
    reasons = [line.get("error", line["outcome"]) for line in lines if failed(line)]
    if not reasons:
        return None
    if len(reasons) == len(lines):
        raise UserError(f"all {len(lines)} dialogues{whose} failed, the last one because of: "
                        f"{reasons[-1]}; fix the cause, then repeat the command to retry them")
    return (f"{len(reasons)} of {len(lines)} dialogues failed, the last one because of: "
            f"{reasons[-1]}")
