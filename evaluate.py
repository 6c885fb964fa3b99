"""Stage 4 of SWEET-RL: trained agent and base model play held-out tasks; rates with 95 % intervals.

    python evaluate.py                                  # embedded default: base model and runs/tiny/policy
    python evaluate.py --preset llama --human http://localhost:8000/v1
    python evaluate.py --run runs/single --policies base --max-turns 1         # the paper's "single turn"
    python evaluate.py --run runs/both --policies runs/a/policy runs/b/policy  # side by side
    python evaluate.py --critic runs/tiny/critic        # the report shows which turn earned the credit
    python evaluate.py --run runs/best --policies base --best-of 16 --critic runs/tiny/critic

The agent sees only the dialogue (colbench/env/dialogue.py: play). What is counted is the environment's: in
Backend Programming the answer is run on the task's hidden test calls, and `success` is all of them passed,
under two scorers.

--best-of N plays, at every turn, the message among N that the critic gives the largest advantage,

    a = argmax_{a_1 .. a_N ~ π(·|o)} A(o, a_i, c)

which uses HIDDEN information c: no policy's score, but what the critic is worth (the paper's figure 3a).

Writes RUN/episodes.jsonl (a line an episode, like trajectories.jsonl), RUN/metrics.json and RUN/report.html,
to look at; RUN/episodes_clock.jsonl, what it took; with --critic also RUN/advantages.jsonl. With --k 4,
metrics.json has pass^k and pass@k too. Interrupted, the same command goes on, and plays again what an error
had ended. What else there is to look at:

    python -m colbench.look.comparison runs/a runs/b    # finished runs against each other, task by task
    python -m colbench.look.talk runs/tiny              # be the human yourself
"""
import colbench  # noqa: F401  isort: skip (first: libraries read variables while they are imported)
import json
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from colbench.env.data import episode_line, failed
from colbench.env.dialogue import failures, keep_sound, play
from colbench.env.evidence import Clock, evidence, evidence_remarks
from colbench.env.flags import add_playing_flags, check_playing_flags, load_tasks, parse_flags, script_parser
from colbench.lm.adapters import adapters_in_half, adapters_off, has_adapters
from colbench.lm.load import context_length, load_model, load_tokenizer, prepare_machine, put_adapter
from colbench.lm.logps import message_logps
from colbench.lm.memory import model_row, sampling_memory
from colbench.lm.sampling import LocalChat
from colbench.lm.server import ServerChat, is_address
from colbench.look.credit import add_credit
from colbench.look.report import write_report
from colbench.run.errors import UserError, run_main
from colbench.run.files import append_jsonl, lock_run, repair_jsonl, rewrite_jsonl, write_aside
from colbench.run.settings import hide_password, keep_settings, keep_weights, plan, read_json
from colbench.run.shards import shard_path, shards_hint
from colbench.train.heads import value_head
from colbench.train.ranking import UNTRAINED, score_candidates

PRESETS = {
    "tiny": dict(  # the embedded model on the bundled mini benchmark
        model="tiny", load_in_4bit=False, n_tasks=500, human="scripted", parallel=250, max_new_tokens=96,
        batch_tokens=65536, tokens_per_step=384),  # the latter: of the critic, with --best-of
    "llama": dict(model="meta-llama/Llama-3.1-8B-Instruct", load_in_4bit=True, n_tasks=1000, human="self",
                  parallel=64, max_new_tokens=1024, batch_tokens=32768, tokens_per_step=8192),
}


def main():
    prepare_machine()
    args, environment = parse_args()
    tasks, env = load_tasks(args, environment), environment(args, args.run)
    lock_run(args.episodes.parent, f"evaluate-{args.episodes.stem}")
    order = [(name, task["id"], sample) for name in args.names.values()
             for sample in range(args.k) for task in tasks]
    there = repair_jsonl(args.episodes, episode_line(environment, policy=True))
    lines = [line for line in there if not failed(line)]  # what an error had ended is played again
    missing = {*order} - {episode_key(line) for line in lines}
    if not missing:
        keep_what_it_is_made_with(args, bool(lines))
        rewrite_jsonl(args.episodes, lines, order, episode_key)  # a kill before the last step, or shards
        print(f"{args.episodes} is complete: nothing to play")
        return report(args, env, tasks, lines, order)
    print(f"{len(missing)} of {len(order)} episodes to play")
    if len(lines) < len(there):
        rewrite_jsonl(args.episodes, lines, order, episode_key)
    players = Players(args)
    with env, open(args.episodes, "a", encoding="utf-8") as output:
        print_plan(args, env, len(tasks), players.shared)
        keep_what_it_is_made_with(args, bool(lines))
        for policy, name in args.names.items():
            todo = [(task, sample) for sample in range(args.k) for task in tasks]
            done = {(line["id"], line["sample"]): line for line in lines if line["policy"] == name}
            bar = tqdm(total=sum(key[0] == name for key in missing), desc=name, unit="episode", smoothing=0)
            rewards = []
            agent, human, choose = players.seat(policy, env)
            clock = Clock(args.episodes, name, (agent, getattr(human, "chat", None)))
            for episodes in converse(args, env, agent, human, choose, todo, done):
                sound = [e for e in episodes if not failed(e)]
                scores = env.score([(e["task"], e["answer"]) for e in sound])
                for episode, (reward, details) in zip(sound, scores, strict=True):
                    episode["reward"], episode["scores"] = float(reward), details
                    rewards.append(episode["reward"])
                for episode in episodes:
                    episode["policy"] = name
                    append_jsonl(output, episode)
                clock.batch(len(episodes))
                lines += episodes
                bar.update(len(episodes))
                n = max(1, len(rewards))
                bar.set_postfix(reward=f"{sum(rewards) / n:.3f}", success=f"{rewards.count(1) / n:.3f}")
            bar.close()
    rewrite_jsonl(args.episodes, lines, order, episode_key)
    report(args, env, tasks, lines, order, players.shared)


def converse(args, env, agent, human, choose, todo, done):
    """Play the dialogues of `todo`, (task, sample number), that are not `done`; yields them in lists."""
    servers = [chat for chat in (agent, getattr(human, "chat", None)) if isinstance(chat, ServerChat)]
    return keep_sound(play(
        agent, human, todo, agent_prompt=args.agent_prompt, answer=env.answer, max_turns=args.max_turns,
        n_candidates=args.best_of, candidate_share=float(args.best_of > 1), choose=choose,
        temperature=args.temperature, max_new_tokens=args.max_new_tokens, parallel=args.parallel,
        seed=args.seed, done=done), servers)


class Players:
    """Who plays: policies, base model and critic, on one set of weights where they are adapters; servers."""

    def __init__(self, args):
        self.args, self.shared = args, None  # once there is an adapter, the PeftModel around the base model
        if not all(map(is_address, args.policies)):
            self.tokenizer = load_tokenizer(args.model)
            self.shared = load_model(args.model, args.load_in_4bit)

    def seat(self, policy: str, env):
        """(agent, human, the function that chooses among --best-of messages or None) for a policy."""
        args, choose, base = self.args, None, None
        if is_address(policy):
            agent = ServerChat(policy)
            agent.check()
        else:
            model = self.shared if policy == "base" else put_adapter(self.shared, policy)
            whole = policy != "base" and not has_adapters(model)  # fully fine-tuned: a model beside the base
            self.shared = self.shared if whole else model
            if args.best_of > 1:
                choose = self.chooser(env, None if whole or policy == "base" else model.active_adapter)
            agent = LocalChat(model if whole else self.shared, self.tokenizer, adapters=policy != "base",
                              batch_tokens=args.batch_tokens)
        if self.shared is not None:
            base = LocalChat(self.shared, self.tokenizer, adapters=False, batch_tokens=args.batch_tokens)
        return agent, env.human(args.human, base), choose

    def chooser(self, env, policy_adapter: str | None):
        """The function that says which of N messages to play, by --critic."""
        args, critic = self.args, None
        flags = dict(critic=args.critic, no_hidden_info=False, no_length_norm=False, official=False)
        if args.critic not in UNTRAINED:
            flags |= dict(critic="logprob") | read_json(Path(args.critic) / "training_args.json")
            if flags.get("vision_critic"):
                raise UserError(f"--critic {args.critic}: sees pictures; only train_critic.py ranks with it")
            critic = put_adapter(self.shared, args.critic)  # after full fine-tuning it is a model of its own
            if (Path(args.critic) / "value_head.pt").exists():
                critic.value_head = value_head(critic, args.critic)
        flags = {"tokens_per_step": args.tokens_per_step} | flags | {"max_tokens": context_length(args.model)}
        playing = {name: getattr(args, name) for name in ("human", "max_new_tokens", "seed", "batch_tokens")}
        flags = SimpleNamespace(**flags | playing)
        critic_adapter = critic.active_adapter if has_adapters(critic) else None
        shared = self.shared = critic if critic_adapter else self.shared

        def activate(adapter):
            if adapter:
                shared.set_adapter(adapter)

        def reference_logps(trees):  # π_ref
            with torch.no_grad(), adapters_off(shared):
                return message_logps(shared, trees)

        def choose(states):
            activate(critic_adapter)
            with adapters_in_half(shared):
                scores = score_candidates(flags, states, self.tokenizer, critic or shared, reference_logps,
                                          environment=env)
            activate(policy_adapter)
            return [max(range(len(row)), key=row.__getitem__) if row else 0 for row in scores]  # []: too long

        activate(policy_adapter)
        return choose


def episode_key(line: dict) -> tuple:
    return line["policy"], line["id"], line["sample"]


def keep_what_it_is_made_with(args, begun: bool) -> None:
    """One file holds what was played with one set of flags and weights; --best-of names rows of its own."""
    keep_settings(args.episodes, args, begun, free=("critic", "best_of", "tokens_per_step"), refuse=True)
    trained = [*args.policies, *([args.critic] if args.best_of > 1 else [])]
    keep_weights(args.episodes, [folder for folder in trained if Path(folder).is_dir()])


def print_plan(args, env, n_tasks: int, base) -> None:
    plan("evaluate", {
        "agents": ", ".join(args.names.values()), "model": model_row(base, args.model) if base else None,
        "human": hide_password(args.human), "tasks": f"{n_tasks} of {args.tasks}, {args.k} episodes each",
        "tokens": f"at most {args.max_turns} messages of {args.max_new_tokens} an episode",
        "memory": sampling_memory(base, args.batch_tokens) if base else None, **env.plan(),
        "output": args.episodes})


def report(args, env, tasks: list[dict], lines: list[dict], order: list[tuple], model=None) -> None:
    """Write metrics.json and report.html and print the table. model: the base model, if it is in memory."""
    wanted = {*order}
    lines = [line for line in lines if episode_key(line) in wanted]
    by_policy = {name: [line for line in lines if line["policy"] == name] for name in args.names.values()}
    trouble = failures(lines)
    evaluation = env.evaluation(by_policy, tasks, read_json(args.metrics))
    for name, found in evidence(env, by_policy, args.episodes).items():
        evaluation["policies"][name] |= found
    settings = {name: str(value) if isinstance(value, Path) else hide_password(value)
                for name, value in vars(args).items() if name != "names"}
    settings["policies"] = [hide_password(policy) for policy in args.policies]
    text = json.dumps({"settings": settings, **evaluation}, indent=1)
    write_aside(args.metrics, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))
    rows = [["", *env.columns]] + [[policy, *(column(m) for column in env.columns.values())]
                                   for policy, m in evaluation["policies"].items()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    print()
    for name, *cells in rows:
        print(f"{name:{widths[0]}}", *(f"{cell:>{n}}" for cell, n in zip(cells, widths[1:])), sep="  ")
    print("", *env.remarks(evaluation, tasks), *evidence_remarks(evaluation["policies"]), sep="\n")
    if trouble:
        print(trouble)
    if args.critic and args.best_of == 1:
        add_credit(Path(args.run) / "advantages.jsonl", lines, args.critic, args.model, args.load_in_4bit,
                   load_tokenizer(args.model), model)
    page = shard_path(args.metrics.with_name("report.html"), args.shard)
    write_report(page, [args.run], evaluation["policies"], lines)
    print(f"{args.episodes} has every dialogue, {args.metrics} every number; to look at: {page}")
    critic = Path(args.run) / "critic"
    if args.shard[1] > 1:
        print(shards_hint(args.episodes, args.shard))
    elif critic.exists() and not args.critic:
        print(f"next: which turn earned the credit? The same command with --critic {critic}. Be the human? "
              f"python -m colbench.look.talk {args.run}")
    for name, of_policy in by_policy.items():
        failures(of_policy, f" of {name}")  # where all of one policy failed: exit code 2


def parse_args():
    parser, environment = script_parser(__doc__, "evaluate", PRESETS)
    parser.add_argument("--policies", nargs="+", metavar="POLICY", help="base, folders of train_policy.py, "
                        "servers' addresses as for --human (default: base RUN/policy)")
    parser.add_argument("--model", help="hub id or folder of the base model")
    parser.add_argument("--k", type=int, default=1, help="episodes a task")
    parser.add_argument("--critic", help="what train_critic.py wrote: the report then shows the advantage of "
                        "every turn and token; with --best-of also untrained, random, judge or rollout")
    parser.add_argument("--best-of", type=int, default=1, metavar="N", help="at every turn, play the best of "
                        "N messages by --critic, see above")
    parser.add_argument("--seed", type=int, default=1, help="of all sampling and shuffling")
    add_playing_flags(parser, "evaluate")
    environment.add_flags(parser, "evaluate")
    args, _ = parse_flags(parser)
    check_playing_flags(args, "best_of")
    args.policies = list(dict.fromkeys(args.policies or ["base", str(Path(args.run) / "policy")]))
    check_critic(args)
    for policy in args.policies:
        if policy != "base" and not is_address(policy) and not is_model(policy):
            raise UserError(f"{policy}: no trained policy here; run train_policy.py, or --policies base")
        if is_address(policy) and args.best_of > 1:
            raise UserError("--best-of scores messages with the local --model, it does not go with a server")
    chosen = f" (best of {args.best_of} by {args.critic})" if args.best_of > 1 else ""
    args.names = {policy: hide_password(policy) + chosen for policy in args.policies}  # as in episodes.jsonl
    args.episodes = shard_path(Path(args.run) / "episodes.jsonl", args.shard)
    args.metrics = shard_path(Path(args.run) / "metrics.json", args.shard)
    return args, environment


def is_model(folder: str) -> bool:
    return any((Path(folder) / name).exists() for name in ("config.json", "adapter_config.json"))


def check_critic(args) -> None:
    """UserError for a --critic that is none, or does not go with --best-of."""
    if args.shard[1] > 1 and args.critic and args.best_of == 1:
        raise UserError("--critic for the report wants all episodes: put the shards together, then give it "
                        "without --shard")
    if args.best_of > 1 and not args.critic:
        raise UserError("--best-of needs --critic: a folder of train_critic.py, untrained, random, "
                        "judge or rollout")
    if args.critic in UNTRAINED and args.best_of == 1:
        raise UserError(f"--critic {args.critic} needs --best-of, as in --best-of 16")
    if args.critic and args.critic not in UNTRAINED and not is_model(args.critic):
        raise UserError(f"--critic {args.critic}: no trained critic here; run train_critic.py first")
    if args.critic and args.best_of == 1 and (Path(args.critic) / "value_head.pt").exists():
        raise UserError(f"--critic {args.critic}: gives one number a message by its head, no log-ratios of "
                        "tokens, which the report shows; add --best-of 16, or give one of --critic logprob")


if __name__ == "__main__":
    run_main(main, out_of_memory="lower --batch-tokens")
