"""Stage 1 of SWEET-RL: the agent talks with a simulated human, k times a task; the answers are scored.

    python collect.py                                   # embedded default, CPU: runs/tiny/trajectories.jsonl
    python collect.py --env frontend                    # Frontend Design; so the other scripts
    python collect.py --env FILE.py                     # an environment of your own
    python collect.py --preset llama --human http://localhost:8000/v1#NAME    # a served model plays the human
    python collect.py --preset llama --add-candidates-to facebook/collaborative_agent_bench:offline

Writes RUN/trajectories.jsonl, one line an episode: task, dialogue_history, answer, reward, ... (a superset of
the published format). At a share of the turns, the states, it also samples 16 candidate messages, which stage
2 ranks; the one that is played is the first of them. With --add-candidates-to it plays nothing: it scores
trajectories made elsewhere where they have no reward, and adds the candidates.

One turn (colbench/env/dialogue.py: play): the agent sees the dialogue so far, never the reference c, and says
something. A message with `I WANT TO ANSWER:` ends the episode, and so does the last turn. Else the human, who
alone sees c, replies. All random numbers come from (seed, task, sample, turn), not from the order of work.

Interrupted, the same command goes on, and plays again what an error had ended; a line that is written is
never lost. The next stage is train_critic.py.
"""
import colbench  # noqa: F401  isort: skip (first: libraries read variables while they are imported)
from pathlib import Path

from tqdm import tqdm

from colbench.env.data import episode_line, failed, load_trajectories
from colbench.env.dialogue import failures, keep_sound, play, prompt_messages, said
from colbench.env.flags import add_playing_flags, check_playing_flags, load_tasks, parse_flags, script_parser
from colbench.lm.load import load_model, load_tokenizer, prepare_machine
from colbench.lm.memory import model_row, sampling_memory
from colbench.lm.sampling import LocalChat
from colbench.lm.server import ServerChat, is_address
from colbench.run.errors import UserError, run_main
from colbench.run.files import append_jsonl, lock_run, repair_jsonl, rewrite_jsonl, seed_of
from colbench.run.settings import hide_password, keep_settings, next_step, plan
from colbench.run.shards import shard_path, shards_hint

PRESETS = {
    "tiny": dict(  # the embedded model on the bundled mini benchmark
        model="tiny", load_in_4bit=False, n_tasks=300, k=6, candidate_share=0.1, human="scripted",
        parallel=256, max_new_tokens=96, batch_tokens=65536),
    "llama": dict(  # the paper: 15,000 trajectories, 16 candidates at a tenth of their turns
        model="meta-llama/Llama-3.1-8B-Instruct", load_in_4bit=True, n_tasks=5000, k=3, candidate_share=0.1,
        human="self", parallel=64, max_new_tokens=1024, batch_tokens=32768),
}


def main():
    prepare_machine()
    args, environment = parse_args()
    lock_run(args.trajectories.parent, f"collect-{args.trajectories.stem}")
    todo, order = work(args, environment)
    there = repair_jsonl(args.trajectories, episode_line(environment))
    # what an error had ended is dropped here and played again
    lines = [line for line in there if args.add_candidates_to or not failed(line)]
    done = {episode_key(line): line for line in lines}
    missing = sum(key not in done for key in order)
    if not missing:
        keep_settings(args.trajectories, args, begun=True)
        if list(done) != order or not order:  # a kill before the last step, or shards together
            rewrite_jsonl(args.trajectories, lines, order, episode_key)
        print(f"{args.trajectories} is complete ({len(lines)} trajectories): nothing to do; "
              f"{next_step('train_critic.py', args)}")
        return
    print(f"{missing} of {len(order)} trajectories to make, {len(lines)} are there")
    if len(lines) < len(there):
        rewrite_jsonl(args.trajectories, lines, order, episode_key)
    agent = make_agent(args)
    with environment(args, args.run) as env, open(args.trajectories, "a", encoding="utf-8") as output:
        print_plan(args, agent, env)
        playing = (add_candidates if args.add_candidates_to else converse)(args, agent, env, todo, done)
        keep_settings(args.trajectories, args, begun=bool(lines))
        bar = tqdm(total=len(order), initial=len(lines), unit="episode", smoothing=0)
        for episodes in playing:
            unscored = [e for e in episodes if "reward" not in e and not failed(e)]
            scores = env.score([(e["task"], e["answer"]) for e in unscored])
            for episode, (reward, details) in zip(unscored, scores, strict=True):
                episode["reward"], episode["scores"] = float(reward), details
            for episode in episodes:
                append_jsonl(output, episode)
            lines += episodes
            bar.update(len(episodes))
            rewards = [line["reward"] for line in lines if "reward" in line]
            bar.set_postfix(reward=f"{sum(rewards) / max(1, len(rewards)):.3f}")
        bar.close()
    rewrite_jsonl(args.trajectories, lines, order, episode_key)
    print_summary(args, lines)


def converse(args, agent, env, todo, done):
    """Play the dialogues of `todo`, (task, sample number), that are not `done`; yields them in lists."""
    human = env.human(args.human, agent)
    servers = [chat for chat in (agent, getattr(human, "chat", None)) if isinstance(chat, ServerChat)]
    return keep_sound(play(
        agent, human, todo, agent_prompt=args.agent_prompt, answer=env.answer, max_turns=args.max_turns,
        n_candidates=args.n_candidates, candidate_share=args.candidate_share, temperature=args.temperature,
        max_new_tokens=args.max_new_tokens, parallel=args.parallel, seed=args.seed, done=done), servers)


def add_candidates(args, agent, env, trajectories: list[dict], done: dict):
    """Add candidates to a share of the turns of finished trajectories; yields them in lists. The message that
    was played is the first candidate. Its seeds and its share of the turns are those of `play`. What an
    interrupted run has `done` is sampled again where it shares a list with what is missing, so that the
    batches, and with them all last bits, stay the same."""
    for start in range(0, len(trajectories), args.parallel):
        chunk = trajectories[start:start + args.parallel]
        missing = [t for t in chunk if episode_key(t) not in done]
        if not missing:
            continue
        turns, prompts, seeds = [], [], []
        for trajectory in chunk:
            trajectory["answer"] = env.published_answer(trajectory)
            trajectory.setdefault("outcome", "answered")
            trajectory.setdefault("system", args.agent_prompt.replace("{max_turns}", str(args.max_turns)))
            for i, message in enumerate(trajectory["dialogue_history"]):
                names = (args.seed, *episode_key(trajectory), i)
                if message["role"] != "assistant" or message.get("candidates"):
                    continue
                if seed_of(*names, "candidates") / 2**63 < args.candidate_share:
                    turns.append((trajectory, message))
                    prompts.append(prompt_messages(trajectory["system"], trajectory["dialogue_history"][:i]))
                    seeds.append([seed_of(*names, "agent", k) for k in range(1, args.n_candidates)])
        replies = agent.sample(prompts, seeds, args.temperature, args.max_new_tokens)
        errors = [next((c for c in candidates if isinstance(c, Exception)), None) for candidates in replies]
        for (trajectory, message), candidates, error in zip(turns, replies, errors):
            if error is None:
                played = message.get("output") or message["content"]
                message["candidates"] = [played] + [said(c.text)[1] for c in candidates]
            else:  # the trajectory itself is sound: it only gets no candidates here
                tqdm.write(f"no candidates for a turn of task {trajectory['id']}: {error}")
        if any(errors) and isinstance(agent, ServerChat):
            agent.check()  # if it is down, its UserError ends the run before these lines are written
        yield missing


def work(args, environment) -> tuple[list, list[tuple]]:
    """(what is to be made, and the order of the file): (task, sample number) to play, or trajectories to
    complete. One shard's."""
    if args.add_candidates_to:
        everything = load_trajectories(args.add_candidates_to, environment.check_task)
        todo = everything[args.shard[0] - 1::args.shard[1]]
        return todo, [episode_key(trajectory) for trajectory in todo]
    tasks = load_tasks(args, environment)  # all once, then all again: the order of the published file
    todo = [(task, sample) for sample in range(args.k) for task in tasks]
    return todo, [(task["id"], sample) for task, sample in todo]


def episode_key(line: dict) -> tuple:
    return line["id"], line["sample"]


def make_agent(args):
    """The agent: a model in this process, or a served one."""
    if is_address(args.model):
        agent = ServerChat(args.model)
        agent.check()
        return agent
    model, tokenizer = load_model(args.model, args.load_in_4bit), load_tokenizer(args.model)
    return LocalChat(model, tokenizer, batch_tokens=args.batch_tokens)


def print_plan(args, agent, env):
    local = isinstance(agent, LocalChat)
    plan("collect", {
        "agent": model_row(agent.model, args.model) if local else f"{agent.model} at {agent.address}",
        "human": hide_password(args.human),
        "candidates": f"{args.n_candidates} at {args.candidate_share:.0%} of the turns",
        "tokens": f"at most {args.max_turns} messages of {args.max_new_tokens} an episode",
        "memory": sampling_memory(agent.model, args.batch_tokens) if local else None, **env.plan(),
        "output": args.trajectories})


def print_summary(args, lines: list[dict]) -> None:
    """What was made, and whether stage 2 can use it: it needs tasks whose trajectories differ in reward."""
    trouble = failures(lines)
    good = [line for line in lines if not failed(line)]
    rewards = {}
    for line in good:
        rewards.setdefault(line["id"], set()).add(line["reward"])
    turns = [sum(m["role"] == "assistant" for m in line["dialogue_history"]) for line in good]
    states = sum(bool(m.get("candidates")) for line in good for m in line["dialogue_history"])
    replies = [m for line in good for m in line["dialogue_history"][1:] if m["role"] == "user"]
    n = max(1, len(good))
    print(f"{args.trajectories}: {len(good)} trajectories of {len(rewards)} tasks, {len(lines) - len(good)} "
          f"that failed; mean reward {sum(line['reward'] for line in good) / n:.3f}, "
          f"success {sum(line['reward'] == 1 for line in good) / n:.1%}, {sum(turns) / n:.1f} turns, "
          f"{sum(line['outcome'] == 'limit' for line in good) / n:.1%} answered at the limit")
    differing = sum(len(of_task) > 1 for of_task in rewards.values())
    print(f"{differing} tasks have trajectories of different reward (the critic learns from these); "
          f"{states} states have candidates; the human's first draft held code of the reference in "
          f"{sum(m.get('leaked', False) for m in replies)} of {len(replies)} replies")
    if trouble:
        print(trouble)
    sharded = args.shard[1] > 1
    print(shards_hint(args.trajectories, args.shard) if sharded else next_step("train_critic.py", args))


def parse_args():
    parser, environment = script_parser(__doc__, "collect", PRESETS)
    parser.add_argument("--model", help="the agent: hub id, folder, or a server's address as for --human")
    parser.add_argument("--k", type=int, help="trajectories a task")
    parser.add_argument("--n-candidates", type=int, default=16, help="N, candidates at a state")
    parser.add_argument("--candidate-share", type=float, help="share of the turns that get candidates")
    parser.add_argument("--add-candidates-to", metavar="FILE", help="play nothing, complete the trajectories "
                        "of this file (or of a hub data set ID:FILE)")
    parser.add_argument("--seed", type=int, default=0, help="of all sampling and shuffling")
    add_playing_flags(parser, "collect")
    environment.add_flags(parser, "collect")
    args, given = parse_flags(parser)
    check_playing_flags(args)
    if args.add_candidates_to and given & {"tasks", "n_tasks", "k", "human"}:
        raise UserError("--tasks, --n-tasks, --k and --human have no effect with --add-candidates-to")
    if args.n_candidates < 2:
        raise UserError(f"--n-candidates {args.n_candidates}: is at least 2")
    if not 0 <= args.candidate_share <= 1:
        raise UserError(f"--candidate-share is between 0 and 1, not {args.candidate_share}")
    args.trajectories = shard_path(Path(args.run) / "trajectories.jsonl", args.shard)
    if args.add_candidates_to and Path(args.add_candidates_to).resolve() == args.trajectories.resolve():
        raise UserError(f"--add-candidates-to {args.add_candidates_to}: is the output itself; choose another "
                        "--run")
    return args, environment


if __name__ == "__main__":
    run_main(main, out_of_memory="lower --batch-tokens")
