"""Stage 3 of SWEET-RL: train the agent, which never sees the reference, on the messages that the critic prefers.

    python train_policy.py                                        # embedded default: runs/tiny/policy
    python train_policy.py --preset llama --run runs/llama        # 4-bit Llama-3.1-8B, the paper's settings but for LoRA's
    python train_policy.py --algorithm multi-turn-dpo --policy runs/tiny/dpo    # a baseline of the paper; so is rft
    accelerate launch --num_processes 2 train_policy.py ...       # data parallel, on two GPUs

At each state (a dialogue so far, o) up to 16 candidate messages are ranked by their advantage A_θ(o, a, c). A pair is a random
one of the better half, a+, over a random one of the worse half, a−; four pairs a state. Then DPO on single turns, without c
(paper, section 4.2; log-probs are sums over the tokens of a message):

    (3)  J(φ) = −log σ( β′ [ log π_φ(a+|o) − log π_ref(a+|o) ] − β′ [ log π_φ(a−|o) − log π_ref(a−|o) ] ) + w · NLL(a+)

with w = 0.01 in the paper. The embedded model has few sensible messages at a state, most of 16 candidates are equally useless, and
halves are then half noise: its preset draws pairs by `--pairing gap` (a near-best over a clearly worse one), leaves out the last
turn, where every message ends the episode alike, and takes a larger w. The paper's: `--pairing halves --nll-weight 0.01 --no-skip-last-turn`.

The baselines need no critic. `multi-turn-dpo` is (3) with all messages of the agent in a trajectory τ+ of higher reward as a+, those
of a τ− of the same task as a−. `rft`, rejection fine-tuning, is NLL on the agent's messages of successful trajectories:

    (4)  J(φ) = −1/L Σ_l log π_φ(a^l | o, a^<l),   all L agent tokens of a τ with r(τ) = 1

Reads RUN/preferences.jsonl (baselines: RUN/trajectories.jsonl). Writes RUN/policy/ (a PEFT adapter) and RUN/policy_log.jsonl.
Interrupted, the same command goes on.
"""

import argparse
import math
import random
import statistics
from pathlib import Path

from colbench.dialogue import AGENT_PROMPT, MAX_TURNS, prompt_messages
from colbench.frontend.environment import PRESETS as FRONTEND_PRESETS, add_env
from colbench.files import UserError, lock_run, numbered_rows, run_main, seed_of
from colbench.model import (adapters_off, add_lora, context_length, encode_dialogue, end_of_turn, load_model, load_tokenizer,
                            message_ids, message_logps, pack, tree_tokens)
from colbench.show import keep_settings, next_step, training_plan
from colbench.tasks import load_trajectories, of_first_tasks
from colbench.training import DIVERGED, StepLog, cached_logps, load_checkpoint, save_checkpoint, save_trained
from train_critic import make_pairs  # multi-turn DPO: trajectories of one task, r(τ+) > r(τ−)

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tqdm import tqdm

PRESETS = {
    "tiny": dict(run="runs/tiny", model="tiny", load_in_4bit=False, lora_rank=32, learning_rate=5e-4, epochs=2, batch_size=32,
                 pairing="gap", skip_last_turn=True, nll_weight=3.0, pairs_per_task=4, tokens_per_step=384, max_tokens=1024,
                 gradient_checkpointing=False),
    "llama": dict(run="runs/llama", model="meta-llama/Llama-3.1-8B-Instruct", load_in_4bit=True, lora_rank=32,
                  learning_rate=5e-5, epochs=1, batch_size=8, pairing="halves", skip_last_turn=False, nll_weight=0.01,
                  pairs_per_task=0, tokens_per_step=8192, max_tokens=8192, gradient_checkpointing=True),
}
BASELINES = {("tiny", "multi-turn-dpo"): dict(batch_size=8, learning_rate=1e-3, epochs=4),
             ("tiny", "rft"): dict(batch_size=8, learning_rate=1e-3, epochs=6)}


def parse_args():
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", choices=PRESETS, default="tiny", help="defaults for all other flags")
    first.add_argument("--algorithm", choices=("sweet", "multi-turn-dpo", "rft"), default="sweet",
                       help="sweet: (3) on candidates ranked by the critic; multi-turn-dpo: (3) on whole trajectories; rft: (4) (default: %(default)s)")
    env = add_env(first)
    known = first.parse_known_args()[0]
    parser = argparse.ArgumentParser(
        description=__doc__, parents=[first], formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("files")
    group.add_argument("--run", help="directory of this run (default: %(default)s)")
    group.add_argument("--preferences", help="input (default: RUN/preferences.jsonl)")
    group.add_argument("--trajectories", help="input of the baselines (default: RUN/trajectories.jsonl)")
    group.add_argument("--policy", help="output: the trained agent (default: RUN/policy)")
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="hub id or folder (default: %(default)s)")
    group.add_argument("--load-in-4bit", action=argparse.BooleanOptionalAction, help="NF4 weights (default: %(default)s)")
    group.add_argument("--lora-rank", type=int, help="0 trains all weights (default: %(default)s)")
    group.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction,
                       help="compute activations twice: less memory, slower (default: %(default)s)")
    group = parser.add_argument_group("pairs")
    group.add_argument("--pairing", choices=("halves", "gap"), help="halves: the paper's; gap: see above (default: %(default)s)")
    group.add_argument("--gap", type=float, default=0.2, help="with --pairing gap, a rejected candidate lies at least so many "
                       "standard deviations of all advantages below the best (default: %(default)s)")
    group.add_argument("--pairs-per-state", type=int, default=4, help="at most so many (default: %(default)s)")
    group.add_argument("--skip-last-turn", action=argparse.BooleanOptionalAction,
                       help="leave out states of the last turn (default: %(default)s)")
    group.add_argument("--pairs-per-task", type=int, help="multi-turn DPO: at most so many pairs of trajectories, drawn at random; "
                       "0: all (default: %(default)s)")
    group.add_argument("--min-gap", type=float, default=0.0, help="multi-turn DPO: leave out pairs whose rewards differ by less "
                       "(default: %(default)s)")
    group.add_argument("--max-trajectories", type=int, default=0, help="baselines: only so many, of the first tasks; 0: all "
                       "(default: %(default)s)")
    group = parser.add_argument_group("objective")
    group.add_argument("--beta", type=float, default=0.1, help="β′ of (3) (default: %(default)s)")
    group.add_argument("--nll-weight", type=float, help="w of (3) (default: %(default)s)")
    group.add_argument("--official", action="store_true", help="as the released code has it: NLL over the prompt's tokens too")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--learning-rate", type=float, help="peak; 10%% warm-up, linear decay (default: %(default)s)")
    group.add_argument("--epochs", type=int, help="passes over the pairs (default: %(default)s)")
    group.add_argument("--batch-size", type=int, help="pairs a step; the pairs of a state stay together (default: %(default)s)")
    group.add_argument("--tokens-per-step", type=int, help="tokens in one forward pass: lower it when memory runs out; the "
                       "batch stays what it is (default: %(default)s)")
    group.add_argument("--max-tokens", type=int, help="longer pairs are left out and counted (default: %(default)s)")
    group.add_argument("--save-every", type=int, default=50, help="steps between checkpoints (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="of pairs, order and LoRA's start (default: %(default)s)")
    group.add_argument("--log-with", choices=("tensorboard", "wandb"), help="also log there, through accelerate")
    frontend = FRONTEND_PRESETS["train_policy"][known.preset] if env == "frontend" else {}
    parser.set_defaults(algorithm=known.algorithm,
                        **PRESETS[known.preset] | BASELINES.get((known.preset, known.algorithm), {}) | frontend)
    args = parser.parse_args()
    args.preferences = Path(args.preferences or Path(args.run) / "preferences.jsonl")
    args.trajectories = Path(args.trajectories or Path(args.run) / "trajectories.jsonl")
    if args.official and args.algorithm != "sweet":
        raise UserError("--official concerns --algorithm sweet")
    if min(args.save_every, args.batch_size, args.epochs, args.tokens_per_step, args.max_tokens, args.pairs_per_state) < 1:
        raise UserError("--save-every, --batch-size, --epochs, --tokens-per-step, --max-tokens and --pairs-per-state are at least 1")
    if args.beta <= 0:
        raise UserError(f"--beta {args.beta:g}: β′ of (3) is above 0; for NLL alone give 1e-6")
    args.policy = Path(args.policy or Path(args.run) / "policy")
    return args


def policy_loss(chosen, rejected, ref_chosen, ref_rejected, beta: float, nll_weight: float, nll_tokens=None):
    """(3) for one pair a+, a−: two messages at a state, or all messages of two trajectories. chosen, rejected: (L,) log-probs of
    their tokens under π_φ, ref_*: the same under π_ref. Returns (loss, β′ log-ratio of a+, β′ log-ratio of a−); the latter two are
    DPO's implicit rewards. nll_tokens: log-probs that the NLL is taken of, where these are not `chosen`."""
    reward_chosen = beta * (chosen - ref_chosen).sum()  # β′ [ log π_φ(a+|o) − log π_ref(a+|o) ]
    reward_rejected = beta * (rejected - ref_rejected).sum()  # β′ [ log π_φ(a−|o) − log π_ref(a−|o) ]
    nll = -(chosen if nll_tokens is None else nll_tokens).mean()
    loss = -F.logsigmoid(reward_chosen - reward_rejected) + nll_weight * nll
    return loss, reward_chosen, reward_rejected


def draw_pairs(advantages: list[float], rng: random.Random, pairing: str, n: int, gap: float) -> list[tuple[int, int]]:
    """n random pairs (chosen, rejected) of candidate numbers at one state; fewer if it has fewer different ones. `gap` is in
    the units of the advantages. Where all samples were one message a+ = a−: the log-ratios of (3) cancel, its NLL keeps the message."""
    if len(advantages) == 1:
        return [(0, 0)] * n
    ranked = sorted(range(len(advantages)), key=lambda k: -advantages[k])
    if pairing == "halves":
        half = len(ranked) // 2
        top, bottom = ranked[:half], ranked[len(ranked) - half:]
    else:
        best = advantages[ranked[0]]
        top = [k for k in ranked[:3] if best - advantages[k] <= gap / 2]
        bottom = [k for k in ranked if best - advantages[k] >= gap]
    pairs = [(a, b) for a in top for b in bottom]
    return rng.sample(pairs, min(n, len(pairs)))


def load_states(args, tokenizer) -> list[dict]:
    """States with pairs: {"trees": [(prompt ids, [], distinct messages' ids)], "pairs": [([number of a+], [number of a−]), ...]};
    the numbers are those of the messages in message_logps' order. With --official the prompt is message 0."""
    rows, last_turns = [], 0
    for number, row in numbered_rows(args.preferences, ("id", "sample", "turn", "messages", "candidates", "advantages")):
        if len(row["candidates"]) != len(row["advantages"]) or not all(map(math.isfinite, row["advantages"])):
            raise UserError(f"{args.preferences}:{number}: advantages: as many finite numbers as candidates are wanted")
        if args.skip_last_turn and row.get("last_turn"):
            last_turns += 1
        elif row["candidates"]:
            rows.append(row)
    advantages = [a for row in rows for a in row["advantages"]]
    gap = args.gap * statistics.pstdev(advantages) if advantages else 0.0
    states, end_id, too_long = [], end_of_turn(tokenizer), 0
    for row in rows:
        rng = random.Random(seed_of(args.seed, row["id"], row["sample"], row["turn"], "pairs"))
        pairs = draw_pairs(row["advantages"], rng, args.pairing, args.pairs_per_state, gap)
        prompt, _ = encode_dialogue(tokenizer, row["messages"])
        used = sorted({k for pair in pairs for k in pair})
        leaves = {k: message_ids(tokenizer, row["candidates"][k], end_id) for k in used}
        fitting = [pair for pair in pairs if len(prompt) + sum(len(leaves[k]) for k in {*pair}) <= args.max_tokens]
        too_long += len(pairs) - len(fitting)
        used = sorted({k for pair in fitting for k in pair})
        if fitting:
            prompt_tokens = [(1, len(prompt))] if args.official else []
            number = {k: i + len(prompt_tokens) for i, k in enumerate(used)}
            states.append({"trees": [(prompt, prompt_tokens, [leaves[k] for k in used])],
                           "pairs": [([number[a]], [number[b]]) for a, b in fitting]})
    if not states:
        raise UserError(f"{args.preferences}: no pair to learn from: {len(rows)} states with candidates, none with a "
                        f"pair by --pairing {args.pairing} within --max-tokens {args.max_tokens}"
                        + f"; {last_turns} of the last turn are left out (--no-skip-last-turn takes them in)" * bool(last_turns))
    print(f"{sum(len(s['pairs']) for s in states)} pairs at {len(states)} of {len(rows)} states; {too_long} left out for their length")
    return states


def load_baseline(args, tokenizer) -> list[dict]:
    """Multi-turn DPO: {"trees": [τ+, τ−], "pairs": [(numbers of τ+'s agent messages, numbers of τ−'s)]} for each pair.
    Rejection fine-tuning: {"trees": [τ], "pairs": [(numbers of τ's agent messages, [])]} for each successful τ."""
    trajectories = [t for t in of_first_tasks(load_trajectories(args.trajectories), args.max_trajectories) if "reward" in t]
    if args.algorithm == "rft":
        groups = [(i,) for i, t in enumerate(trajectories) if t["reward"] == 1]
    else:
        groups = make_pairs(trajectories, args.pairs_per_task, args.seed, args.min_gap)
    trees = {}
    for i in sorted({i for group in groups for i in group}):
        system = trajectories[i].get("system", AGENT_PROMPT.replace("{max_turns}", str(MAX_TURNS)))
        trees[i] = (*encode_dialogue(tokenizer, prompt_messages(system, trajectories[i]["dialogue_history"])), [])
    units = []
    for group in groups:
        if all(tree_tokens(trees[i]) <= args.max_tokens for i in group):
            turns = [len(trees[i][1]) for i in group]
            units.append({"trees": [trees[i] for i in group],
                          "pairs": [(list(range(turns[0])), list(range(turns[0], sum(turns))))]})
    if not units:
        what = "no trajectory of reward 1" if args.algorithm == "rft" else "no task with two trajectories of different reward"
        raise UserError(f"{args.trajectories}: nothing to learn from: {what} within --max-tokens {args.max_tokens}, among "
                        f"{len(trajectories)} scored trajectories")
    print(f"{len(units)} {'trajectories' if args.algorithm == 'rft' else 'pairs'}; {len(groups) - len(units)} left out for their length")
    return units


def main():
    args = parse_args()
    accelerator = Accelerator(log_with=args.log_with, project_dir=args.run,
                              mixed_precision="bf16" if torch.cuda.is_available() else "no")
    if accelerator.is_main_process:
        lock = lock_run(args.policy.parent, args.policy.name)  # noqa: F841  held until the process ends
    if args.policy.exists():
        keep_settings(args.policy, args, begun=True)
        print(f"{args.policy} is complete: nothing to do (to train again: another --run); {next_step('evaluate.py', args)}")
        return
    tokenizer = load_tokenizer(args.model)
    args.max_tokens = min(args.max_tokens, context_length(args.model))
    units = load_states(args, tokenizer) if args.algorithm == "sweet" else load_baseline(args, tokenizer)
    model = load_model(args.model, args.load_in_4bit, accelerator.device)
    torch.manual_seed(args.seed)  # LoRA's A matrices start at random
    model = add_lora(model, args.lora_rank, args.gradient_checkpointing)

    def reference_logps(trees):  # π_ref: the same weights with adapters off, or all weights before the first step
        with torch.no_grad(), accelerator.autocast(), adapters_off(model):
            return message_logps(model, trees)

    beside = lambda name: args.policy.with_name(args.policy.name + name)  # noqa: E731  policy -> policy_log.jsonl
    if args.algorithm != "rft":
        ref_logps = iter(cached_logps(accelerator, beside("_reference.jsonl"), model, [tree for unit in units for tree in unit["trees"]],
                                      args.tokens_per_step, reference_logps))
        for unit in units:
            unit["ref_logps"] = [logps for _ in unit["trees"] for logps in next(ref_logps)]  # a list over messages of (L,)
    sizes = [sum(map(tree_tokens, unit["trees"])) for unit in units]

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)
    units_per_step = max(1, args.batch_size // (args.pairs_per_state if args.algorithm == "sweet" else 1))
    steps_per_epoch = -(-len(units) // units_per_step)
    steps = args.epochs * steps_per_epoch
    from transformers import get_linear_schedule_with_warmup  # here, not above: it takes seconds to import
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    data = seed_of([[unit["trees"], unit["pairs"]] for unit in units])  # a checkpoint goes on with the pairs that it was begun with
    first = load_checkpoint(accelerator, args.policy, model, optimizer, schedule, args, data)
    log = StepLog(accelerator, beside("_log.jsonl"), first)
    if accelerator.is_main_process:
        keep_settings(args.policy, args, begun=bool(first))
        training_plan("train_policy", args, model, steps, first, f"up to {args.batch_size} pairs", args.epochs * sum(sizes), args.policy)
    accelerator.init_trackers("policy", config={name: str(value) for name, value in vars(args).items()})
    model.train()
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="policy", unit="step",
               disable=not accelerator.is_main_process)
    for step in bar:
        torch.manual_seed(seed_of(args.seed, "policy", step, accelerator.process_index))  # for models with dropout
        epoch, place = divmod(step, steps_per_epoch)
        order = random.Random(seed_of(args.seed, "policy", epoch)).sample(range(len(units)), len(units))
        batch = order[place * units_per_step:(place + 1) * units_per_step]
        weight = accelerator.num_processes / sum(len(units[k]["pairs"]) for k in batch)
        mine = batch[accelerator.process_index::accelerator.num_processes]
        if not mine:  # more processes than states: take part in the gradient's average with nothing
            mine, weight = batch[:1], 0.0
        for group in pack([sizes[k] for k in mine], args.tokens_per_step):
            group = [mine[place] for place in group]
            with accelerator.autocast():
                # per tree a list over messages of (L,): the prompt is computed once, each distinct message once
                logps = iter(message_logps(model, [tree for k in group for tree in units[k]["trees"]]))
            total = 0.0
            for k in group:
                messages = [message for _ in units[k]["trees"] for message in next(logps)]
                for a, b in units[k]["pairs"]:
                    chosen = torch.cat([messages[i] for i in a])  # log π_φ(a+|o), (L,); of all turns of τ+ in the baselines
                    if args.algorithm == "rft":
                        loss = -chosen.mean()  # (4)
                        values = {}
                    else:
                        rejected, ref = torch.cat([messages[i] for i in b]), units[k]["ref_logps"]
                        loss, reward_chosen, reward_rejected = policy_loss(
                            chosen, rejected, torch.cat([ref[i] for i in a]), torch.cat([ref[i] for i in b]), args.beta,
                            args.nll_weight, torch.cat([messages[0], chosen]) if args.official else None)
                        values = {"rewards/accuracies": reward_chosen > reward_rejected,
                                  "rewards/chosen": reward_chosen, "rewards/rejected": reward_rejected,
                                  "rewards/margins": reward_chosen - reward_rejected,
                                  "margin": (reward_chosen - reward_rejected) / args.beta, "logps/rejected": rejected.sum()}
                    total = total + weight * loss
                    log.add(sizes[k] / len(units[k]["pairs"]), **{"loss": loss, "logps/chosen": chosen.sum(), **values})
            accelerator.backward(total)
        for parameter in parameters:  # data parallel: the mean over the processes
            parameter.grad = accelerator.reduce(parameter.grad, reduction="mean")
        gradient_norm = accelerator.clip_grad_norm_(parameters, 1.0)
        row = log.write(step, gradient_norm=float(gradient_norm), learning_rate=schedule.get_last_lr()[0])
        if log.sound:  # no NaN or infinity in any process's loss or gradient; else the step is left out and counted
            optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if log.unsound_in_a_row == 5:
            save_checkpoint(accelerator, args.policy, model, optimizer, schedule, step + 1, data)
            raise UserError(f"step {step}: {DIVERGED}")
        bar.set_postfix(loss=row["loss"], accuracy=row.get("rewards/accuracies"), margin=row.get("margin"), skipped=row["skipped"])
        if (step + 1) % args.save_every == 0:
            save_checkpoint(accelerator, args.policy, model, optimizer, schedule, step + 1, data)
    save_trained(accelerator, args.policy, model, tokenizer, vars(args))
    accelerator.end_training()
    if accelerator.is_main_process:
        print(f"{args.policy}: trained on {sum(len(unit['pairs']) for unit in units)} {args.algorithm} examples in {steps} steps")
        print(next_step("evaluate.py", args) + (f" --policies base {args.policy}" if args.policy.name != "policy" else ""))


if __name__ == "__main__":
    run_main(main, out_of_memory="lower --tokens-per-step (the batch stays what it is) or --max-tokens")
