"""The turn protocol of ColBench: an agent talks with a simulated human for at most ten turns, then has answered.

One turn: the agent sees the dialogue so far (never the reference) and says something. A message with
`I WANT TO ANSWER:` ends the episode, what stands behind the marker is the answer; so does the message of the last turn,
whose text is then the answer. Otherwise the human, who alone sees the reference, replies. As in the published data, of
a message with `OUTPUT:` only the part behind it (up to a second `OUTPUT:`) is said; before it the agent thinks. What a
model thinks in marks of its own (colbench/lm/texts.py) is no part of its message: kept as "thoughts" beside it, it is
not looked through for these words, and no model sees it again.

Collection and evaluation both go through `play`.
"""
from colbench.env.data import FAILED, failed
from colbench.lm.texts import MARKER, kept_beside, spent_on
from colbench.lm.tokens import render
from colbench.run.errors import UserError
from colbench.run.files import seed_of

MAX_TURNS = 10


def said(raw: str) -> tuple[str, str]:
    """(what the human sees, what is kept of the raw text) of an agent's message, by the published `OUTPUT:` rule."""
    pieces = raw.split("OUTPUT:")
    return (pieces[1].strip(), "OUTPUT:".join(pieces[:2])) if len(pieces) > 1 else (raw.strip(), raw)


def answer_of(history: list[dict], last_turn: bool) -> str | None:
    """The answer in the agent's latest message if that ends the episode, else None."""
    content = history[-1]["content"]
    if MARKER in content:
        return content.split(MARKER)[1].strip()
    return content if last_turn else None


def prompt_messages(system: str, history: list[dict]) -> list[dict]:
    """What the agent sees: the system prompt, role and content of every message so far. Nothing else of a task."""
    return [{"role": "system", "content": system}] + [{"role": m["role"], "content": m["content"]} for m in history]


def states_with_candidates(trajectories: list[dict], agent_prompt: str) -> list[dict]:
    """The states at which candidates were sampled.

    {"id", "sample", "turn" (from 1), "max_turns", "messages" (what the agent saw), "candidates" (exact
    duplicates dropped), "task"}. agent_prompt: the system prompt where a line has none.
    """
    states = []
    for trajectory in trajectories:
        system = trajectory.get("system", agent_prompt.replace("{max_turns}", str(MAX_TURNS)))
        max_turns = trajectory.get("max_turns", MAX_TURNS)
        turn = 0
        for i, message in enumerate(trajectory["dialogue_history"]):
            turn += message["role"] == "assistant"
            if message.get("candidates"):
                states.append({
                    "id": trajectory["id"], "sample": trajectory["sample"], "turn": turn,
                    "max_turns": max_turns,
                    "messages": prompt_messages(system, trajectory["dialogue_history"][:i]),
                    "candidates": list(dict.fromkeys(message["candidates"])), "task": trajectory["task"]})
    return states


def play(agent, human, todo, *, agent_prompt, answer=answer_of, max_turns=MAX_TURNS, n_candidates=16,
         candidate_share=0.0, temperature=1.0, max_new_tokens=1024, parallel=64, seed=0, done=None, choose=None):
    """Play many dialogues at once; yields lists of finished episodes, in the order in which they end.

    A task with "start" (a dialogue that ends with the human's message) is played on from there.
    agent: anything with `.sample` (LocalChat, ServerChat). human: anything with `.reply` (colbench.env.humans).
    todo: list of (task, sample number).
    answer: (history, last turn?) -> the answer with which the latest message ends the episode, or None.
    At a `candidate_share` of the turns n_candidates messages are sampled; the first of them is the one played, and it
    is the one that would have been played without the others. All seeds come from (seed, task id, sample, turn).
    choose: None, or a function that gets states as `states_with_candidates` makes them and returns, for each, the
    number of the candidate to play (best-of-N); that one then comes first.
    done: {(task id, sample): episode} of what an interrupted run has finished. These are not played and not yielded;
    but where all is local they are followed from turn to turn, and sampled anew beside one that is missing. So that one
    meets the batches it would have met without the interruption, and is the same to the last bit; it costs at most
    `max_turns` batches.

    An error of agent or human ends that dialogue with outcome "simulation_failed" and touches no other; "error" says
    why. An episode is a line of trajectories.jsonl but for the scores.
    """
    done = done or {}
    if not (getattr(agent, "repeatable", False) and getattr(human, "repeatable", False)):
        todo, done = [(task, sample) for task, sample in todo if (task["id"], sample) not in done], {}
    waiting, active = list(reversed(todo)), []
    system = agent_prompt.replace("{max_turns}", str(max_turns))
    while waiting or active:
        while waiting and len(active) < parallel:
            task, sample = waiting.pop()
            active.append({
                "id": task["id"], "sample": sample, "task": task, "system": system, "max_turns": max_turns,
                "answer": None, "outcome": None,
                "dialogue_history": list(
                    task.get("start") or [{"role": "user", "content": task["problem_description"]}]),
            })
        records = {id(e): done[e["id"], e["sample"]] for e in active if (e["id"], e["sample"]) in done}
        missing, seeds = len(records) < len(active), []
        for episode in active:
            names = (seed, episode["id"], episode["sample"], len(episode["dialogue_history"]))
            draw = seed_of(*names, "candidates") / 2**63
            seeds.append([seed_of(*names, "agent", k) for k in range(n_candidates if draw < candidate_share else 1)])
        prompts = [prompt_messages(system, episode["dialogue_history"]) for episode in active]
        replies = agent.sample(prompts, seeds, temperature=temperature,
                               max_new_tokens=max_new_tokens) if missing else active
        if choose and missing:
            _best_first(choose, active, prompts, replies)
        for episode, prompt, messages in zip(active, prompts, replies):
            if id(episode) in records:
                _follow(episode, records[id(episode)])
            else:
                _agent_turn(agent, episode, prompt, messages, max_turns, answer)

        asking = [episode for episode in active if episode["outcome"] is None]
        human_seeds = [seed_of(seed, e["id"], e["sample"], len(e["dialogue_history"]), "human") for e in asking]
        histories = [prompt_messages("", e["dialogue_history"])[1:] for e in asking]
        texts = human.reply([e["task"] for e in asking], histories, human_seeds) if asking and missing else asking
        notes = getattr(human, "notes", None) if missing else None  # what else is kept of a message: its screenshot
        leaked = getattr(human, "leaked", None) if missing else None
        thoughts = getattr(human, "thoughts", None) if missing else None
        about = getattr(human, "about", None) if missing else None
        for i, (episode, text) in enumerate(zip(asking, texts)):
            if notes and id(episode) not in records:
                episode["dialogue_history"][-1] |= notes[i]
            if id(episode) in records:
                place = len(episode["dialogue_history"])
                episode["dialogue_history"].append(records[id(episode)]["dialogue_history"][place])
            elif isinstance(text, Exception):
                episode["outcome"], episode["error"] = FAILED, f"human: {type(text).__name__}: {text}"
            else:
                reply = {"role": "user", "content": text} | ({"leaked": True} if leaked and leaked[i] else {})
                reply |= {"thoughts": thoughts[i]} if thoughts and thoughts[i] else {}
                reply |= about[i] if about else {}
                episode["dialogue_history"].append(reply)
        finished = [episode for episode in active if episode["outcome"] and id(episode) not in records]
        active = [episode for episode in active if not episode["outcome"]]
        if finished:
            yield finished


def _best_first(choose, active: list[dict], prompts: list[list[dict]], replies: list[list]) -> None:
    """Put the chosen one of each dialogue's sampled messages in front of the others."""
    sound = [i for i, messages in enumerate(replies)
             if len(messages) > 1 and not any(isinstance(message, Exception) for message in messages)]
    states = [{"id": active[i]["id"], "sample": active[i]["sample"],
               "turn": (len(active[i]["dialogue_history"]) + 1) // 2, "max_turns": active[i]["max_turns"],
               "messages": prompts[i], "candidates": [said(message.text)[1] for message in replies[i]],
               "task": active[i]["task"]} for i in sound]
    for i, best in zip(sound, choose(states) if sound else ()):
        replies[i].insert(0, replies[i].pop(best))


def _follow(episode: dict, record: dict) -> None:
    """Put the agent's message of a finished dialogue into the episode that repeats it, which ends where that ended."""
    episode["dialogue_history"] += record["dialogue_history"][len(episode["dialogue_history"]):][:1]
    if len(episode["dialogue_history"]) == len(record["dialogue_history"]):
        episode["outcome"] = record["outcome"]


def _agent_turn(agent, episode: dict, prompt: list[dict], messages: list, max_turns: int, answer) -> None:
    """Put the agent's message (the first of `messages`) into the episode and end the episode if it is an answer."""
    error = next((message for message in messages if isinstance(message, Exception)), None)
    if error is not None:
        episode["outcome"], episode["error"] = FAILED, f"agent: {type(error).__name__}: {error}"
        return
    content, output = said(messages[0].text)
    turn = {"role": "assistant", "content": content, "output": output}
    turn |= kept_beside(messages[0]._replace(spent=spent_on(*messages)))  # all candidates were read and written
    tokenizer = getattr(agent, "tokenizer", None)
    turn["input"] = render(tokenizer, prompt) if tokenizer else None  # a server keeps its template to itself
    turn = {name: value for name, value in turn.items() if value is not None}  # as it is read from a file
    turn |= {"thoughts": messages[0].thoughts} if messages[0].thoughts else {}
    if len(messages) > 1:
        turn["candidates"] = [said(message.text)[1] for message in messages]
    episode["dialogue_history"].append(turn)
    last_turn = sum(m["role"] == "assistant" for m in episode["dialogue_history"]) == max_turns
    for outcome in ("answered", "limit")[:1 + last_turn]:
        if (found := answer(episode["dialogue_history"], outcome == "limit")) is not None:
            episode["answer"], episode["outcome"] = found, outcome
            break


def keep_sound(batches, servers, window: int = 50):
    """Pass on what `play` yields, failed dialogues only where they are the dialogues' own fault.

    After a failure each of `servers` (ServerChat) is asked for a word. If one does not answer, its UserError ends the
    run, and the failed dialogues are not passed on: the same command plays them again. So it is when `window` dialogues
    in a row fail.
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
            raise UserError(f"the last {len(held)} dialogues all failed ({held[-1]['error']}) and are left out; "
                            "when that is mended, the same command goes on")
    if held:
        yield held


def failures(lines: list[dict], whose: str = "") -> str | None:
    """A sentence on the dialogues among `lines` that failed, None if none did. UserError where all of them did."""
    reasons = [line.get("error", line["outcome"]) for line in lines if failed(line)]
    if not reasons:
        return None
    if len(reasons) == len(lines):
        raise UserError(f"all {len(lines)} dialogues{whose} failed, the last one because of: {reasons[-1]}; "
                        "when that is mended, the same command plays them again")
    return f"{len(reasons)} of {len(lines)} dialogues failed, the last one because of: {reasons[-1]}"
