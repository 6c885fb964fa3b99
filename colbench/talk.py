"""Play the human yourself: `evaluate.py --talk [TASK]`. You see the hidden reference, the agent sees what you type."""
import re
import sys
from pathlib import Path

from colbench.credit import add_credit
from colbench.dialogue import play
from colbench.files import UserError, append_jsonl
from colbench.humans import leaks
from colbench.model import has_adapters, load_model, load_tokenizer, put_adapter
from colbench.sampling import LocalChat
from colbench.scorer import Scorer
from colbench.server import ServerChat
from colbench.tasks import load_tasks


class TerminalHuman:
    """The human is who sits at the terminal. Counts leaks like the simulated humans."""

    def __init__(self):
        self.replies = self.leaks = 0

    def reply(self, tasks, histories, seeds):
        """See colbench.humans. One dialogue at a time; UserError when the input ends."""
        texts = []
        for history in histories:
            print(f"\nagent {sum(m['role'] == 'assistant' for m in history)}:\n{indented(history[-1]['content'])}\n")
            text = ""
            while not text:  # an empty reply is a slip of the finger
                try:
                    text = input("you> ").strip()
                except EOFError:
                    raise UserError("the input ended before the agent answered: nothing is scored") from None
            texts.append(text.encode("utf-8", "replace").decode())
        self.leaked = [leaks(text, task["ground_truth"]) for text, task in zip(texts, tasks)]
        self.replies += len(texts)
        self.leaks += sum(self.leaked)
        return texts


def indented(text) -> str:
    """A model's text for the terminal: control characters, which could drive it, are written out."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]",
                  lambda found: f"\\x{ord(found[0]):02x}", str(text).replace("\r\n", "\n"))
    return "\n".join("    " + line for line in text.split("\n"))


def talk(args) -> None:
    """One dialogue with the last of args.policies on task number args.talk, counted from 1. Appends it to RUN/talk.jsonl."""
    sys.stdin.reconfigure(errors="replace")  # a byte that is no UTF-8 is a slip of the finger too
    if args.talk < 1:
        raise UserError(f"--talk {args.talk}: tasks are counted from 1")
    tasks = load_tasks(args.tasks, args.talk)
    if len(tasks) < args.talk:
        raise UserError(f"--talk {args.talk}: {args.tasks} has only {len(tasks)} tasks")
    task, policy = tasks[-1], args.policies[-1]
    model = tokenizer = None
    if args.agent_server:
        agent = ServerChat(args.agent_server, args.agent_server_model)
        agent.check()
    else:
        model, tokenizer = load_model(args.model, args.load_in_4bit), load_tokenizer(args.model)
        model = model if policy == "base" else put_adapter(model, policy)
        agent = LocalChat(model, tokenizer, batch_tokens=args.batch_tokens)
    print(f"You are the human in task {args.talk} of {args.tasks} ({task['id']}); the agent is {policy}.\n"
          f"It has been told this:\n\n{indented(task['problem_description'])}\n\n"
          f"You alone know what the program has to do, it is this reference:\n\n{indented(task['ground_truth'])}\n\n"
          f"Answer its questions truthfully, in a sentence, without code. It has {args.max_turns} messages, its answer included.")
    with Scorer(workers=1, allow_weak=args.allow_weak_sandbox) as scorer:
        episode = next(play(agent, TerminalHuman(), [(task, 0)], agent_prompt=args.agent_prompt, max_turns=args.max_turns,
                            n_candidates=1, temperature=args.temperature, max_new_tokens=args.max_new_tokens, parallel=1,
                            seed=args.seed))[0]
        if episode["answer"] is None:
            raise UserError(f"the dialogue failed: {episode.get('error', episode['outcome'])}")
        result = episode["scores"] = scorer.score(task, episode["answer"])
    fixed, turns = result["fixed"], [m for m in episode["dialogue_history"] if m["role"] == "assistant"]
    episode |= {"reward": fixed["passed"] / max(1, fixed["total"]), "policy": policy}
    path = Path(args.run) / "talk.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    episode["sample"] = path.read_bytes().count(b"\n") if path.exists() else 0
    append_jsonl(path, episode)
    print(f"\nagent {len(turns)}, the answer:\n{indented(episode['answer'])}\n")
    for call, verdict, expected, got in zip(task["test_cases"].values(), fixed["calls"], fixed["expected"], fixed["got"]):
        wrong = "" if verdict == "passed" or got is None else f", got {got}"
        print(f"    {verdict:9}  {indented(call).strip()} = {expected}{wrong}")
    leaked = sum(m.get("leaked", False) for m in episode["dialogue_history"])
    print(f"\n{fixed['passed']} of {fixed['total']} tests passed (official scorer: {result['official']['passed']}): "
          f"{'solved' if 0 < fixed['total'] == fixed['passed'] else 'not solved'}, after {len(turns)} messages of the agent"
          + (f"; {leaked} of your replies held code of the reference" if leaked else ""))
    if args.critic and model is not None:
        base = model if has_adapters(model) or policy == "base" else None  # a fully fine-tuned policy does not hold π_ref
        rows = add_credit(None, [episode], args.critic, args.model, args.load_in_4bit, tokenizer, base)
        print("\nadvantage of each message, by the critic that sees the reference:")
        for turn, message in zip(rows[0]["turns"], turns):
            print(f"    {turn['advantage']:+.2f}  {indented(message['content'])[4:].splitlines()[0][:100]}")
    print(f"\nThe dialogue is in {path}. Another task: --talk {args.talk + 1}; the untrained agent: --policies base")
