"""Stage 4 of SWEET-RL: the trained agent and the base model play held-out tasks; success rates with 95 % intervals.

    python evaluate.py                                            # embedded default: base model and runs/tiny/policy
    python evaluate.py --preset llama --run runs/llama --human http://localhost:8000/v1
    python evaluate.py --run runs/single --policies base --max-turns 1    # the paper's "single turn" row
    python evaluate.py --policies runs/a/policy runs/b/policy     # any adapters, side by side on the same tasks
    python evaluate.py --critic runs/tiny/critic                  # the report shows which turn earned the credit
    python evaluate.py --policies base --best-of 16 --critic runs/tiny/critic   # every turn: the best of 16 by the critic
    python evaluate.py --compare runs/a runs/b                    # paired differences on the tasks that all runs have
    python evaluate.py --talk 3                                   # be the human yourself, on the third task

The agent sees only the dialogue. Its answer is run on the task's hidden test calls; `success` is all of them passed, counted
under both scorers (`fixed`: one namespace; `official`: the released code's scoping and keyword rules).
Writes RUN/episodes.jsonl (a line an episode, like trajectories.jsonl), RUN/metrics.json and RUN/report.html, to look at.
Interrupted, the same command goes on.
"""

import argparse
import json
import math
from pathlib import Path
from types import SimpleNamespace

from colbench.audit import flaws
from colbench.compare import bootstrap, compare
from colbench.credit import add_credit
from colbench.dialogue import AGENT_PROMPT, keep_sound, play
from colbench.files import (UserError, append_jsonl, lock_run, repair_jsonl, run_main, shard, shard_path, shards_hint,
                            write_aside)
from colbench.frontend.environment import PRESETS as FRONTEND_PRESETS, Frontend, add_env, add_flags, load_opponent, report as frontend_report
from colbench.humans import make_human
from colbench.model import adapters_off, context_length, has_adapters, load_model, load_tokenizer, message_logps, put_adapter
from colbench.report import write_report
from colbench.sampling import LocalChat
from colbench.scorer import Scorer, share, success
from colbench.server import ServerChat, shown
from colbench.show import keep_settings, keep_weights, model_row, plan, sampling_memory
from colbench.talk import talk
from colbench.tasks import failed, load_tasks
from colbench.training import value_head
from train_critic import PRESETS as CRITIC_PRESETS, UNTRAINED, score_candidates

import torch
from tqdm import tqdm

PRESETS = {
    "tiny": dict(run="runs/tiny", model="tiny", load_in_4bit=False, tasks="mini:test", n_tasks=500, human="scripted",
                 parallel=250, max_new_tokens=96, batch_tokens=65536,
                 agent_prompt="Ask about one missing detail at a time, then answer."),
    "llama": dict(run="runs/llama", model="meta-llama/Llama-3.1-8B-Instruct", load_in_4bit=True,
                  tasks="facebook/collaborative_agent_bench:test", n_tasks=1000, human="self", parallel=64,
                  max_new_tokens=1024, batch_tokens=32768, agent_prompt=AGENT_PROMPT),
}


def parse_args():
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", choices=PRESETS, default="tiny", help="defaults for all other flags")
    env, preset = add_env(first), first.parse_known_args()[0].preset
    parser = argparse.ArgumentParser(
        description=__doc__, parents=[first], formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("files")
    group.add_argument("--run", help="directory of this run (default: %(default)s)")
    group.add_argument("--episodes", help="output (default: RUN/episodes.jsonl)")
    group.add_argument("--metrics", help="output (default: RUN/metrics.json)")
    group.add_argument("--tasks", help="mini:test or pages:test, a .jsonl file or a hub data set ID:test (default: %(default)s)")
    group.add_argument("--n-tasks", type=int, help="the first so many tasks (default: %(default)s)")
    group.add_argument("--shard", metavar="I/N", type=shard, default="1/1", help="only every N-th task from the I-th on, into "
                       "episodes-IofN.jsonl; the N files put together are a whole run's")
    group.add_argument("--compare", nargs="+", metavar="RUN", help="play nothing: compare the episodes of these runs, task by task")
    group.add_argument("--retry-errors", action="store_true", help="play dialogues again that an error ended")
    group = parser.add_argument_group("agents")
    group.add_argument("--policies", nargs="+", metavar="POLICY",
                       help="base, or folders that train_policy.py wrote (default: base RUN/policy)")
    group.add_argument("--model", help="hub id or folder of the base model (default: %(default)s)")
    group.add_argument("--load-in-4bit", action=argparse.BooleanOptionalAction, help="NF4 weights (default: %(default)s)")
    group.add_argument("--agent-server", metavar="URL", help="an OpenAI-compatible server plays instead of --policies")
    group.add_argument("--agent-server-model", metavar="NAME", help="model name there (default: the first it lists)")
    group.add_argument("--agent-prompt", help="system prompt; {max_turns} is filled in")
    group.add_argument("--temperature", type=float, default=1.0, help="of the agent (default: %(default)s)")
    group.add_argument("--max-new-tokens", type=int, help="bound on one message (default: %(default)s)")
    group.add_argument("--batch-tokens", type=int,
                       help="tokens held at once while sampling; lower it when memory runs out (default: %(default)s)")
    group.add_argument("--critic", metavar="CRITIC", help="what train_critic.py wrote: the report then shows the advantage of every "
                       "turn and token; with --best-of also untrained, judge or rollout")
    group.add_argument("--best-of", type=int, default=1, metavar="N", help="at every turn, play the best of N messages by --critic, "
                       "which uses HIDDEN information: no policy's score, but what the critic is worth (default: %(default)s)")
    group = parser.add_argument_group("human")
    group.add_argument("--human", help="scripted, self (the base model's weights) or a server's URL; with --env frontend also a "
                       "vision model's id or folder (default: %(default)s)")
    group.add_argument("--human-model", metavar="NAME", help="model name on that server (default: the first it lists)")
    group.add_argument("--talk", nargs="?", type=int, const=1, metavar="TASK",
                       help="be the human yourself, in the terminal, on this task (1 is the first); plays nothing else")
    add_flags(parser).add_argument("--against", metavar="FILE[#POLICY]", help="win rate against these episodes of another run "
                                   "(default: against the first of --policies)")
    group = parser.add_argument_group("episodes")
    group.add_argument("--k", type=int, default=1, help="episodes a task (default: %(default)s)")
    group.add_argument("--max-turns", type=int, default=10, help="agent messages, the answer included (default: %(default)s)")
    group.add_argument("--parallel", type=int, help="dialogues in flight (default: %(default)s)")
    group.add_argument("--seed", type=int, default=1, help="of all sampling and shuffling (default: %(default)s)")
    group.add_argument("--allow-weak-sandbox", action="store_true", help="score even where the sandbox cannot be made safe")
    parser.set_defaults(**PRESETS[preset] | (FRONTEND_PRESETS["evaluate"][preset] if env == "frontend" else {}))
    args = parser.parse_args()
    if min(args.k, args.n_tasks, args.max_turns, args.parallel) < 1:
        raise UserError("--k, --n-tasks, --max-turns and --parallel are at least 1")
    if min(args.max_new_tokens, args.batch_tokens, args.best_of) < 1 or not 0 <= args.temperature < math.inf:
        raise UserError("--max-new-tokens, --batch-tokens and --best-of are at least 1, --temperature is 0 or more")
    if args.against and env != "frontend":
        raise UserError("--against is for --env frontend; --compare RUN RUN compares runs of Backend Programming")
    if args.shard[1] > 1 and args.critic and args.best_of == 1:
        raise UserError("--critic for the report wants all episodes: put the shards together first, then give it without --shard")
    if args.compare:
        return args
    trained = Path(args.run) / "policy"
    args.policies = list(dict.fromkeys(args.policies or (["base", str(trained)] if args.talk is None or trained.exists() else ["base"])))
    if args.best_of > 1 and args.talk is not None:
        raise UserError("--best-of does not go with --talk")
    if args.best_of > 1 and not args.critic:
        raise UserError("--best-of needs --critic: a folder that train_critic.py wrote, or untrained, judge or rollout")
    if args.critic in UNTRAINED and args.best_of == 1:
        raise UserError(f"--critic {args.critic} needs --best-of, such as --best-of 16; the report shows trained critics")
    if args.critic and args.critic not in UNTRAINED:
        if not any((Path(args.critic) / name).exists() for name in ("config.json", "adapter_config.json")):
            raise UserError(f"--critic {args.critic}: no trained critic here; run train_critic.py first")
        if args.best_of == 1 and (Path(args.critic) / "value_head.pt").exists():
            raise UserError(f"--critic {args.critic}: gives one number a message by its head, no log-ratios of tokens, which the report "
                            "shows; add --best-of 16, or give a critic of train_critic.py --critic logprob")
    if args.agent_server and args.best_of > 1:
        raise UserError("--best-of scores messages with the local --model; it does not go with --agent-server")
    if args.agent_server:
        args.policies = [f"server {args.agent_server_model or ''}".strip()]
    for policy in args.policies:
        if policy != "base" and not args.agent_server and not (Path(policy) / "config.json").exists() \
                and not (Path(policy) / "adapter_config.json").exists():
            raise UserError(f"{policy}: no trained policy here; run train_policy.py first, or give --policies base")
    chosen = f" (best of {args.best_of} by {args.critic})" if args.best_of > 1 else ""
    args.names = {policy: policy + chosen for policy in args.policies}  # as in episodes.jsonl
    args.episodes = shard_path(args.episodes or Path(args.run) / "episodes.jsonl", args.shard)
    args.metrics = shard_path(args.metrics or Path(args.run) / "metrics.json", args.shard)
    return args


def main():
    args = parse_args()
    if args.talk is not None and args.env == "frontend":
        raise UserError("--talk is for Backend Programming: a terminal shows no pages")
    if args.talk is not None:
        return talk(args)
    if args.compare:
        return compare(args.compare)
    if args.against:
        load_opponent(args.against)  # a wrong one is told before anything is played
    tasks = load_tasks(args.tasks, args.n_tasks, args.env == "frontend")
    tasks = list({task["id"]: task for task in tasks}.values())[args.shard[0] - 1::args.shard[1]]  # a task twice is one task
    lock = lock_run(args.episodes.parent, f"evaluate-{args.episodes.stem}")  # noqa: F841  held until the process ends
    lines = repair_jsonl(args.episodes, ("policy", "id", "sample"))
    order = [(name, task["id"], sample) for name in args.names.values() for sample in range(args.k) for task in tasks]
    if args.retry_errors:
        lines = [line for line in lines if not failed(line)]
        rewrite(args.episodes, lines, order)
    done = {policy: {(line["id"], line["sample"]): line for line in lines if line["policy"] == name}
            for policy, name in args.names.items()}
    todo = [(task, sample) for sample in range(args.k) for task in tasks]
    missing = {policy: sum((task["id"], s) not in done[policy] for task, s in todo) for policy in args.policies}

    def keep():  # one file holds what was played with one set of flags; --critic and --best-of name a row of their own
        keep_settings(args.episodes, args, bool(lines), free=("critic", "best_of"), refuse=True)
        trained = [*args.policies, *([args.critic] if args.best_of > 1 else [])]
        keep_weights(args.episodes, [folder for folder in trained if not args.agent_server and Path(folder).is_dir()])

    if not any(missing.values()):
        keep()
        rewrite(args.episodes, lines, order)  # killed before the last step, or shards put together
        print(f"{args.episodes} is complete: nothing to play")
        report(args, tasks, lines, order)
        return
    print(f"{sum(missing.values())} of {len(order)} episodes to play on {args.tasks}: "
          f"{', '.join(args.names.values())}; human {shown(args.human)}")
    tokenizer = base = None
    if not args.agent_server:
        tokenizer, base = load_tokenizer(args.model), load_model(args.model, args.load_in_4bit)
    shared = base  # once there is an adapter, the PeftModel around it; a fully fine-tuned policy is a model beside it
    frontend = Frontend(args, args.episodes.parent) if args.env == "frontend" else None
    with frontend or Scorer(allow_weak=args.allow_weak_sandbox) as scorer, open(args.episodes, "a", encoding="utf-8") as output:
        plan("evaluate", {
            "agents": ", ".join(args.names.values()), "model": base and model_row(base, args.model), "human": shown(args.human),
            "tasks": f"{len(tasks)} of {args.tasks}, {args.k} episodes each",
            "tokens": f"at most {args.max_turns} messages of {args.max_new_tokens} an episode, {args.parallel} dialogues at once",
            "memory": base and sampling_memory(base, args.batch_tokens), "sandbox": scorer.tier, "output": args.episodes})
        for policy in args.policies:
            choose = None
            if args.agent_server:
                agent = ServerChat(args.agent_server, args.agent_server_model)
                agent.check()
                human = frontend.human if frontend else make_human(args.human, model=args.human_model)
            else:
                model = shared if policy == "base" else put_adapter(shared, policy)
                whole = policy != "base" and not has_adapters(model)
                shared = shared if whole else model
                if args.best_of > 1:
                    choose, shared = best_of(args, tokenizer, shared, None if whole or policy == "base" else model.active_adapter)
                agent = LocalChat(model if whole else shared, tokenizer, adapters=policy != "base", batch_tokens=args.batch_tokens)
                human = frontend.human if frontend else make_human(
                    args.human, LocalChat(shared, tokenizer, adapters=False, batch_tokens=args.batch_tokens), args.human_model)
            servers = [chat for chat in (agent, getattr(human, "chat", None)) if isinstance(chat, ServerChat)]
            batches = play(agent, human, todo, agent_prompt=args.agent_prompt, max_turns=args.max_turns,
                           n_candidates=args.best_of, candidate_share=float(args.best_of > 1), choose=choose,
                           temperature=args.temperature, max_new_tokens=args.max_new_tokens, parallel=args.parallel,
                           seed=args.seed, done=done[policy], final_page=frontend and frontend.final_page)
            keep()
            wins, bar = 0, tqdm(total=missing[policy], desc=args.names[policy], unit="episode", smoothing=0)
            for episodes in keep_sound(batches, servers):
                sound = [e for e in episodes if not failed(e)]
                for episode, result in zip(sound, scorer.score_many([(e["task"], e["answer"]) for e in sound])):
                    episode["reward"], episode["scores"] = share(result, "fixed"), result
                    wins += result["similarity"] if frontend else success(result, "fixed")
                for episode in episodes:
                    episode["policy"] = args.names[policy]
                    append_jsonl(output, episode)
                lines += episodes
                bar.update(len(episodes))
                bar.set_postfix({"similarity" if frontend else "success": f"{wins / max(1, bar.n):.3f}"})
            bar.close()
    rewrite(args.episodes, lines, order)
    report(args, tasks, lines, order, shared)


def best_of(args, tokenizer, shared, mine: str | None):
    """(function that says which of N messages to play, the shared weights with the critic's adapter too). mine: the policy's adapter."""
    kind, folder = (args.critic, None) if args.critic in UNTRAINED else ("logprob", args.critic)
    settings = dict(critic=kind, no_hidden_info=False, no_length_norm=False, official=False, rollouts=4, batch_tokens=args.batch_tokens,
                    tokens_per_step=CRITIC_PRESETS[args.preset]["tokens_per_step"])
    critic = None
    if folder:
        settings |= json.loads((Path(folder) / "training_args.json").read_text(encoding="utf-8"))
        if settings.get("vision_critic"):
            raise UserError(f"--critic {folder}: it sees pictures, and only train_critic.py ranks with it; give a text critic")
        critic = put_adapter(shared, folder)  # after full fine-tuning it is a model of its own
        if (Path(folder) / "value_head.pt").exists():
            critic.value_head = value_head(critic, folder)
    settings |= dict(max_tokens=context_length(args.model), human=args.human, max_new_tokens=args.max_new_tokens, seed=args.seed,
                     allow_weak_sandbox=args.allow_weak_sandbox)
    theirs = critic.active_adapter if has_adapters(critic) else None
    shared = critic if theirs else shared

    def use(adapter):
        if adapter:
            shared.set_adapter(adapter)

    def reference_logps(trees):
        with torch.no_grad(), adapters_off(shared):
            return message_logps(shared, trees)

    def choose(states):
        use(theirs)
        scores = score_candidates(SimpleNamespace(**settings), states, tokenizer, critic or shared, reference_logps)
        use(mine)
        return [max(range(len(row)), key=row.__getitem__) if row else 0 for row in scores]  # too long for the critic: the first

    use(mine)
    return choose, shared


def rewrite(path: Path, lines: list[dict], order: list[tuple]) -> None:
    """Put the finished file into the order of policies and tasks, whichever dialogue ended first."""
    rank = {key: i for i, key in enumerate(order)}
    lines.sort(key=lambda line: rank.get((line["policy"], line["id"], line["sample"]), len(rank)))

    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as file:
            for line in lines:
                append_jsonl(file, line)
    write_aside(path, write)


def wilson(hits: float, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson's score interval), for hits of n independent episodes."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959964, hits / n
    middle, width = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - width) / (1 + z * z / n)), min(1.0, (middle + width) / (1 + z * z / n))


def metrics_of(lines: list[dict], flawed: dict = ()) -> dict:
    """All that is reported about one policy. Rates leave out dialogues that ended in an error; these are counted. 95 % intervals are
    over tasks: Wilson's where each was played once, else a bootstrap.

    turns: agent messages an episode. tokens_a_message: as the agent's model counts them. answered_at_limit: share of episodes
    whose last turn came without an answer. leak_rate: share of human replies with code of the reference in the first draft.
    clean_tasks: success on the tasks that are not in `flawed` (see colbench/audit.py).
    """
    sound = [line for line in lines if not failed(line)]
    n, said = max(1, len(sound)), [m for line in sound for m in line["dialogue_history"] if m["role"] == "assistant"]
    result = {"episodes": len(sound), "errors": len(lines) - len(sound)}

    def success_of(lines, mode):
        wins, ids = [success(line["scores"], mode) for line in lines], [line["id"] for line in lines]
        rate, tasks = sum(wins) / max(1, len(wins)), len({*ids})
        resampled = tasks < len(ids) and 0 < rate < 1  # a bootstrap of equal outcomes has no width
        return {"success": rate, "success_95": bootstrap(wins, ids) if resampled else wilson(sum(wins) * tasks / max(1, len(ids)), tasks)}

    for mode in ("fixed", "official"):
        shares = [share(line["scores"], mode) for line in sound]
        result[mode] = success_of(sound, mode) | {
            "tests_passed": sum(shares) / n, "tests_passed_95": bootstrap(shares, [line["id"] for line in sound])}
    clean = [line for line in sound if line["id"] not in flawed]
    result["clean_tasks"] = {"episodes": len(clean)} | success_of(clean, "fixed")
    tokens = [m["tokens"] for m in said if m.get("tokens") is not None]
    replies = [m for line in sound for m in line["dialogue_history"][1:] if m["role"] == "user"]
    return result | {
        "turns": len(said) / n, "tokens_a_message": sum(tokens) / max(1, len(tokens)),
        "answered_at_limit": sum(line["outcome"] == "limit" for line in sound) / n,
        "leak_rate": sum(m.get("leaked", False) for m in replies) / max(1, len(replies)),
        "sandbox": sorted({line["scores"]["sandbox"] for line in sound}),
    }


def tables(args, tasks: list[dict], lines: list[dict], wanted: set) -> dict:
    """Write metrics.json and print the table. Returns {policy: metrics}."""
    results, audit = {}, flaws(tasks, args.metrics, args.allow_weak_sandbox)
    for policy in args.names.values():
        results[policy] = metrics_of([x for x in lines if x["policy"] == policy and (policy, x["id"], x["sample"]) in wanted],
                                     audit["flawed"])
    settings = {name: str(value) if isinstance(value, Path) else shown(value) for name, value in vars(args).items()}
    text = json.dumps({"settings": settings, "audit": audit, "policies": results}, indent=1)
    write_aside(args.metrics, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))
    width = max(len(policy) for policy in results)
    print(f"\n{'':{width}}  {'success':>7}  {'95 % interval':>15}  {'official':>8}  {'tests passed':>12}  {'turns':>5}  "
          f"{'tokens/msg':>10}  {'at limit':>8}  {'leaks':>5}  {'n':>5}  {'errors':>6}")
    for policy, m in results.items():
        low, high = m["fixed"]["success_95"]
        print(f"{policy:{width}}  {m['fixed']['success']:7.1%}  {low:7.1%} ..{high:6.1%}  {m['official']['success']:8.1%}  "
              f"{m['fixed']['tests_passed']:12.1%}  {m['turns']:5.1f}  {m['tokens_a_message']:10.1f}  "
              f"{m['answered_at_limit']:8.1%}  {m['leak_rate']:5.1%}  {m['episodes']:5d}  {m['errors']:6d}")
    print(f"\n{len(tasks) - len(audit['flawed'])} of {len(tasks)} tasks are clean (python -m colbench.audit lists the others); "
          "success on these: " + ", ".join(f"{policy} {m['clean_tasks']['success']:.1%}" for policy, m in results.items()))
    return results


def report(args, tasks: list[dict], lines: list[dict], order: list[tuple], model=None) -> None:
    """Write metrics.json and report.html and print what came out. model: the base model's weights, if they are in memory."""
    wanted = set(order)
    results = frontend_report(args, lines, order) if args.env == "frontend" else tables(args, tasks, lines, wanted)
    lines = [x for x in lines if (x["policy"], x["id"], x["sample"]) in wanted]
    if args.critic and args.best_of == 1:
        add_credit(Path(args.run) / "advantages.jsonl", lines, args.critic, args.model, args.load_in_4bit,
                   load_tokenizer(args.model), model)
    page = write_report(shard_path(args.metrics.with_name("report.html"), args.shard), [args.run], results, lines)
    print(f"{args.episodes} has every dialogue, {args.metrics} every number; to look at: {page}")
    critic = Path(args.run) / "critic"
    if args.shard[1] > 1:
        print(shards_hint(args.episodes, args.shard))
    elif critic.exists() and not args.critic:
        print(f"next: which turn earned the credit? The same command with --critic {critic}. Be the human yourself: with --talk")


if __name__ == "__main__":
    run_main(main, out_of_memory="lower --batch-tokens")
