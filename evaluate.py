"""Stage 4 of SWEET-RL: base model and trained agent play held-out tasks; rates with 95 % intervals.

    python evaluate.py                                  # embedded model: base and runs/tiny/policy
    python evaluate.py --preset llama --human http://localhost:8000/v1
    python evaluate.py --run runs/single --policies base --max-turns 1  # the paper's "single turn"
    python evaluate.py --run runs/both --policies runs/a/policy runs/b/policy  # side by side
    python evaluate.py --critic runs/tiny/critic        # the report shows which turn earned credit
    python evaluate.py --run runs/best --policies base --best-of 16 --critic runs/tiny/critic

The agent sees only the dialogue (`play` in colbench/env/dialogue.py). The environment defines what
is counted: in Backend Programming the answer runs on the task's hidden test calls, under two
scorers, and `success` means that all of them pass.

--best-of N plays, at every turn, the message among N with the largest advantage by --critic,

    a = argmax_{a_1 .. a_N ~ π(·|o)} A(o, a_i, c)

which uses the HIDDEN information c: it measures the critic, not a policy (the paper's figure 3a).

Writes RUN/episodes.jsonl (one line per episode, like trajectories.jsonl), RUN/metrics.json and
RUN/report.html, the file to open; RUN/episodes_clock.jsonl, the time it took; with --critic also
RUN/advantages.jsonl. With --k 4, metrics.json has pass^k and pass@k. Repeat the command to resume;
it retries episodes that failed. See also:

    python -m colbench.look.comparison runs/a runs/b    # finished runs compared task by task
    python -m colbench.look.talk runs/tiny              # be the human yourself
"""
import colbench  # noqa: F401  isort: skip (first: libraries read variables while they are imported)
from pathlib import Path

from tqdm import tqdm

from colbench.env.agents import Agents
from colbench.env.data import episode_line, failed
from colbench.env.dialogue import (failures, play, score_and_append, servers_of,
                                   without_server_failures)
from colbench.env.evidence import Clock
from colbench.env.flags import (add_playing_flags, check_playing_flags, load_tasks, parse_flags,
                                print_settings, script_parser)
from colbench.lm.load import load_tokenizer, prepare_machine
from colbench.lm.memory import model_row, sampling_memory
from colbench.lm.server import is_address
from colbench.look.credit import add_credit
from colbench.look.metrics import print_table, write_metrics
from colbench.look.report import write_report
from colbench.run.errors import UserError, run_main
from colbench.run.files import lock_run, repair_jsonl, rewrite_jsonl
from colbench.run.settings import hide_password, keep_settings, keep_weights, plan
from colbench.run.shards import shard_path, shards_hint
from colbench.train.best_of import check_critic, make_chooser

PRESETS = {
    "tiny": dict(  # the embedded model on the bundled mini benchmark, on a CPU
        model="tiny", load_in_4bit=False, human="scripted", n_tasks=500,
        parallel=250,          # dialogues side by side
        max_new_tokens=96,     # per message
        batch_tokens=65536,    # held at once while sampling
        tokens_per_step=384),  # of the critic's forward pass, with --best-of
    "llama": dict(
        model="meta-llama/Llama-3.1-8B-Instruct", load_in_4bit=True, human="self", n_tasks=1000,
        parallel=64, max_new_tokens=1024, batch_tokens=32768, tokens_per_step=8192),
}


def main():
    prepare_machine()
    args, environment = parse_args()
    tasks, env = load_tasks(args, environment), environment(args, args.run)
    lock_run(args.episodes.parent, f"evaluate-{args.episodes.stem}")
    order = [(name, task["id"], sample) for name in args.names.values()
             for sample in range(args.k) for task in tasks]
    kept = repair_jsonl(args.episodes, episode_line(environment, policy=True))
    lines = [line for line in kept if not failed(line)]  # failed episodes are retried
    missing = {*order} - {episode_key(line) for line in lines}
    agents = None
    if missing:
        print(f"{len(missing)} of {len(order)} episodes to play")
        if len(lines) < len(kept):
            rewrite_jsonl(args.episodes, lines, order, episode_key)
        agents = Agents(args.policies, args.model, args.load_in_4bit, args.batch_tokens)
        with env:
            print_plan(args, env, len(tasks), agents.model)
            keep_provenance(args, started=bool(lines))
            for policy, name in args.names.items():
                todo = [(task, sample) for sample in range(args.k) for task in tasks
                        if (name, task["id"], sample) in missing]
                lines += evaluate(args, env, agents, policy, name, todo)
    else:
        keep_provenance(args, started=bool(lines))
        print(f"{args.episodes}: already complete")
    rewrite_jsonl(args.episodes, lines, order, episode_key)
    base_model = agents.model if agents else None
    report(args, env, tasks, lines, order, base_model)


def evaluate(args, env, agents, policy: str, name: str, todo: list[tuple]) -> list[dict]:
    """Play `todo`, (task, sample number), with a policy; append the episodes, return them."""
    choose, candidate_share = None, 0.0
    if args.best_of > 1:  # before the agent: the critic's adapters may go on the base model too
        choose, candidate_share = make_chooser(args, agents, env), 1.0
    agent = agents.agent(policy)
    human = env.human(args.human, agents.base())
    clock = Clock(args.episodes, name, (agent, getattr(human, "chat", None)))
    bar = tqdm(total=len(todo), desc=name, unit="episode", smoothing=0)
    played = without_server_failures(play(
        agent, human, todo, agent_prompt=args.agent_prompt, answer=env.answer,
        max_turns=args.max_turns, n_candidates=args.best_of,
        candidate_share=candidate_share, choose=choose, temperature=args.temperature,
        max_new_tokens=args.max_new_tokens, parallel=args.parallel, seed=args.seed),
        servers_of(agent, human))
    lines = []
    with open(args.episodes, "a", encoding="utf-8") as file:
        for episodes in score_and_append(env, played, file, bar, policy=name):
            clock.batch(len(episodes))
            lines += episodes
    bar.close()
    return lines


def episode_key(line: dict) -> tuple:
    return line["policy"], line["id"], line["sample"]


def keep_provenance(args, started: bool) -> None:
    """One file holds one set of flags and weights; --best-of names its own rows."""
    keep_settings(args.episodes, args, started, free=("critic", "best_of", "tokens_per_step"),
                  refuse=True)
    trained = list(args.policies)
    if args.best_of > 1:
        trained.append(args.critic)
    keep_weights(args.episodes, [folder for folder in trained if Path(folder).is_dir()])


def print_plan(args, env, n_tasks: int, base_model) -> None:
    rows = {"agents": ", ".join(args.names.values())}
    if base_model is not None:
        rows["model"] = model_row(base_model, args.model)
        rows["memory"] = sampling_memory(base_model, args.batch_tokens)
    plan("evaluate", rows | {
        "human": hide_password(args.human),
        "tasks": f"{n_tasks} of {args.tasks}, {args.k} episodes per task",
        "tokens": f"at most {args.max_turns} messages of {args.max_new_tokens} per episode",
        **env.plan(), "output": args.episodes})


def report(args, env, tasks: list[dict], lines: list[dict], order: list[tuple], base_model) -> None:
    """Write metrics.json and report.html and print the table."""
    wanted = {*order}
    lines = [line for line in lines if episode_key(line) in wanted]
    by_policy = {name: [line for line in lines if line["policy"] == name]
                 for name in args.names.values()}
    trouble = failures(lines)
    evaluation = write_metrics(args, env, by_policy, tasks)
    print_table(env, evaluation, tasks)
    if trouble:
        print(trouble)
    if args.critic and args.best_of == 1:
        add_credit(Path(args.run) / "advantages.jsonl", lines, args.critic, args.model,
                   args.load_in_4bit, load_tokenizer(args.model), base_model)
    page = shard_path(args.metrics.with_name("report.html"), args.shard)
    write_report(page, [args.run], evaluation["policies"], lines)
    print(f"{args.episodes}: every dialogue. {args.metrics}: every number. Open {page}")
    critic = Path(args.run) / "critic"
    if args.shard[1] > 1:
        print(shards_hint(args.episodes, args.shard))
    elif critic.exists() and not args.critic:
        print(f"next: which turn earned the credit? The same command with --critic {critic}. Be "
              f"the human? python -m colbench.look.talk {args.run}")
    for name, of_policy in by_policy.items():  # UserError if all episodes of one policy failed
        failures(of_policy, f" of {name}")


def parse_args():
    parser, environment = script_parser(__doc__, "evaluate", PRESETS)
    parser.add_argument("--policies", nargs="+", metavar="POLICY", help="base, folders written by "
                        "train_policy.py, servers' addresses as for --human (default: base "
                        "RUN/policy)")
    parser.add_argument("--model", help="hub id or folder of the base model")
    parser.add_argument("--k", type=int, default=1, help="episodes per task")
    parser.add_argument("--critic", help="folder written by train_critic.py: the report shows the "
                        "advantage of every turn and token; with --best-of also untrained, random, "
                        "judge or rollout")
    parser.add_argument("--best-of", type=int, default=1, metavar="N", help="at every turn, play "
                        "the best of N messages by --critic, see above")
    parser.add_argument("--seed", type=int, default=1, help="for all sampling and shuffling")
    add_playing_flags(parser, "evaluate")
    environment.add_flags(parser, "evaluate")
    args, _ = parse_flags(parser)
    check_playing_flags(args, "best_of")
    default = ["base", str(Path(args.run) / "policy")]
    args.policies = list(dict.fromkeys(args.policies or default))
    check_critic(args)
    for policy in args.policies:
        if is_address(policy) and args.best_of > 1:
            raise UserError("--best-of scores messages with the local --model, not with a server")
        if policy != "base" and not is_address(policy) and not is_model(policy):
            raise UserError(f"{policy}: no trained policy here; run train_policy.py, or use "
                            "--policies base")
    chosen = f" (best of {args.best_of} by {args.critic})" if args.best_of > 1 else ""
    args.names = {policy: hide_password(policy) + chosen for policy in args.policies}  # of the rows
    args.episodes = shard_path(Path(args.run) / "episodes.jsonl", args.shard)
    args.metrics = shard_path(Path(args.run) / "metrics.json", args.shard)
    print_settings(parser, args)
    return args, environment


def is_model(folder: str) -> bool:
    names = "config.json", "adapter_config.json"
    return any((Path(folder) / name).exists() for name in names)


if __name__ == "__main__":
    run_main(main, out_of_memory="lower --batch-tokens")
