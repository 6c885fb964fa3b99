"""Stage 1 of SWEET-RL: the agent talks with a simulated human about each task, k times; the answers are scored.

    python collect.py                                             # embedded default, CPU: runs/tiny/trajectories.jsonl
    python collect.py --env frontend                              # Frontend Design: runs/tiny-frontend; so the other scripts
    python collect.py --preset llama --run runs/llama \\
        --tasks facebook/collaborative_agent_bench:train --human http://localhost:8000/v1
    python collect.py --preset llama --run runs/paper --add-candidates-to facebook/collaborative_agent_bench:offline

Writes RUN/trajectories.jsonl, one line an episode: task, dialogue_history, answer, reward, ... (a superset of the published
format). At a share of the turns it also samples 16 candidate messages, which stage 2 ranks. With --add-candidates-to it plays
nothing: it scores trajectories made elsewhere where they have no reward, and adds the candidates.

Interrupted, the same command goes on; a line that is written is never lost. The next stage is train_critic.py.
"""

import argparse
from pathlib import Path

from tqdm import tqdm

from colbench.dialogue import AGENT_PROMPT, keep_sound, play, prompt_messages, said
from colbench.files import (UserError, append_jsonl, lock_run, repair_jsonl, run_main, seed_of, shard, shard_path,
                            shards_hint, write_aside)
from colbench.frontend.environment import PRESETS as FRONTEND_PRESETS, Frontend, add_env, add_flags
from colbench.humans import make_human
from colbench.model import load_model, load_tokenizer
from colbench.sampling import LocalChat
from colbench.scorer import Scorer, share
from colbench.server import ServerChat, shown
from colbench.show import keep_settings, model_row, next_step, plan, sampling_memory
from colbench.tasks import failed, load_tasks, load_trajectories

PRESETS = {
    "tiny": dict(  # the embedded model on the bundled mini benchmark
        run="runs/tiny", model="tiny", load_in_4bit=False, tasks="mini:train", n_tasks=300, k=6, candidate_share=0.2,
        human="scripted", parallel=256, max_new_tokens=96, batch_tokens=65536,
        agent_prompt="Ask about one missing detail at a time, then answer.",
    ),
    "llama": dict(  # the paper: 15,000 trajectories, 16 candidates at a tenth of their turns
        run="runs/llama", model="meta-llama/Llama-3.1-8B-Instruct", load_in_4bit=True,
        tasks="facebook/collaborative_agent_bench:train", n_tasks=5000, k=3, candidate_share=0.1, human="self", parallel=64,
        max_new_tokens=1024, batch_tokens=32768, agent_prompt=AGENT_PROMPT,
    ),
}


def parse_args():
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", choices=PRESETS, default="tiny", help="defaults for all other flags")
    env, preset = add_env(first), first.parse_known_args()[0].preset
    parser = argparse.ArgumentParser(
        description=__doc__, parents=[first], formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("files")
    group.add_argument("--run", help="directory of this run (default: %(default)s)")
    group.add_argument("--trajectories", help="output (default: RUN/trajectories.jsonl)")
    group.add_argument("--tasks", help="mini:train or pages:train, a .jsonl file or a hub data set ID:train "
                       "(default: %(default)s)")
    group.add_argument("--n-tasks", type=int, help="the first so many tasks (default: %(default)s)")
    group.add_argument("--add-candidates-to", metavar="FILE", help="play nothing, complete the trajectories of this file (or of "
                       "a hub data set ID:FILE)")
    group.add_argument("--shard", metavar="I/N", type=shard, default="1/1", help="only every N-th task from the I-th on, into "
                       "trajectories-IofN.jsonl; the N files put together are a whole run's")
    group.add_argument("--retry-errors", action="store_true", help="play dialogues again that an error ended")
    group = parser.add_argument_group("agent")
    group.add_argument("--model", help="hub id or folder (default: %(default)s)")
    group.add_argument("--load-in-4bit", action=argparse.BooleanOptionalAction, help="NF4 weights (default: %(default)s)")
    group.add_argument("--agent-server", metavar="URL", help="an OpenAI-compatible server plays the agent instead of --model")
    group.add_argument("--agent-server-model", metavar="NAME", help="model name there (default: the first it lists)")
    group.add_argument("--agent-prompt", help="system prompt; {max_turns} is filled in")
    group.add_argument("--temperature", type=float, default=1.0, help="of the agent (default: %(default)s)")
    group.add_argument("--max-new-tokens", type=int, help="bound on one message (default: %(default)s)")
    group.add_argument("--batch-tokens", type=int,
                       help="tokens held at once while sampling; lower it when memory runs out (default: %(default)s)")
    group = parser.add_argument_group("human")
    group.add_argument("--human", help="scripted, self (the agent's weights, adapters off) or a server's URL; with --env frontend "
                       "also a vision model's id or folder (default: %(default)s)")
    group.add_argument("--human-model", metavar="NAME", help="model name on that server (default: the first it lists)")
    add_flags(parser)
    group = parser.add_argument_group("episodes")
    group.add_argument("--k", type=int, help="trajectories a task (default: %(default)s)")
    group.add_argument("--max-turns", type=int, default=10, help="agent messages, the answer included (default: %(default)s)")
    group.add_argument("--n-candidates", type=int, default=16, help="N, candidates at a state (default: %(default)s)")
    group.add_argument("--candidate-share", type=float, help="share of the turns that get candidates (default: %(default)s)")
    group.add_argument("--parallel", type=int, help="dialogues in flight (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="of all sampling and shuffling (default: %(default)s)")
    group.add_argument("--scorer", choices=("fixed", "official"), default="fixed", help="which score is the reward: ours, or the released code's "
                       "verdicts (default: fixed)")
    group.add_argument("--allow-weak-sandbox", action="store_true", help="score even where the sandbox cannot be made safe")
    parser.set_defaults(**PRESETS[preset] | (FRONTEND_PRESETS["collect"][preset] if env == "frontend" else {}))
    args = parser.parse_args()
    if args.k < 1 or args.n_tasks < 1 or args.n_candidates < 2 or args.max_turns < 1 or args.parallel < 1:
        raise UserError("--k, --n-tasks, --max-turns and --parallel are at least 1, --n-candidates at least 2")
    if min(args.max_new_tokens, args.batch_tokens) < 1 or not 0 <= args.temperature < float("inf"):
        raise UserError("--max-new-tokens and --batch-tokens are at least 1, --temperature is 0 or more")
    if not 0 <= args.candidate_share <= 1:
        raise UserError(f"--candidate-share is between 0 and 1, not {args.candidate_share}")
    args.trajectories = shard_path(args.trajectories or Path(args.run) / "trajectories.jsonl", args.shard)
    if args.add_candidates_to and Path(args.add_candidates_to).resolve() == args.trajectories.resolve():
        raise UserError(f"--add-candidates-to {args.add_candidates_to}: is the output itself; choose another --run")
    return args


def main():
    args = parse_args()
    part = slice(args.shard[0] - 1, None, args.shard[1])
    lock = lock_run(args.trajectories.parent, f"collect-{args.trajectories.stem}")  # noqa: F841  held until the process ends
    lines = repair_jsonl(args.trajectories, ("id", "sample"))
    if args.add_candidates_to:
        todo = load_trajectories(args.add_candidates_to)[part]
    else:
        tasks = load_tasks(args.tasks, args.n_tasks, args.env == "frontend")
        tasks = list({task["id"]: task for task in tasks}.values())[part]  # a task twice is one task
        todo = [(task, sample) for sample in range(args.k) for task in tasks]  # as published: samples n_tasks lines apart
    order = [(t["id"], t["sample"]) for t in todo] if args.add_candidates_to else [(t["id"], s) for t, s in todo]
    if args.retry_errors:
        lines = [line for line in lines if not failed(line)]
        rewrite(args.trajectories, lines, order)
    done = {(line["id"], line["sample"]): line for line in lines}
    missing = [key for key in order if key not in done]
    if not missing:
        keep_settings(args.trajectories, args, begun=True)
        if list(done) != order or not order:  # killed before the last step, shards put together, an empty shard
            rewrite(args.trajectories, lines, order)
        print(f"{args.trajectories} is complete ({len(lines)} trajectories): nothing to do; {next_step('train_critic.py', args)}")
        return
    print(f"{len(missing)} of {len(order)} trajectories to make, {len(lines)} are there; "
          f"agent {shown(args.agent_server or args.model)}, human {shown(args.human)}, "
          f"{args.n_candidates} candidates at {args.candidate_share:.0%} of the turns")

    if args.agent_server:
        agent = ServerChat(args.agent_server, args.agent_server_model)
        agent.check()
    else:
        agent = LocalChat(load_model(args.model, args.load_in_4bit), load_tokenizer(args.model), batch_tokens=args.batch_tokens)
    settings = dict(n_candidates=args.n_candidates, candidate_share=args.candidate_share, temperature=args.temperature,
                    max_new_tokens=args.max_new_tokens, seed=args.seed)
    frontend = Frontend(args, args.trajectories.parent) if args.env == "frontend" else None
    with frontend or Scorer(allow_weak=args.allow_weak_sandbox) as scorer, open(args.trajectories, "a", encoding="utf-8") as output:
        model = getattr(agent, "model", None) if not args.agent_server else None
        plan("collect", {
            "agent": model_row(model, args.model) if model else f"{args.agent_server_model or 'model'} at {shown(args.agent_server)}",
            "human": shown(args.human), "candidates": f"{args.n_candidates} at {args.candidate_share:.0%} of the turns",
            "tokens": f"at most {args.max_turns} messages of {args.max_new_tokens} an episode, {args.parallel} dialogues at once",
            "memory": model and sampling_memory(model, args.batch_tokens), "sandbox": scorer.tier,
            "reward": frontend.measure.name if frontend else f"share of tests passed, {args.scorer} scorer", "output": args.trajectories})
        if args.add_candidates_to:
            for trajectory in todo if frontend else ():  # published ones name a picture on their makers' disk
                trajectory["answer"] = frontend.final_page(trajectory["dialogue_history"]) or ""
            batches = complete(agent, todo, done, args)
        else:
            human = frontend.human if frontend else make_human(args.human, chat=agent, model=args.human_model)
            servers = [chat for chat in (agent, getattr(human, "chat", None)) if isinstance(chat, ServerChat)]
            batches = keep_sound(play(agent, human, todo, agent_prompt=args.agent_prompt, max_turns=args.max_turns,
                                      parallel=args.parallel, done=done, final_page=frontend and frontend.final_page,
                                      **settings), servers)
        keep_settings(args.trajectories, args, begun=bool(lines))
        bar = tqdm(total=len(order), initial=len(lines), unit="episode", smoothing=0)
        for episodes in batches:
            unscored = [e for e in episodes if "reward" not in e and not failed(e)]
            for episode, result in zip(unscored, scorer.score_many([(e["task"], e["answer"]) for e in unscored])):
                episode["reward"], episode["scores"] = share(result, args.scorer), result
            for episode in episodes:
                append_jsonl(output, episode)
            lines += episodes
            bar.update(len(episodes))
            rewards = [line["reward"] for line in lines if "reward" in line]
            bar.set_postfix(reward=f"{sum(rewards) / max(1, len(rewards)):.3f}")
        bar.close()
    rewrite(args.trajectories, lines, order)
    summary(args, lines)


def complete(agent, trajectories: list[dict], done: dict, args):
    """Add candidates to a share of the turns of finished trajectories; yields them in lists. The message that was played is
    the first candidate. Its seeds and its share of the turns are those of `play`. What an interrupted run has `done` is sampled
    again where it shares a list with what is missing, so that the batches, and with them all last bits, stay the same."""
    for start in range(0, len(trajectories), args.parallel):
        chunk = trajectories[start:start + args.parallel]
        missing = [t for t in chunk if (t["id"], t["sample"]) not in done]
        if not missing:
            continue
        turns, prompts, seeds = [], [], []
        for trajectory in chunk:
            trajectory.setdefault("outcome", "answered")
            trajectory.setdefault("system", args.agent_prompt.replace("{max_turns}", str(args.max_turns)))
            for i, message in enumerate(trajectory["dialogue_history"]):
                names = (args.seed, trajectory["id"], trajectory["sample"], i)
                if message["role"] != "assistant" or "candidates" in message:
                    continue
                if seed_of(*names, "candidates") / 2**63 < args.candidate_share:
                    turns.append((trajectory, message))
                    prompts.append(prompt_messages(trajectory["system"], trajectory["dialogue_history"][:i]))
                    seeds.append([seed_of(*names, "agent", k) for k in range(1, args.n_candidates)])
        replies = agent.sample(prompts, seeds, temperature=args.temperature, max_new_tokens=args.max_new_tokens)
        for (trajectory, message), candidates in zip(turns, replies):
            failed = next((c for c in candidates if isinstance(c, Exception)), None)
            if failed is not None:  # the trajectory itself is sound: it only gets no candidates here
                tqdm.write(f"no candidates for a turn of task {trajectory['id']}: {failed}")
                continue
            message["candidates"] = [message.get("output") or message["content"]] + [said(c.text)[1] for c in candidates]
        if any(isinstance(c, Exception) for row in replies for c in row) and isinstance(agent, ServerChat):
            agent.check()  # if it is down, its UserError ends the run before these lines are written
        yield missing


def rewrite(path: Path, lines: list[dict], order: list[tuple]) -> None:
    """Put the finished file into the order of the tasks, so that it does not depend on which dialogue ended first."""
    rank = {key: i for i, key in enumerate(order)}
    lines.sort(key=lambda line: rank.get((line["id"], line["sample"]), len(rank)))

    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as file:
            for line in lines:
                append_jsonl(file, line)
    write_aside(path, write)


def summary(args, lines: list[dict]) -> None:
    """What was made, and whether stage 2 can use it: it needs tasks whose trajectories differ in reward."""
    good = [line for line in lines if not failed(line)]
    rewards = {}
    for line in good:
        rewards.setdefault(line["id"], set()).add(line["reward"])
    turns = [sum(m["role"] == "assistant" for m in line["dialogue_history"]) for line in good]
    states = sum("candidates" in m for line in good for m in line["dialogue_history"])
    replies = [m for line in good for m in line["dialogue_history"][1:] if m["role"] == "user"]
    n = max(1, len(good))
    print(f"{args.trajectories}: {len(good)} trajectories of {len(rewards)} tasks, {len(lines) - len(good)} that failed; "
          f"{'similarity' if args.env == 'frontend' else 'tests passed'} {sum(line['reward'] for line in good) / n:.1%}, success {sum(line['reward'] == 1 for line in good) / n:.1%}, "
          f"{sum(turns) / n:.1f} turns, {sum(line['outcome'] == 'limit' for line in good) / n:.1%} answered at the limit")
    print(f"{sum(len(r) > 1 for r in rewards.values())} tasks have trajectories of different reward (the critic learns from "
          f"these); {states} states have candidates; the human's first draft held code of the reference in "
          f"{sum(m.get('leaked', False) for m in replies)} of {len(replies)} replies")
    print(shards_hint(args.trajectories, args.shard) if args.shard[1] > 1 else next_step("train_critic.py", args))


if __name__ == "__main__":
    run_main(main, out_of_memory="lower --batch-tokens")
