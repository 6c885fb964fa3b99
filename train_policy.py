"""Stage 3 of SWEET-RL: train the agent, which never sees the hidden information c, on the messages
that the critic prefers.

    python train_policy.py                                   # embedded model: runs/tiny/policy
    python train_policy.py --preset llama                    # 4-bit Llama-3.1-8B
    python train_policy.py --algorithm rft --run runs/rft --trajectories FILE
    accelerate launch --num_processes 2 train_policy.py ...  # data parallel on two GPUs

At each state (a dialogue so far, o), stage 2 ranked up to 16 candidate messages by their advantage
A_θ(o, a, c). A pair is a random message of the better half, a+, and one of the worse half, a−; four
pairs per state. On these single messages the agent is trained by DPO, without c (paper, section
4.2; log-probs are sums over the tokens of a message):

    (3)  J(φ) = −log σ( β′ log π_φ(a+|o)/π_ref(a+|o) − β′ log π_φ(a−|o)/π_ref(a−|o) ) + w · NLL(a+)

NLL is the mean of −log π_φ over the tokens of a+. A step takes the mean of (3) over its pairs.

How to choose β′ and w for another model (the paper has 0.1 and 0.01): the gradient of a pair fades
once its margin, the difference of the two log-ratios, passes about 3/β′. Keep this below the nats
of a message (−log π_ref), which the plan prints. Otherwise the chosen messages become unlikely too
(likelihood displacement). If log_ratio/chosen in the log falls far below 0, raise w. A message of
the embedded model has 10 nats; one of Llama-3.1-8B probably 30 to 100, which suits β′ = 0.1.

Two baselines need no critic. `multi-turn-dpo` is (3) with all agent messages of a trajectory τ+ as
a+, and those of a τ− of the same task with a lower reward as a−. `rft`, rejection fine-tuning,
imitates the agent's messages of the successful trajectories, all L tokens of a τ with r(τ) = 1:

    (4)  J(φ) = −1/L Σ_l log π_φ(a^l | o, a^<l)

Reads RUN/preferences.jsonl, which holds no c (baselines: RUN/trajectories.jsonl; their prompts are
the dialogue alone). Writes RUN/policy/ (a PEFT adapter), RUN/policy_log.jsonl (one line per step)
and RUN/policy_ref_logps.jsonl (log π_ref, a cache). Repeat the command to resume.
"""
import colbench  # noqa: F401  isort: skip (first: libraries read variables while they are imported)
import argparse
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from colbench.env.data import load_trajectories, of_first_tasks, state_line
from colbench.env.dialogue import whole_dialogue
from colbench.env.flags import (at_least_one, parse_flags, print_settings, refuse_unused,
                                script_parser)
from colbench.lm.adapters import adapters_off, add_lora, training_mode
from colbench.lm.load import context_length, load_model, load_tokenizer, prepare_machine
from colbench.lm.logps import Tree, dialogue_tree, message_logps, pack, tree_tokens
from colbench.lm.tokens import encode_dialogue, end_of_turn, message_ids
from colbench.run.errors import UserError, run_main
from colbench.run.files import read_jsonl, seed_of
from colbench.run.settings import next_step
from colbench.train.loop import (DIVERGED, OUT_OF_MEMORY, StepLog, add_training_flags,
                                 load_checkpoint, save_checkpoint, save_trained)
from colbench.train.ref_logps import cached_ref_logps
from colbench.train.start import is_trained, linear_schedule, start_accelerator, training_plan

PRESETS = {
    "tiny": dict(  # the embedded model on the bundled mini benchmark, on a CPU
        model="tiny", load_in_4bit=False, lora_rank=32, gradient_checkpointing=False,
        learning_rate=1e-3, epochs=2, batch_size=32,  # pairs per step
        beta=1.0, nll_weight=1.0,  # β′ and w of (3)
        pairs_per_task=4,  # multi-turn DPO: at most; 0: all
        tokens_per_step=384, max_tokens=1024),  # in one forward pass; of a pair with its prompt
    "llama": dict(  # the paper's, except for 4-bit LoRA and its learning rate
        model="meta-llama/Llama-3.1-8B-Instruct", load_in_4bit=True, lora_rank=32,
        gradient_checkpointing=True,  # less memory, slower
        learning_rate=5e-5, epochs=1, batch_size=8,
        beta=0.1, nll_weight=0.01, pairs_per_task=0, tokens_per_step=8192, max_tokens=8192),
}
BASELINES = {  # what differs from the preset
    ("tiny", "multi-turn-dpo"): dict(batch_size=8, learning_rate=5e-4, beta=0.1, nll_weight=0.3),
    ("tiny", "rft"): dict(batch_size=8, learning_rate=1e-3, epochs=6),
}


# ---- formulas

def policy_loss(chosen_logps: torch.Tensor, rejected_logps: torch.Tensor,
                ref_chosen_logps: torch.Tensor, ref_rejected_logps: torch.Tensor,
                beta: float, nll_weight: float):
    """(3) for one pair a+, a−: log-probs of their tokens under π_φ and π_ref, each (L,).

    Returns (loss, β′ log-ratio of a+, β′ log-ratio of a−); the latter are DPO's implicit rewards.
    """
    chosen_reward = beta * (chosen_logps - ref_chosen_logps).sum()
    rejected_reward = beta * (rejected_logps - ref_rejected_logps).sum()
    reward_margin = chosen_reward - rejected_reward
    nll = -chosen_logps.mean()
    loss = -F.logsigmoid(reward_margin) + nll_weight * nll
    return loss, chosen_reward, rejected_reward


def imitation_loss(chosen_logps: torch.Tensor) -> torch.Tensor:
    """(4) for one successful trajectory: log-probs of all agent tokens, (L,) -> scalar."""
    return -chosen_logps.mean()


def policy_pairs(advantages: list[float], rng: random.Random, n: int) -> list[tuple[int, int]]:
    """Up to n random pairs (number of a+, number of a−) of one state's candidates.

    a+ is from the better half, a− from the worse; the middle one of an odd number is in neither.
    """
    ranked = sorted(range(len(advantages)), key=lambda k: -advantages[k])
    half = len(ranked) // 2
    top, bottom = ranked[:half], ranked[len(ranked) - half:]
    pairs = [(a, b) for a in top for b in bottom]
    return rng.sample(pairs, min(n, len(pairs)))


def trajectory_pairs(trajectories: list[dict], pairs_per_task: int, seed: int):
    """Pairs (number of τ+, number of τ−) of one task with r(τ+) > r(τ−). As in train_critic.py.

    At most pairs_per_task per task, drawn at random; 0: all."""
    by_task = {}
    for number, trajectory in enumerate(trajectories):
        by_task.setdefault(trajectory["id"], []).append(number)
    pairs = []
    for task, numbers in by_task.items():
        reward = {number: trajectories[number]["reward"] for number in numbers}
        of_task = [(a, b) for a in numbers for b in numbers if reward[a] > reward[b]]
        random.Random(seed_of(seed, task, "pairs")).shuffle(of_task)
        pairs += of_task[:pairs_per_task or None]
    return pairs


# ---- training

@dataclass
class Example:
    """Messages that one forward pass computes, and the pairs among them."""
    trees: list[Tree]  # a state: a prompt and messages after it; baselines: whole dialogues
    pairs: list[tuple[list[int], list[int]]]  # indices of a+ and a− among the messages of `trees`
    tokens: int  # of all trees
    ref_logps: list | None = None  # log π_ref: per message (L,)


def batch_of(examples: list[Example], step: int, args, accelerator):
    """(this process's examples of a step, number of pairs in the whole batch). Seeded order."""
    size = args.examples_per_step
    epoch, index = divmod(step, math.ceil(len(examples) / size))
    rng = random.Random(seed_of(args.seed, "policy", epoch))
    batch = rng.sample(examples, len(examples))[index * size:(index + 1) * size]
    n_pairs = sum(len(example.pairs) for example in batch)
    return batch[accelerator.process_index::accelerator.num_processes], n_pairs


def pair_loss(args, example: Example, pair: tuple, logps: list[torch.Tensor]):
    """(the loss of a pair, {name in the log: value}). logps: per message of the example (L,)."""
    chosen, rejected = pair
    chosen_logps = torch.cat([logps[k] for k in chosen])
    if args.algorithm == "rft":
        return imitation_loss(chosen_logps), {"logps/chosen": chosen_logps.sum()}
    rejected_logps = torch.cat([logps[k] for k in rejected])
    ref_chosen_logps = torch.cat([example.ref_logps[k] for k in chosen])
    ref_rejected_logps = torch.cat([example.ref_logps[k] for k in rejected])
    loss, chosen_reward, rejected_reward = policy_loss(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps,
        args.beta, args.nll_weight)
    chosen_log_ratio = chosen_logps.sum() - ref_chosen_logps.sum()
    rejected_log_ratio = rejected_logps.sum() - ref_rejected_logps.sum()
    return loss, {
        "margin": chosen_log_ratio - rejected_log_ratio,  # nats, without β′
        "rewards/accuracies": chosen_log_ratio > rejected_log_ratio,
        "rewards/chosen": chosen_reward, "rewards/rejected": rejected_reward,
        "rewards/margins": chosen_reward - rejected_reward,
        "logps/chosen": chosen_logps.sum(), "logps/rejected": rejected_logps.sum(),
        "log_ratio/chosen": chosen_log_ratio / len(chosen),  # nats per message
        "log_ratio/rejected": rejected_log_ratio / len(rejected)}


def train(args, accelerator, model, tokenizer, examples: list[Example], nats) -> None:
    """Minimise (3) or (4) with AdamW. Writes RUN/policy. nats: as in StepLog."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)
    n_steps = args.epochs * math.ceil(len(examples) / args.examples_per_step)
    schedule = linear_schedule(optimizer, n_steps)  # 10 % warm-up, then down to 0
    data = seed_of([[e.trees, e.pairs] for e in examples])  # resume on the same data only
    output = args.policy
    first_step = load_checkpoint(output, model, optimizer, schedule, args, data)
    training_plan(accelerator, args, output, model, examples, n_steps, first_step, nats)
    training_mode(model)
    bar = tqdm(range(first_step, n_steps), initial=first_step, total=n_steps, desc=output.name,
               disable=not accelerator.is_main_process)
    log = StepLog(accelerator, output, bar, first_step, nats)

    for step in bar:
        batch, n_pairs = batch_of(examples, step, args, accelerator)
        pair_weight = accelerator.num_processes / n_pairs  # processes are averaged below
        for indices in pack([example.tokens for example in batch], args.tokens_per_step):
            micro_batch = [batch[k] for k in indices]  # at most tokens_per_step in a forward pass
            trees = [tree for example in micro_batch for tree in example.trees]
            with accelerator.autocast():
                outputs = iter(message_logps(model, trees))  # per tree a list of (L,)
            total = 0.0
            for example in micro_batch:
                logps = [message for _ in example.trees for message in next(outputs)]
                for pair in example.pairs:
                    loss, metrics = pair_loss(args, example, pair, logps)
                    total = total + pair_weight * loss
                    log.add(example.tokens / len(example.pairs), loss=loss, **metrics)
            accelerator.backward(total)

        for parameter in trained:  # the mean over the processes
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = accelerator.reduce(parameter.grad, reduction="mean")
        grad_norm = accelerator.clip_grad_norm_(trained, max_norm=1.0).item()
        means = log.means()  # of loss and metrics, over the pairs of all processes
        if math.isfinite(means["loss"]) and math.isfinite(grad_norm):
            optimizer.step()  # otherwise this batch is skipped
        learning_rate = schedule.get_last_lr()[0]
        schedule.step()
        optimizer.zero_grad()

        log.write(step, means, grad_norm, learning_rate)
        diverged = log.skipped_in_a_row == 5
        if diverged or (step + 1) % args.save_every == 0:
            save_checkpoint(accelerator, output, model, optimizer, schedule, step + 1, data)
        if diverged:
            raise UserError(f"step {step}: {DIVERGED}")
    save_trained(accelerator, output, model, tokenizer, vars(args))


# ---- loading

def load_states(args, tokenizer) -> list[Example]:
    """One example per state: the prompt, computed once, and the messages that are in a pair."""
    rows = [row for row in read_jsonl(args.preferences, state_line) if row["candidates"]]
    end_id = end_of_turn(tokenizer)
    examples, too_long = [], 0
    for row in rows:
        rng = random.Random(seed_of(args.seed, row["id"], row["sample"], row["turn"], "pairs"))
        pairs = policy_pairs(row["advantages"], rng, args.pairs_per_state)
        prompt, _ = encode_dialogue(tokenizer, row["messages"])
        tokens = {k: message_ids(tokenizer, row["candidates"][k], end_id)
                  for pair in pairs for k in pair}
        room = args.max_tokens - len(prompt)
        fitting = [(a, b) for a, b in pairs if len(tokens[a]) + len(tokens[b]) <= room]
        too_long += len(pairs) - len(fitting)
        if not fitting:
            continue
        used = sorted({k for pair in fitting for k in pair})  # other candidates are not computed
        tree = Tree(prompt, [], [tokens[k] for k in used])
        pairs = [([used.index(a)], [used.index(b)]) for a, b in fitting]
        examples.append(Example([tree], pairs, tree_tokens(tree)))
    left_out = f"{too_long} left out for more than {args.max_tokens} tokens"
    if not examples:
        raise UserError(f"{args.preferences}: no pair to learn from in {len(rows)} states with "
                        f"candidates; {left_out} (--max-tokens)")
    n_pairs = sum(len(example.pairs) for example in examples)
    print(f"{n_pairs} pairs at {len(examples)} of {len(rows)} states; {left_out}")
    return examples


def load_baseline(args, environment, tokenizer) -> list[Example]:
    """Multi-turn DPO: one example per pair of trajectories. rft: one per successful trajectory."""
    everything = load_trajectories(args.trajectories, environment.check_task)
    everything = of_first_tasks(everything, args.max_trajectories)
    trajectories = [trajectory for trajectory in everything if "reward" in trajectory]
    if args.algorithm == "rft":
        groups = [(k,) for k, trajectory in enumerate(trajectories) if trajectory["reward"] == 1]
    else:
        groups = trajectory_pairs(trajectories, args.pairs_per_task, args.seed)
    trees = {}
    for number in {number for group in groups for number in group}:
        messages = whole_dialogue(trajectories[number], environment.prompt)
        trees[number] = dialogue_tree(tokenizer, messages)
    examples = []
    for group in groups:
        own_trees = [trees[number] for number in group]
        sizes = [tree_tokens(tree) for tree in own_trees]
        if max(sizes) <= args.max_tokens:
            n_chosen = len(own_trees[0].spans)  # agent messages of τ+
            n_messages = sum(len(tree.spans) for tree in own_trees)
            pair = list(range(n_chosen)), list(range(n_chosen, n_messages))
            examples.append(Example(own_trees, [pair], sum(sizes)))
    left_out = f"{len(groups) - len(examples)} left out for more than {args.max_tokens} tokens"
    if not examples:
        raise UserError(f"{args.trajectories}: nothing to learn from in {len(trajectories)} scored "
                        f"trajectories; {left_out} (--max-tokens). rft needs a reward of 1, "
                        "multi-turn-dpo a task with different rewards")
    print(f"{len(examples)} examples for {args.algorithm}; {left_out}")
    return examples


def add_ref_logps(args, accelerator, examples: list[Example], model):
    """Fill in ref_logps. Returns the mean −log π_ref of a message, and of one side of a pair."""
    def base_logps(trees):  # log π_ref: adapters off, or all weights before the first step
        with torch.no_grad(), accelerator.autocast(), adapters_off(model):
            return message_logps(model, trees)

    path = args.policy.with_name("policy_ref_logps.jsonl")
    trees = [tree for example in examples for tree in example.trees]
    ref_logps = iter(cached_ref_logps(accelerator, path, model, trees, args.tokens_per_step,
                                      base_logps))
    for example in examples:
        example.ref_logps = [message for _ in example.trees for message in next(ref_logps)]
    nats = [-logps.sum().item() for example in examples for logps in example.ref_logps]
    if args.algorithm == "sweet":  # a side is a message
        return sum(nats) / len(nats), sum(nats) / len(nats)
    return sum(nats) / len(nats), sum(nats) / (2 * len(examples))  # a side is a trajectory


def main():
    prepare_machine()
    args, environment = parse_args()
    accelerator = start_accelerator(args.policy)
    if is_trained(args.policy, args, "evaluate.py"):
        return
    tokenizer = load_tokenizer(args.model)
    args.max_tokens = min(args.max_tokens, context_length(args.model))
    if args.algorithm == "sweet":
        examples = load_states(args, tokenizer)
    else:
        examples = load_baseline(args, environment, tokenizer)
    model = load_model(args.model, args.load_in_4bit, accelerator.device)
    torch.manual_seed(args.seed)  # LoRA's A matrices start at random
    model = add_lora(model, args.lora_rank, args.gradient_checkpointing)
    nats = None
    if args.algorithm != "rft":
        nats = add_ref_logps(args, accelerator, examples, model)
    train(args, accelerator, model, tokenizer, examples, nats)
    accelerator.end_training()
    if accelerator.is_main_process:
        print(f"{args.policy}: trained; {next_step('evaluate.py', args)}")


def parse_args():
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--algorithm", choices=("sweet", "multi-turn-dpo", "rft"), default="sweet",
                       help="(3) on ranked candidates, (3) on pairs of trajectories, or (4)")
    algorithm = first.parse_known_args()[0].algorithm  # the defaults of other flags depend on it
    presets = {preset: settings | BASELINES.get((preset, algorithm), {})
               for preset, settings in PRESETS.items()}
    parser, environment = script_parser(__doc__, "train_policy", presets, first)
    parser.add_argument("--preferences", type=Path, help="input (default: RUN/preferences.jsonl)")
    parser.add_argument("--trajectories", type=Path,
                        help="input of the baselines (default: RUN/trajectories.jsonl)")
    group = parser.add_argument_group("objective")
    group.add_argument("--beta", type=float, help="β′ of (3), see above; 0 only imitates a+")
    group.add_argument("--nll-weight", type=float, help="w of (3), the weight of NLL(a+)")
    group.add_argument("--pairs-per-state", type=int, default=4, help="maximum per state")
    group.add_argument("--pairs-per-task", type=int, help="multi-turn DPO: maximum; 0: all")
    group.add_argument("--max-trajectories", type=int, default=0,
                       help="baselines: use the first N; 0: all")
    add_training_flags(parser)
    environment.add_flags(parser, "train_policy")
    args, given = parse_flags(parser)
    unused = {"sweet": "trajectories pairs_per_task max_trajectories",
              "multi-turn-dpo": "preferences pairs_per_state",
              "rft": "preferences pairs_per_state pairs_per_task beta nll_weight"}
    refuse_unused(given, f"--algorithm {args.algorithm}", unused[args.algorithm])
    at_least_one(args, "save_every batch_size epochs tokens_per_step max_tokens pairs_per_state")
    if args.beta < 0 or args.beta == args.nll_weight == 0:
        raise UserError(f"--beta {args.beta:g}: must be above 0, or 0 with --nll-weight above 0")
    args.examples_per_step = args.batch_size
    if args.algorithm == "sweet":  # an example has pairs_per_state pairs, which stay together
        args.examples_per_step = max(1, args.batch_size // args.pairs_per_state)
    args.trajectories = args.trajectories or Path(args.run) / "trajectories.jsonl"
    args.preferences = args.preferences or Path(args.run) / "preferences.jsonl"
    args.policy = Path(args.run) / "policy"
    print_settings(parser, args)
    return args, environment


if __name__ == "__main__":
    run_main(main, out_of_memory=OUT_OF_MEMORY)
