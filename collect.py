"""Stage 1 of SWEET-RL: the agent talks with a simulated human, k times per task, and each answer is
scored.

    python collect.py                                 # embedded model: runs/tiny/trajectories.jsonl
    python collect.py --env frontend                  # Frontend Design; also in the other scripts
    python collect.py --env FILE.py                   # an environment of your own
    python collect.py --preset llama --human http://localhost:8000/v1#NAME    # a served human
    python collect.py --preset llama --add-candidates-to facebook/collaborative_agent_bench:offline

One turn (`play` in colbench/env/dialogue.py): the agent sees the dialogue so far, never the hidden
information c, and says something. A message with `I WANT TO ANSWER:` ends the episode, and so does
the last turn. Otherwise the human replies, who alone sees c.

At a share of the turns, the states, N = 16 candidate messages are sampled, which stage 2 ranks. The
first of them is the one that is played.

All random numbers come from (seed, task, sample, turn), not from the order of work.

Writes RUN/trajectories.jsonl, one line per episode: task, dialogue_history, answer, reward, ... (a
superset of the published format). With --add-candidates-to nothing is played: trajectories made
elsewhere get a reward if they have none, and candidates. Repeat the command to resume; it retries
episodes that failed. The next stage is train_critic.py.
"""
import colbench  # noqa: F401  isort: skip (first: libraries read variables while they are imported)
from pathlib import Path

from tqdm import tqdm

from colbench.env.data import episode_line, failed, load_trajectories
from colbench.env.dialogue import (failures, message_seeds, play, prompt_messages, said,
                                   score_and_append, servers_of, system_prompt,
                                   without_server_failures)
from colbench.env.flags import (add_playing_flags, check_playing_flags, load_tasks, parse_flags,
                                print_settings, script_parser)
from colbench.lm.load import load_model, load_tokenizer, prepare_machine
from colbench.lm.memory import model_row, sampling_memory
from colbench.lm.sampling import LocalChat
from colbench.lm.server import ServerChat, is_address
from colbench.run.errors import UserError, run_main
from colbench.run.files import lock_run, repair_jsonl, rewrite_jsonl
from colbench.run.settings import hide_password, keep_settings, next_step, plan
from colbench.run.shards import shard_path, shards_hint

PRESETS = {
    "tiny": dict(  # the embedded model on the bundled mini benchmark, on a CPU
        model="tiny", load_in_4bit=False, human="scripted",
        n_tasks=300, k=6,     # trajectories per task
        candidate_share=0.1,  # of the turns get candidates
        parallel=256,         # dialogues side by side
        max_new_tokens=96,    # per message
        batch_tokens=65536),  # held at once while sampling
    "llama": dict(  # the paper: 15,000 trajectories, 16 candidates at a tenth of their turns
        model="meta-llama/Llama-3.1-8B-Instruct", load_in_4bit=True, human="self",
        n_tasks=5000, k=3, candidate_share=0.1, parallel=64, max_new_tokens=1024,
        batch_tokens=32768),
}


def main():
    prepare_machine()
    args, environment = parse_args()
    lock_run(args.trajectories.parent, f"collect-{args.trajectories.stem}")
    todo, order = load_work(args, environment)
    kept = repair_jsonl(args.trajectories, episode_line(environment))
    lines = kept
    if not args.add_candidates_to:
        lines = [line for line in kept if not failed(line)]  # failed episodes are retried
    done = {episode_key(line) for line in lines}
    todo = [item for item, key in zip(todo, order) if key not in done]
    if not todo:
        keep_settings(args.trajectories, args, started=True)
        rewrite_jsonl(args.trajectories, lines, order, episode_key)
        print(f"{args.trajectories}: already complete ({len(lines)} trajectories); "
              f"{next_step('train_critic.py', args)}")
        return
    print(f"{len(todo)} of {len(order)} trajectories to make, {len(lines)} done")
    if len(lines) < len(kept):
        rewrite_jsonl(args.trajectories, lines, order, episode_key)

    agent = make_agent(args)
    with environment(args, args.run) as env, open(args.trajectories, "a", encoding="utf-8") as file:
        print_plan(args, agent, env)
        make = add_candidates if args.add_candidates_to else converse
        batches = make(args, agent, env, todo)  # a --human that cannot play ends the run here
        keep_settings(args.trajectories, args, started=bool(lines))
        bar = tqdm(total=len(order), initial=len(lines), unit="episode", smoothing=0)
        for episodes in score_and_append(env, batches, file, bar):
            lines += episodes
        bar.close()
    rewrite_jsonl(args.trajectories, lines, order, episode_key)
    print_summary(args, lines)


def converse(args, agent, env, todo: list[tuple]):
    """Play the dialogues of `todo`, (task, sample number); yields them in lists as they end."""
    human = env.human(args.human, agent)
    episodes = play(
        agent, human, todo, agent_prompt=args.agent_prompt, answer=env.answer,
        max_turns=args.max_turns, n_candidates=args.n_candidates,
        candidate_share=args.candidate_share, temperature=args.temperature,
        max_new_tokens=args.max_new_tokens, parallel=args.parallel, seed=args.seed)
    return without_server_failures(episodes, servers_of(agent, human))


def add_candidates(args, agent, env, todo: list[dict]):
    """Add candidates to a share of the turns of finished trajectories; yields them in lists.

    The message that was played is the first candidate. Seeds and share are those of `play`."""
    for start in range(0, len(todo), args.parallel):
        trajectories = todo[start:start + args.parallel]
        turns, prompts, seeds = [], [], []
        for trajectory in trajectories:
            trajectory["answer"] = env.published_answer(trajectory)
            trajectory.setdefault("outcome", "answered")
            trajectory["system"] = system_prompt(trajectory, args.agent_prompt, args.max_turns)
            history = trajectory["dialogue_history"]
            for i, message in enumerate(history):
                if message["role"] != "assistant" or message.get("candidates"):
                    continue
                names = args.seed, *episode_key(trajectory), i
                own_seeds = message_seeds(names, args.candidate_share, args.n_candidates)
                if len(own_seeds) > 1:  # a state; its first message is the one that was played
                    turns.append((trajectory, message))
                    prompts.append(prompt_messages(trajectory["system"], history[:i]))
                    seeds.append(own_seeds[1:])
        replies = agent.sample(prompts, seeds, args.temperature, args.max_new_tokens)
        errors = [next((c for c in candidates if isinstance(c, Exception)), None)
                  for candidates in replies]
        for (trajectory, message), candidates, error in zip(turns, replies, errors):
            if error is None:
                played = message.get("output") or message["content"]
                message["candidates"] = [played] + [said(c.text)[1] for c in candidates]
            else:  # the trajectory itself is sound, it only gets no candidates here
                tqdm.write(f"no candidates for a turn of task {trajectory['id']}: {error}")
        if any(errors) and isinstance(agent, ServerChat):
            agent.check()  # if it is down, its UserError ends the run before the lines are written
        yield trajectories


def load_work(args, environment) -> tuple[list, list[tuple]]:
    """(what to make, its keys in the order of the file).

    Either (task, sample number) to play, or trajectories to complete."""
    if args.add_candidates_to:
        everything = load_trajectories(args.add_candidates_to, environment.check_task)
        todo = everything[args.shard[0] - 1::args.shard[1]]
        return todo, [episode_key(trajectory) for trajectory in todo]
    tasks = load_tasks(args, environment)  # all once, then all again, as in the published file
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


def print_plan(args, agent, env) -> None:
    rows = {}
    if isinstance(agent, LocalChat):
        rows["agent"] = model_row(agent.model, args.model)
        rows["memory"] = sampling_memory(agent.model, args.batch_tokens)
    else:
        rows["agent"] = f"{agent.model} at {agent.address}"
    plan("collect", rows | {
        "human": hide_password(args.human),
        "candidates": f"{args.n_candidates} at {args.candidate_share:.0%} of the turns",
        "tokens": f"at most {args.max_turns} messages of {args.max_new_tokens} per episode",
        **env.plan(), "output": args.trajectories})


def print_summary(args, lines: list[dict]) -> None:
    """What was made, and whether stage 2 can use it: it needs tasks with different rewards."""
    trouble = failures(lines)
    sound = [line for line in lines if not failed(line)]
    rewards = {}  # of each task
    for line in sound:
        rewards.setdefault(line["id"], set()).add(line["reward"])
    messages = [message for line in sound for message in line["dialogue_history"]]
    turns = sum(message["role"] == "assistant" for message in messages)
    replies = [message for line in sound for message in line["dialogue_history"][1:]
               if message["role"] == "user"]
    states = sum(bool(message.get("candidates")) for message in messages)
    leaks = sum(message.get("leaked", False) for message in replies)
    n = max(1, len(sound))
    print(f"{args.trajectories}: {len(sound)} trajectories of {len(rewards)} tasks, "
          f"{len(lines) - len(sound)} failed; "
          f"mean reward {sum(line['reward'] for line in sound) / n:.3f}, "
          f"success {sum(line['reward'] == 1 for line in sound) / n:.1%}, {turns / n:.1f} turns, "
          f"{sum(line['outcome'] == 'limit' for line in sound) / n:.1%} answered at the limit")
    print(f"{sum(len(of_task) > 1 for of_task in rewards.values())} tasks have trajectories with "
          f"different rewards (the critic learns from these); {states} states have candidates; "
          f"the human's first draft leaked hidden information in {leaks} of {len(replies)} replies")
    if trouble:
        print(trouble)
    if args.shard[1] > 1:
        print(shards_hint(args.trajectories, args.shard))
    else:
        print(next_step("train_critic.py", args))


def parse_args():
    parser, environment = script_parser(__doc__, "collect", PRESETS)
    parser.add_argument("--model", help="the agent: hub id, folder, or a server's address as for "
                        "--human")
    parser.add_argument("--k", type=int, help="trajectories per task")
    parser.add_argument("--n-candidates", type=int, default=16, help="N, candidates at a state")
    parser.add_argument("--candidate-share", type=float, help="share of turns with candidates")
    parser.add_argument("--add-candidates-to", metavar="FILE", help="play nothing, complete the "
                        "trajectories in this file (or in a hub data set ID:FILE)")
    parser.add_argument("--seed", type=int, default=0, help="for all sampling and shuffling")
    add_playing_flags(parser, "collect")
    environment.add_flags(parser, "collect")
    args, given = parse_flags(parser)
    check_playing_flags(args)
    if args.add_candidates_to and given & {"tasks", "n_tasks", "k", "human"}:
        raise UserError("--tasks, --n-tasks, --k and --human have no effect with "
                        "--add-candidates-to")
    if args.n_candidates < 2:
        raise UserError(f"--n-candidates {args.n_candidates}: must be at least 2")
    if not 0 <= args.candidate_share <= 1:
        raise UserError(f"--candidate-share {args.candidate_share}: must be between 0 and 1")
    args.trajectories = shard_path(Path(args.run) / "trajectories.jsonl", args.shard)
    source = args.add_candidates_to
    if source and Path(source).resolve() == args.trajectories.resolve():
        raise UserError(f"--add-candidates-to {source}: is the output itself; choose another --run")
    print_settings(parser, args)
    return args, environment


if __name__ == "__main__":
    run_main(main, out_of_memory="lower --batch-tokens")
