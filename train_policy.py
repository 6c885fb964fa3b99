"""Stage 3 of SWEET-RL: train the agent, which never sees the reference, on the messages that the critic prefers.

    python train_policy.py                                        # embedded default: runs/tiny/policy
    python train_policy.py --preset llama --run runs/llama        # 4-bit Llama-3.1-8B with the paper's settings
    accelerate launch --num_processes 2 train_policy.py ...       # data parallel

At each state (a dialogue so far, o) up to 16 candidate messages are ranked by their advantage A_θ(o, a, c). A pair is a random
one of the better half, a+, over a random one of the worse half, a−; four pairs a state. Then DPO on single turns, without c
(paper, section 4.2; log-probs are sums over the tokens of a message):

    (3)  J(φ) = −log σ( β′ [ log π_φ(a+|o) − log π_ref(a+|o) ] − β′ [ log π_φ(a−|o) − log π_ref(a−|o) ] ) + w · NLL(a+)

with w = 0.01 in the paper. The embedded model has few sensible messages at a state, most of 16 candidates are equally useless, and
halves are then half noise: its preset draws pairs by `--pairing gap` (a near-best over a clearly worse one), leaves out the last
turn, where every message ends the episode alike, and takes a larger w. `--pairing halves --nll-weight 0.01` is the paper's.

Reads RUN/preferences.jsonl. Writes RUN/policy/ (a PEFT adapter) and RUN/policy_log.jsonl. Interrupted, the same command goes on.
"""

import argparse
import math
import random
import statistics
from pathlib import Path

from colbench.files import UserError, lock_run, numbered_rows, run_main, seed_of
from colbench.model import (adapters_off, add_lora, context_length, encode_dialogue, end_of_turn, load_model, load_tokenizer,
                            message_ids, message_logps, pack, tree_tokens)
from colbench.training import DIVERGED, StepLog, cached_logps, load_checkpoint, save_checkpoint, save_trained

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

PRESETS = {
    "tiny": dict(run="runs/tiny", model="tiny", load_in_4bit=False, lora_rank=32, learning_rate=3e-4, epochs=2, batch_size=32,
                 pairing="gap", skip_last_turn=True, nll_weight=1.0, tokens_per_step=1024, max_tokens=1024,
                 gradient_checkpointing=False),
    "llama": dict(run="runs/llama", model="meta-llama/Llama-3.1-8B-Instruct", load_in_4bit=True, lora_rank=32,
                  learning_rate=5e-5, epochs=1, batch_size=8, pairing="halves", skip_last_turn=False, nll_weight=0.01,
                  tokens_per_step=8192, max_tokens=8192, gradient_checkpointing=True),
}


def parse_args():
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", choices=PRESETS, default="tiny", help="defaults for all other flags")
    preset = first.parse_known_args()[0].preset
    parser = argparse.ArgumentParser(
        description=__doc__, parents=[first], formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("files")
    group.add_argument("--run", help="directory of this run (default: %(default)s)")
    group.add_argument("--preferences", help="input (default: RUN/preferences.jsonl)")
    group.add_argument("--policy", help="output: the trained agent (default: RUN/policy)")
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="hub id or folder (default: %(default)s)")
    group.add_argument("--load-in-4bit", action=argparse.BooleanOptionalAction, help="NF4 weights (default: %(default)s)")
    group.add_argument("--lora-rank", type=int, help="0 trains all weights (default: %(default)s)")
    group.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, help="(default: %(default)s)")
    group = parser.add_argument_group("pairs")
    group.add_argument("--pairing", choices=("halves", "gap"), help="halves: the paper's; gap: see above (default: %(default)s)")
    group.add_argument("--gap", type=float, default=0.2, help="with --pairing gap, a rejected candidate lies at least so many "
                       "standard deviations of all advantages below the best (default: %(default)s)")
    group.add_argument("--pairs-per-state", type=int, default=4, help="(default: %(default)s)")
    group.add_argument("--skip-last-turn", action=argparse.BooleanOptionalAction,
                       help="leave out states of the last turn (default: %(default)s)")
    group = parser.add_argument_group("objective")
    group.add_argument("--beta", type=float, default=0.1, help="β′ of (3) (default: %(default)s)")
    group.add_argument("--nll-weight", type=float, help="w of (3) (default: %(default)s)")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--learning-rate", type=float, help="peak; 10%% warm-up, linear decay (default: %(default)s)")
    group.add_argument("--epochs", type=int, help="(default: %(default)s)")
    group.add_argument("--batch-size", type=int, help="pairs a step; the pairs of a state stay together (default: %(default)s)")
    group.add_argument("--tokens-per-step", type=int, help="tokens in one forward pass: lower it when memory runs out; the "
                       "batch stays what it is (default: %(default)s)")
    group.add_argument("--max-tokens", type=int, help="longer pairs are left out and counted (default: %(default)s)")
    group.add_argument("--save-every", type=int, default=50, help="steps between checkpoints (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    group.add_argument("--log-with", choices=("tensorboard", "wandb"), help="also log there, through accelerate")
    parser.set_defaults(**PRESETS[preset])
    args = parser.parse_args()
    args.preferences = Path(args.preferences or Path(args.run) / "preferences.jsonl")
    args.policy = Path(args.policy or Path(args.run) / "policy")
    return args


def policy_loss(chosen, rejected, ref_chosen, ref_rejected, beta: float, nll_weight: float):
    """(3) for one pair a+, a− at one state. chosen, rejected: (L,) log-probs of the messages' tokens under π_φ, ref_*: the same
    under π_ref. Returns (loss, β′ log-ratio of a+, β′ log-ratio of a−); the latter two are DPO's implicit rewards."""
    reward_chosen = beta * (chosen - ref_chosen).sum()  # β′ [ log π_φ(a+|o) − log π_ref(a+|o) ]
    reward_rejected = beta * (rejected - ref_rejected).sum()  # β′ [ log π_φ(a−|o) − log π_ref(a−|o) ]
    loss = -F.logsigmoid(reward_chosen - reward_rejected) + nll_weight * -chosen.mean()
    return loss, reward_chosen, reward_rejected


def draw_pairs(advantages: list[float], rng: random.Random, pairing: str, n: int, gap: float) -> list[tuple[int, int]]:
    """n random pairs (chosen, rejected) of candidate numbers at one state; fewer if it has fewer different ones. `gap` is in
    the units of the advantages."""
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
    """States with pairs: {"tree": (prompt ids, [], distinct messages' ids), "pairs": [(leaf of a+, leaf of a−), ...]}."""
    rows = []
    for number, row in numbered_rows(args.preferences, ("id", "sample", "turn", "messages", "candidates", "advantages")):
        if len(row["candidates"]) != len(row["advantages"]) or not all(map(math.isfinite, row["advantages"])):
            raise UserError(f"{args.preferences}:{number}: advantages: as many finite numbers as candidates are wanted")
        if len(row["candidates"]) > 1 and not (args.skip_last_turn and row.get("last_turn")):
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
        fitting = [pair for pair in pairs if len(prompt) + sum(len(leaves[k]) for k in pair) <= args.max_tokens]
        too_long += len(pairs) - len(fitting)
        used = sorted({k for pair in fitting for k in pair})
        if fitting:
            states.append({"tree": (prompt, [], [leaves[k] for k in used]),
                           "pairs": [(used.index(a), used.index(b)) for a, b in fitting]})
    if not states:
        raise UserError(f"{args.preferences}: no pair to learn from: {len(rows)} states with two candidates or more, none with a "
                        f"pair by --pairing {args.pairing} within --max-tokens {args.max_tokens}")
    print(f"{sum(len(s['pairs']) for s in states)} pairs at {len(states)} of {len(rows)} states; {too_long} left out for their length")
    return states


def main():
    args = parse_args()
    accelerator = Accelerator(log_with=args.log_with, project_dir=args.run,
                              mixed_precision="bf16" if torch.cuda.is_available() else "no")
    if accelerator.is_main_process:
        lock = lock_run(args.policy.parent, "policy")  # noqa: F841  held until the process ends
    if args.policy.exists():
        print(f"{args.policy} is complete: nothing to do; next: python evaluate.py (delete the folder to train again)")
        return
    tokenizer = load_tokenizer(args.model)
    args.max_tokens = min(args.max_tokens, context_length(args.model))
    states = load_states(args, tokenizer)
    model = load_model(args.model, args.load_in_4bit, accelerator.device)
    torch.manual_seed(args.seed)  # LoRA's A matrices start at random
    model = add_lora(model, args.lora_rank, args.gradient_checkpointing)

    def reference_logps(trees):  # π_ref: the same weights with adapters off, or all weights before the first step
        with torch.no_grad(), accelerator.autocast(), adapters_off(model):
            return message_logps(model, trees)

    trees = [state["tree"] for state in states]
    ref_logps = cached_logps(accelerator, args.policy.with_name("policy_reference.jsonl"), model, trees, args.tokens_per_step,
                             reference_logps)  # state -> list over messages of (L,)

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)
    states_per_step = max(1, args.batch_size // args.pairs_per_state)
    steps_per_epoch = -(-len(states) // states_per_step)
    steps = args.epochs * steps_per_epoch
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    first = load_checkpoint(accelerator, args.policy, model, optimizer, schedule)
    log = StepLog(accelerator, Path(args.run) / "policy_log.jsonl", first)
    accelerator.init_trackers("policy", config={name: str(value) for name, value in vars(args).items()})
    model.train()
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="policy", unit="step",
               disable=not accelerator.is_main_process)
    for step in bar:
        torch.manual_seed(seed_of(args.seed, "policy", step, accelerator.process_index))  # for models with dropout
        epoch, place = divmod(step, steps_per_epoch)
        order = random.Random(seed_of(args.seed, "policy", epoch)).sample(range(len(states)), len(states))
        batch = order[place * states_per_step:(place + 1) * states_per_step]
        weight = accelerator.num_processes / sum(len(states[k]["pairs"]) for k in batch)
        mine = batch[accelerator.process_index::accelerator.num_processes]
        if not mine:  # more processes than states: take part in the gradient's average with nothing
            mine, weight = batch[:1], 0.0
        for group in pack([tree_tokens(trees[k]) for k in mine], args.tokens_per_step):
            group = [mine[place] for place in group]
            with accelerator.autocast():
                logps = message_logps(model, [trees[k] for k in group])
            total = 0.0
            for k, messages in zip(group, logps):
                ref = ref_logps[k]
                for a, b in states[k]["pairs"]:
                    loss, reward_chosen, reward_rejected = policy_loss(
                        messages[a], messages[b], ref[a], ref[b], args.beta, args.nll_weight)
                    total = total + weight * loss
                    log.add(tree_tokens(trees[k]) / len(states[k]["pairs"]), **{
                        "loss": loss, "rewards/accuracies": reward_chosen > reward_rejected,
                        "rewards/chosen": reward_chosen, "rewards/rejected": reward_rejected,
                        "rewards/margins": reward_chosen - reward_rejected,
                        "margin": (reward_chosen - reward_rejected) / args.beta,
                        "logps/chosen": messages[a].sum(), "logps/rejected": messages[b].sum(),
                    })
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
            save_checkpoint(accelerator, args.policy, model, optimizer, schedule, step + 1)
            raise UserError(f"step {step}: {DIVERGED}")
        bar.set_postfix(loss=row["loss"], accuracy=row["rewards/accuracies"], margin=row["margin"], skipped=row["skipped"])
        if (step + 1) % args.save_every == 0:
            save_checkpoint(accelerator, args.policy, model, optimizer, schedule, step + 1)
    accelerator.end_training()
    save_trained(accelerator, args.policy, model, tokenizer, vars(args))
    if accelerator.is_main_process:
        print(f"{args.policy}: trained on {sum(len(s['pairs']) for s in states)} pairs in {steps} steps")
        print("next: python evaluate.py" + (f" --run {args.run}" if args.run != "runs/tiny" else ""))


if __name__ == "__main__":
    run_main(main, out_of_memory="lower --tokens-per-step (the batch stays what it is) or --max-tokens")
