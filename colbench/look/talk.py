"""Be the human yourself, in the terminal: you see the hidden information, the agent what you type.

    python -m colbench.look.talk runs/tiny                         # first held-out task
    python -m colbench.look.talk runs/tiny --task 3 --policy base  # third, with the untrained agent

The dialogue is appended to RUN/talk.jsonl. If RUN has a critic, the advantage of each message is
shown at the end.
"""
import argparse
import re
import sys
from pathlib import Path
from types import SimpleNamespace

from colbench.env.base import load_environment
from colbench.env.dialogue import MAX_TURNS, play
from colbench.env.humans import leaks
from colbench.lm.adapters import has_adapters
from colbench.lm.load import load_model, load_tokenizer, prepare_machine, put_adapter
from colbench.lm.sampling import LocalChat
from colbench.lm.server import ServerChat, is_address
from colbench.look.credit import add_credit
from colbench.run.errors import UserError, run_main
from colbench.run.files import append_jsonl
from colbench.run.settings import hide_password, read_json, settings_file


class TerminalHuman:
    """The human at the terminal."""

    def reply(self, tasks, histories, seeds):
        """See colbench.env.humans. One dialogue at a time; UserError when the input ends."""
        texts = []
        for history in histories:
            n = sum(message["role"] == "assistant" for message in history)
            print(f"\nagent {n}:\n{indented(history[-1]['content'])}\n")
            text = ""
            while not text:  # an empty reply is a typing slip
                try:
                    text = input("you> ").strip()
                except EOFError:
                    raise UserError("the input ended before the agent answered; nothing was "
                                    "scored") from None
            texts.append(text.encode("utf-8", "replace").decode())
        self.leaked = [leaks(text, task["ground_truth"]) for text, task in zip(texts, tasks)]
        return texts


def indented(text) -> str:
    """A model's text for the terminal, with control characters escaped."""
    control = (r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069"
               r"\ud800-\udfff]")
    text = re.sub(control, lambda match: f"\\x{ord(match[0]):02x}",
                  str(text).replace("\r\n", "\n"))
    return "\n".join("    " + line for line in text.split("\n"))


def main() -> None:
    """One dialogue on one task, with the agent's settings of evaluate.py, else of collect.py."""
    args = parse_args()
    prepare_machine()
    sys.stdin.reconfigure(errors="replace")  # so is a byte that is not UTF-8
    environment = load_environment(args.env)
    tasks = environment.tasks(args.tasks, args.task)
    if len(tasks) < args.task:
        raise UserError(f"--task {args.task}: {args.tasks} has only {len(tasks)} tasks")
    task = tasks[-1]
    model = None
    if is_address(args.policy):
        agent = ServerChat(args.policy)
        agent.check()
    else:
        model = load_model(args.model, args.load_in_4bit)
        tokenizer = load_tokenizer(args.model)
        if args.policy != "base":
            model = put_adapter(model, args.policy)
        agent = LocalChat(model, tokenizer)
    print(f"You are the human in task {args.task} of {args.tasks} ({task['id']}); "
          f"the agent is {hide_password(args.policy)}.\n"
          f"The agent has been told:\n\n{indented(task['problem_description'])}\n\n"
          f"Only you see the hidden information:\n\n{indented(task['ground_truth'])}\n\n"
          "Answer its questions truthfully, in a sentence, without code. "
          f"It has {MAX_TURNS} messages, its answer included.")
    with environment(args, args.run) as env:
        episode = next(play(
            agent, TerminalHuman(), [(task, 0)], agent_prompt=args.agent_prompt, answer=env.answer,
            n_candidates=1, temperature=args.temperature, max_new_tokens=args.max_new_tokens,
            parallel=1, seed=args.seed))[0]
        if episode["answer"] is None:
            raise UserError(f"the dialogue failed: {episode.get('error', episode['outcome'])}")
        [(episode["reward"], episode["scores"])] = env.score([(task, episode["answer"])])
    turns = [message for message in episode["dialogue_history"] if message["role"] == "assistant"]
    path = args.run / "talk.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    episode["policy"] = hide_password(args.policy)
    episode["sample"] = path.read_bytes().count(b"\n") if path.exists() else 0
    append_jsonl(path, episode)
    print(f"\nagent {len(turns)}, the answer:\n{indented(episode['answer'])}\n")
    details = env.details(episode)
    for call, verdict, expected, got in zip(
            task.get("test_cases", {}).values(), details.get("verdicts") or (),
            details.get("expected") or (), details.get("got") or ()):
        wrong = "" if verdict == "passed" or got is None else f", got {got}"
        print(f"    {verdict:9}  {indented(call).strip()} = {expected}{wrong}")
    score = details.get("share", episode["reward"])
    official = f" (official scorer: {details['official']})" if "official" in details else ""
    solved = "solved" if episode["reward"] == 1 else "not solved"
    leaked = sum(message.get("leaked", False) for message in episode["dialogue_history"])
    leaks_text = f"; {leaked} of your replies contained hidden code" if leaked else ""
    print(f"\nscore {score}{official}: {solved} after {len(turns)} agent messages{leaks_text}")
    critic = args.run / "critic"
    has_critic = (critic / "adapter_config.json").exists()
    if model is not None and has_critic and not (critic / "value_head.pt").exists():
        # a fully fine-tuned policy does not contain π_ref
        base = model if has_adapters(model) or args.policy == "base" else None
        rows = add_credit(None, [episode], critic, args.model, args.load_in_4bit, tokenizer, base)
        print("\nadvantage of each message, by the critic, which sees the hidden information:")
        for turn, message in zip(rows[0]["turns"], turns):
            text = indented(message["content"])[4:].splitlines()[0][:100]
            print(f"    {turn['advantage']:+.2f}  {text}")
    print(f"\nThe dialogue is in {path}. Another task: --task {args.task + 1}; "
          "the untrained agent: --policy base")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/tiny"), metavar="RUN",
                        help="folder of a run (default: runs/tiny)")
    parser.add_argument("--task", type=int, default=1,
                        help="number of the task, from 1 (default: 1)")
    parser.add_argument("--policy", help="base, a folder written by train_policy.py, or a server's "
                        "address (default: RUN/policy)")
    parser.add_argument("--tasks", help="(default: the run's)")
    parser.add_argument("--seed", type=int, default=1,
                        help="seed of the agent's sampling (default: 1)")
    args = parser.parse_args()
    if args.task < 1:
        raise UserError(f"--task {args.task}: tasks are counted from 1")
    kept = read_json(settings_file(args.run / "trajectories.jsonl"))
    kept.pop("tasks", None)  # the training tasks
    kept |= read_json(settings_file(args.run / "episodes.jsonl"))
    env = load_environment(kept.get("env", "backend"))
    defaults = {"env": "backend", "model": "tiny", "load_in_4bit": False,
                "agent_prompt": env.prompt, "temperature": 1.0, "max_new_tokens": 96,
                "human": "scripted"}
    known = defaults | env.presets.get("evaluate", {}).get("tiny", {}) | kept
    args.tasks = args.tasks or known.get("tasks")
    trained = args.run / "policy"
    args.policy = args.policy or (str(trained) if trained.exists() else "base")
    return SimpleNamespace(**known | vars(args))


if __name__ == "__main__":
    run_main(main)
