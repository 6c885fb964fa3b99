"""Candidates of a state get their advantages from a critic of any kind; stage 2 writes them to preferences.jsonl."""
from functools import partial

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from colbench.env.data import load_trajectories, of_first_tasks, state_line
from colbench.env.dialogue import states_with_candidates
from colbench.env.hidden_info import with_hidden_info, without_hidden_info
from colbench.lm.logps import candidate_trees, message_logps, message_means, pack, tree_tokens
from colbench.run.errors import UserError
from colbench.run.files import append_jsonl, repair_jsonl, seed_of
from colbench.run.settings import keep_settings, keep_weights, next_step, refuse_other, settings_file
from colbench.train.judges import judge_scores, rollout_scores

TRAINED, UNTRAINED = ("logprob", "regression", "value"), ("untrained", "random", "judge", "rollout")  # critics


def mean_log_ratio(logps: torch.Tensor, ref_logps: torch.Tensor, length_norm: bool = True) -> torch.Tensor:
    """(1) of train_critic.py, for finished critics: evaluate.py and the report ask them through this."""
    return (logps - ref_logps).mean() if length_norm else (logps - ref_logps).sum()


def score_candidates(how, states: list[dict], tokenizer, model, reference_logps, advantage=mean_log_ratio,
                     environment=None):
    """A(o, a, c) of every candidate a of every state: a list of lists of floats, [] for a state that is too long.

    how: the critic's flags, as training_args.json in its folder has them. A state: {"messages", "candidates", "task",
    ...}. model: the critic. reference_logps: message_logps under π_ref. Both see the same tokens and the same prompt,
    c included. advantage: (1). environment: for --critic rollout, which plays on.
    """
    without_c = [state["messages"] for state in states]
    with_c = [with_hidden_info(state["messages"], state["task"]["ground_truth"]) for state in states]
    prompts = without_c if how.no_hidden_info else with_c
    if how.critic == "rollout":
        return rollout_scores(how, environment, states, tokenizer, model)
    if how.critic == "random":  # a control: what the policy stage does without a critic
        return [[seed_of(how.seed, *state_key(state), k, "random critic") / 2**63
                 for k, _ in enumerate(state["candidates"])] for state in states]
    if how.critic == "judge":
        candidates = [state["candidates"] for state in states]
        return judge_scores(reference_logps, tokenizer, prompts, candidates, how.tokens_per_step)

    def outputs(forward, prompts):  # a list over candidates of what `forward` gives for a message
        jobs = candidate_trees(tokenizer, list(zip(prompts, [s["candidates"] for s in states])), how.max_tokens,
                               how.tokens_per_step)
        found = [[] for _ in states]
        for group in pack([tree_tokens(tree) for _, tree in jobs], how.tokens_per_step):
            for k, messages in zip(group, forward([jobs[k][1] for k in group])):
                found[jobs[k][0]] += messages
        return found

    with torch.no_grad():
        if how.critic in ("regression", "value"):
            return [[model.value_head(mean).item() for mean in means]
                    for means in outputs(partial(message_means, model), prompts)]
        if how.critic == "untrained":  # log-ratio of the base model with c to itself without
            logps, ref_logps = outputs(reference_logps, with_c), outputs(reference_logps, without_c)
        else:
            logps = outputs(partial(message_logps, model), prompts)
            ref_logps = outputs(reference_logps, without_c if how.official else prompts)
    return [[advantage(*both, length_norm=not how.no_length_norm).item() for both in zip(*of_state)]
            for of_state in zip(logps, ref_logps)]


def critic_to_do(args, environment) -> str | None:
    """What train_critic.py has to do: "train" (and rank), "rank" with the critic that is there, or None. UserError
    where the run holds another critic or its ranking."""
    trains, there = args.critic in TRAINED, args.preferences.exists() and args.preferences.stat().st_size
    trained = args.critic_folder.exists() or not trains
    ranked_with = settings_file(args.preferences)
    if there and (not trains or ranked_with.exists()):
        refuse_other(ranked_with, args, ["critic"], f"{args.preferences} was ranked")
    if trained and args.preferences.exists() and not states_to_rank(args, environment)[1]:
        keep_settings(args.critic_folder if trains else args.preferences, args, begun=True)
        keep_weights(args.preferences, [args.critic_folder] if trains else [])
        print(f"{args.preferences} is complete: nothing to do; {next_step('train_policy.py', args)}")
        return None
    if not trained and there:
        raise UserError(f"{args.preferences}: holds another critic's ranking; delete it to train and rank anew, "
                        "or choose another --run")
    if trains and trained:  # it ranks as it was trained
        refuse_other(args.critic_folder / "training_args.json", args, ["critic", "vision_critic", "no_hidden_info",
                     "no_length_norm", "official", "lora_rank"], f"{args.critic_folder} was trained")
    return "rank" if trained else "train"


def states_to_rank(args, environment) -> tuple[list[dict], set]:
    """All states with candidates, and (id, sample, turn) of those that have no line in preferences.jsonl yet."""
    done = {state_key(line) for line in repair_jsonl(args.preferences, state_line)}
    trajectories = of_first_tasks(load_trajectories(args.trajectories, environment.check_task), args.max_trajectories)
    states = states_with_candidates(trajectories, environment.prompt)
    if not states:
        raise UserError(f"{args.trajectories}: no candidates to rank; add them with collect.py --run OTHER "
                        f"--add-candidates-to {args.trajectories}")
    return states, {state_key(state) for state in states} - done


def rank(args, accelerator, environment, score) -> None:
    """Append a line to preferences.jsonl for every state that has none, with the advantages that score(states) gives.

    A chunk of states at a time is shared among the processes. After an interruption a chunk that lacks a state is
    computed as a whole: its batches, and with them the last bits, stay the same.
    """
    states, missing = states_to_rank(args, environment)
    if accelerator.is_main_process:
        keep_settings(args.preferences, args, begun=args.preferences.exists())
        keep_weights(args.preferences, [args.critic_folder] if args.critic in TRAINED else [])
    at_once, left_out = 16 * accelerator.num_processes, 0
    # sorted within a part: one order for any number of processes
    part_of = {state_key(state): i // 16 for i, state in enumerate(states)}
    bar = tqdm(total=len(states), desc="ranking", unit="state", disable=not accelerator.is_main_process)
    for start in range(0, len(states), at_once):
        some = states[start:start + at_once]
        bar.update(len(some))
        if missing.isdisjoint(map(state_key, some)):
            continue
        mine = some[accelerator.process_index::accelerator.num_processes]
        with accelerator.autocast():
            scores = score(mine)
        rows = []
        for state, advantages in zip(mine, scores):
            rows.append(without_hidden_info(state) | {"advantages": advantages})
            if not advantages:
                rows[-1].update(candidates=[], left_out="longer than --max-tokens")
        for row in sorted(gather_object(rows), key=lambda row: (part_of[state_key(row)], state_key(row))):
            if accelerator.is_main_process and state_key(row) in missing:
                append_jsonl(args.preferences, row)
                left_out += "left_out" in row
    bar.close()
    if accelerator.is_main_process:
        print(f"{args.preferences}: {len(missing) - left_out} states ranked, {left_out} left out for their length")
        print(next_step("train_policy.py", args))


def state_key(row: dict) -> tuple:
    """(id, sample, turn) of a state."""
    return row["id"], row["sample"], row["turn"]
