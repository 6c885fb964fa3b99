"""Stage 2 of SWEET-RL: train the turn-level critic, which MAY see the hidden information c, and
rank the candidate messages with it.

    python train_critic.py                                   # embedded model: runs/tiny/critic
    python train_critic.py --preset llama                    # 4-bit Llama-3.1-8B
    accelerate launch --num_processes 2 train_critic.py ...  # data parallel on two GPUs

The critic is itself a language model. The advantage of a message is how much likelier the critic
finds it than the base model does, per token, when both read c in their prompt (paper, section 4.1;
o: the dialogue so far; a: the agent's message, L tokens with its end-of-turn token):

    (1)  A_θ(o, a, c) = 1/L Σ_l [ log π_θ(a^l | c, o, a^<l) − log π_ref(a^l | c, o, a^<l) ]

Only whole trajectories have a reward, so θ is learned from pairs of trajectories of one task with
r(τ+) > r(τ−), by the Bradley-Terry loss

    (2)  J(θ) = −log σ( β Σ_t A_θ(o_t+, a_t+, c) − β Σ_t A_θ(o_t−, a_t−, c) ) + w · NLL(τ+)

NLL is the mean of −log π_θ over the agent's tokens. A step takes the mean of (2) over its pairs.

How to choose β and w for another model (the paper has 0.1 and 0.01): the gradient of a pair fades
once its margin, the difference of the two sums, passes about 3/β. Keep 3/β below a trajectory's
Σ_t 1/L Σ_l −log π_ref, which the plan prints. Otherwise all messages become unlikely; long useless
ones lose least and outrank short useful ones. Raise w if log_ratio/chosen in the log falls below 0.

c enters through with_hidden_info (colbench/env/hidden_info.py), which appends it to the system
message: in load_examples to train, in advantages to rank. In rank, without_hidden_info drops the
task, which holds c, from what stage 3 reads.

Other critics (colbench/train/): `regression`, A_θ is a linear head on the message's mean last
hidden state, trained by (2) without NLL; `value`, the same head predicts success at every turn.
Without training: `untrained`, log-ratio of the base model with c to itself without; `random`, a
control; `judge`, the base model compares messages; `rollout`, dialogues are played to their end.

Reads RUN/trajectories.jsonl. Writes RUN/critic/ (a PEFT adapter), RUN/critic_log.jsonl (one line
per step), RUN/critic_ref_logps.jsonl (log π_ref, a cache) and RUN/preferences.jsonl (one line per
state: dialogue, candidates, advantages). Repeat the command to resume.
"""
import colbench  # noqa: F401  isort: skip (first: libraries read variables while they are imported)
import math
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from tqdm import tqdm

from colbench.env.data import load_trajectories, of_first_tasks
from colbench.env.dialogue import whole_dialogue
from colbench.env.flags import at_least_one, parse_flags, print_settings, script_parser
from colbench.env.hidden_info import with_hidden_info, without_hidden_info
from colbench.lm.adapters import adapters_off, add_lora, training_mode
from colbench.lm.load import context_length, load_model, load_tokenizer, prepare_machine
from colbench.lm.logps import Tree, dialogue_tree, message_logps, pack, tree_tokens
from colbench.run.errors import UserError, run_main
from colbench.run.files import append_jsonl, seed_of
from colbench.run.settings import next_step
from colbench.train.critics import (TRAINED, UNTRAINED, check_critic_flags, other_critic,
                                    per_candidate, state_key)
from colbench.train.heads import HEADS, head_loss, message_values, value_head
from colbench.train.loop import (DIVERGED, OUT_OF_MEMORY, StepLog, add_training_flags,
                                 load_checkpoint, save_checkpoint, save_trained)
from colbench.train.ref_logps import cached_ref_logps
from colbench.train.start import (begin_ranking, critic_to_do, linear_schedule, start_accelerator,
                                  training_plan)

PRESETS = {
    "tiny": dict(  # the embedded model on the bundled mini benchmark, on a CPU
        model="tiny", load_in_4bit=False, lora_rank=32, gradient_checkpointing=False,
        learning_rate=3e-4, epochs=2, batch_size=8,  # pairs per step
        beta=3.0, nll_weight=0.3,  # β and w of (2)
        pairs_per_task=6,  # at most; 0: all
        tokens_per_step=384, max_tokens=1024),  # in one forward pass; of one trajectory
    "llama": dict(  # the paper's, except for 4-bit LoRA with its learning rate, and β, w (above)
        model="meta-llama/Llama-3.1-8B-Instruct", load_in_4bit=True, lora_rank=32,
        gradient_checkpointing=True,  # less memory, slower
        learning_rate=5e-5, epochs=4, batch_size=8,
        beta=3.0, nll_weight=0.3, pairs_per_task=0, tokens_per_step=8192, max_tokens=8192),
}


# ---- formulas

def advantage(logps: torch.Tensor, ref_logps: torch.Tensor, length_norm: bool = True):
    """(1): mean log-ratio over the L tokens of a message. logps, ref_logps: (L,) -> scalar.

    evaluate.py and its report use mean_log_ratio in colbench/train/critics.py: change both."""
    log_ratio = logps - ref_logps
    if not length_norm:
        return log_ratio.sum()
    return log_ratio.mean()


def trajectory_score(logps: list, ref_logps: list, score: str = "turn-mean") -> torch.Tensor:
    """Σ_t A_θ(o_t, a_t, c) of (2). logps, ref_logps: lists over turns t of (L_t,) -> scalar.

    score: "turn-mean", or over all tokens "sum" (--no-length-norm), "trajectory-mean" (--official).
    """
    if score == "turn-mean":
        return sum(advantage(turn, ref_turn) for turn, ref_turn in zip(logps, ref_logps))
    return advantage(torch.cat(logps), torch.cat(ref_logps), score == "trajectory-mean")


def critic_loss(chosen_logps: list, rejected_logps: list, ref_chosen_logps: list,
                ref_rejected_logps: list, beta: float, nll_weight: float, score: str = "turn-mean"):
    """(2) for one pair: lists over turns t of (L_t,) -> (loss, Σ_t A(τ+), Σ_t A(τ−))."""
    chosen_score = trajectory_score(chosen_logps, ref_chosen_logps, score)
    rejected_score = trajectory_score(rejected_logps, ref_rejected_logps, score)
    nll = -torch.cat(chosen_logps).mean()  # over all agent tokens of τ+
    loss = -F.logsigmoid(beta * (chosen_score - rejected_score)) + nll_weight * nll
    return loss, chosen_score, rejected_score


def trajectory_pairs(trajectories: list[dict], pairs_per_task: int, seed: int,
                     chosen_at_least: float = 0.0) -> list[tuple[int, int]]:
    """Pairs (number of τ+, number of τ−) of one task with r(τ+) > r(τ−). As in train_policy.py.

    At most pairs_per_task per task, drawn at random; 0: all."""
    by_task = {}
    for number, trajectory in enumerate(trajectories):
        by_task.setdefault(trajectory["id"], []).append(number)
    pairs = []
    for task, numbers in by_task.items():
        reward = {number: trajectories[number]["reward"] for number in numbers}
        of_task = [(a, b) for a in numbers for b in numbers
                   if reward[a] > reward[b] and reward[a] >= chosen_at_least]
        random.Random(seed_of(seed, task, "pairs")).shuffle(of_task)
        pairs += of_task[:pairs_per_task or None]
    return pairs


# ---- training

@dataclass
class Example:
    """Trajectories that one forward pass computes, and the pairs among them."""
    numbers: tuple  # which trajectories of the file: τ+ and τ− (value critic: one)
    trees: list[Tree]  # of each, the token ids and the spans of the agent's messages
    rewards: list[float]
    pairs: list[tuple]  # (index of τ+, index of τ−) in `trees`; value critic: (index,)
    tokens: int  # of all trees
    ref_logps: list | None = None  # log π_ref: per trajectory a list over turns of (L_t,)


def batch_of(examples: list[Example], step: int, args, accelerator):
    """(this process's examples of a step, number of pairs in the whole batch). Seeded order."""
    size = args.examples_per_step
    epoch, index = divmod(step, math.ceil(len(examples) / size))
    rng = random.Random(seed_of(args.seed, "critic", epoch))
    batch = rng.sample(examples, len(examples))[index * size:(index + 1) * size]
    n_pairs = sum(len(example.pairs) for example in batch)
    return batch[accelerator.process_index::accelerator.num_processes], n_pairs


def pair_loss(args, example: Example, pair: tuple, turns: list):
    """(the loss of a pair, {name in the log: value}). turns: per trajectory a list of (L_t,)."""
    if args.critic in HEADS:
        return head_loss(args.critic, turns, pair, example.rewards, args.beta)
    chosen, rejected = pair
    ref_logps = example.ref_logps
    loss, chosen_score, rejected_score = critic_loss(
        turns[chosen], turns[rejected], ref_logps[chosen], ref_logps[rejected],
        args.beta, args.nll_weight, args.score)
    margin = chosen_score - rejected_score  # nats, without β
    metrics = {"margin": margin, "rewards/accuracies": chosen_score > rejected_score,
               "rewards/chosen": args.beta * chosen_score,
               "rewards/rejected": args.beta * rejected_score,
               "rewards/margins": args.beta * margin}
    for side, number in (("chosen", chosen), ("rejected", rejected)):
        logps = torch.cat(turns[number]).sum()
        log_ratio = logps - torch.cat(ref_logps[number]).sum()
        metrics[f"logps/{side}"] = logps
        metrics[f"log_ratio/{side}"] = log_ratio / len(turns[number])  # nats per message
    return loss, metrics


def train(args, accelerator, model, tokenizer, examples: list[Example], nats) -> None:
    """Minimise (2) with AdamW. Writes RUN/critic. nats: as in StepLog."""
    forward = message_values if args.critic in HEADS else message_logps
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)
    n_steps = args.epochs * math.ceil(len(examples) / args.examples_per_step)
    schedule = linear_schedule(optimizer, n_steps)  # 10 % warm-up, then down to 0
    data = seed_of([[e.trees, e.rewards] for e in examples])  # resume on the same data only
    output = args.critic_folder
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
                outputs = iter(forward(model, trees))  # per trajectory a list over turns of (L_t,)
            total = 0.0
            for example in micro_batch:
                turns = [next(outputs) for _ in example.trees]
                for pair in example.pairs:
                    loss, metrics = pair_loss(args, example, pair, turns)
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


# ---- ranking

def advantages(args, states: list[dict], tokenizer, model, base_logps) -> list[list[float]]:
    """A_θ(o, a, c) of every candidate of every state; [] for a state longer than --max-tokens."""
    without_c = [state["messages"] for state in states]
    with_c = [with_hidden_info(state["messages"], state["task"]["ground_truth"])
              for state in states]
    prompts = without_c if args.no_hidden_info else with_c
    ref_prompts = without_c if args.official else prompts
    candidates = [state["candidates"] for state in states]
    limits = args.max_tokens, args.tokens_per_step
    # per state a list over candidates of (L,)
    logps = per_candidate(partial(message_logps, model), tokenizer, prompts, candidates, *limits)
    ref_logps = per_candidate(base_logps, tokenizer, ref_prompts, candidates, *limits)
    return [[advantage(*pair, length_norm=not args.no_length_norm).item()
             for pair in zip(*of_state)] for of_state in zip(logps, ref_logps)]


def rank(args, accelerator, environment, score) -> None:
    """Append a line per unranked state to preferences.jsonl. score: states -> advantages."""
    states = begin_ranking(args, accelerator, environment)
    left_out = 0
    for start in tqdm(range(0, len(states), 16), desc="ranking", unit="16 states",
                      disable=not accelerator.is_main_process):
        chunk = states[start:start + 16]  # the processes share it
        mine = chunk[accelerator.process_index::accelerator.num_processes]
        with torch.no_grad(), accelerator.autocast():
            scores = score(mine)
        rows = [without_hidden_info(state) | {"advantages": a} for state, a in zip(mine, scores)]
        for row in sorted(gather_object(rows), key=state_key):  # any number of processes: one order
            if not row["advantages"]:
                row.update(candidates=[], left_out="longer than --max-tokens")
                left_out += 1
            if accelerator.is_main_process:
                append_jsonl(args.preferences, row)
    if accelerator.is_main_process:
        print(f"{args.preferences}: {len(states) - left_out} states ranked, {left_out} too long")
        print(next_step("train_policy.py", args))


# ---- loading

def load_examples(args, environment, tokenizer) -> list[Example]:
    """One example per pair of trajectories (value critic: per trajectory), without ref_logps."""
    everything = load_trajectories(args.trajectories, environment.check_task, scored=True)
    trajectories = [trajectory for trajectory in of_first_tasks(everything, args.max_trajectories)
                    if "reward" in trajectory]  # those without one failed
    rewards = [trajectory["reward"] for trajectory in trajectories]
    pairs = [(number,) for number in range(len(trajectories))]
    if args.critic != "value":
        chosen_at_least = 1.0 if args.official else 0.0
        pairs = trajectory_pairs(trajectories, args.pairs_per_task, args.seed, chosen_at_least)
    trees = {}
    for number in {number for pair in pairs for number in pair}:
        messages = whole_dialogue(trajectories[number], environment.prompt)
        if not args.no_hidden_info:
            messages = with_hidden_info(messages, trajectories[number]["task"]["ground_truth"])
        trees[number] = dialogue_tree(tokenizer, messages)
    examples = []
    for pair in pairs:
        own_trees = [trees[number] for number in pair]
        sizes = [tree_tokens(tree) for tree in own_trees]
        if max(sizes) <= args.max_tokens:
            indices = tuple(range(len(pair)))
            own_rewards = [rewards[number] for number in pair]
            examples.append(Example(pair, own_trees, own_rewards, [indices], sum(sizes)))
    left_out = f"{len(pairs) - len(examples)} left out for more than {args.max_tokens} tokens"
    if not examples:
        raise UserError(f"{args.trajectories}: no pair to learn from among {len(trajectories)} "
                        "trajectories: a pair is two of one task with different rewards "
                        f"(--official: one of 1); {left_out} (--max-tokens); collect more with a "
                        "larger --k or more tasks")
    print(f"{len(examples)} pairs of trajectories; {left_out}")
    return examples


def add_ref_logps(args, accelerator, examples: list[Example], base_model, base_logps):
    """Fill in ref_logps. Returns means: −log π_ref of a message, Σ_t 1/L Σ_l −log π_ref of a τ."""
    trees = {n: tree for e in examples for n, tree in zip(e.numbers, e.trees)}
    trees = dict(sorted(trees.items()))
    path = args.critic_folder.with_name("critic_ref_logps.jsonl")
    logps = cached_ref_logps(accelerator, path, base_model, list(trees.values()),
                             args.tokens_per_step, base_logps)
    ref_logps = dict(zip(trees, logps))
    for example in examples:
        example.ref_logps = [ref_logps[number] for number in example.numbers]
    messages = [-turn.sum().item() for turns in logps for turn in turns]
    zeros = [[torch.zeros_like(turn) for turn in turns] for turns in logps]
    scores = [trajectory_score(zero, turns, args.score).item() for zero, turns in zip(zeros, logps)]
    return sum(messages) / len(messages), sum(scores) / len(scores)


def main():
    prepare_machine()
    args, environment = parse_args()
    accelerator = start_accelerator(args.critic_folder)
    todo = critic_to_do(args, environment)  # "train" (and rank), "rank", or None
    if not todo:
        return
    if args.vision_critic:  # (2) on pictures
        from colbench.train.vision_critic import train_and_rank
        return train_and_rank(args, accelerator, environment, todo, trajectory_pairs, rank)
    tokenizer = load_tokenizer(args.model)
    args.max_tokens = min(args.max_tokens, context_length(args.model))
    examples = load_examples(args, environment, tokenizer) if todo == "train" else None
    adapter = str(args.critic_folder) if args.critic in TRAINED and todo == "rank" else None
    model = load_model(args.model, args.load_in_4bit, accelerator.device, adapter)
    if todo == "train":
        torch.manual_seed(args.seed)  # LoRA's A matrices start at random
        model = add_lora(model, args.lora_rank, args.gradient_checkpointing)
    if args.critic in HEADS:
        model.value_head = value_head(model, adapter)
    base_model = model  # with its adapters off; only full fine-tuning needs a second model
    if args.critic in TRAINED and not args.lora_rank:
        base_model = load_model(args.model, args.load_in_4bit, accelerator.device)

    def base_logps(trees):  # log π_ref
        with torch.no_grad(), accelerator.autocast(), adapters_off(base_model):
            return message_logps(base_model, trees)

    if todo == "train":
        nats = None
        if args.critic == "logprob":
            nats = add_ref_logps(args, accelerator, examples, base_model, base_logps)
        train(args, accelerator, model, tokenizer, examples, nats)
    model.eval()
    if args.critic == "logprob":
        rank(args, accelerator, environment,
             lambda states: advantages(args, states, tokenizer, model, base_logps))
    else:
        with other_critic(args, environment, tokenizer, model, base_logps) as score:
            rank(args, accelerator, environment, score)
    accelerator.end_training()


def parse_args():
    parser, environment = script_parser(__doc__, "train_critic", PRESETS)
    parser.add_argument("--trajectories", type=Path, help="input (default: RUN/trajectories.jsonl)")
    group = parser.add_argument_group("objective")
    group.add_argument("--critic", choices=TRAINED + UNTRAINED, default="logprob", help="see above")
    group.add_argument("--no-hidden-info", action="store_true", help="the critic does not see c")
    group.add_argument("--no-length-norm", action="store_true", help="(1) is a sum over tokens")
    group.add_argument("--official", action="store_true", help="like the released code: one mean "
                       "over a trajectory's tokens, no NLL, τ+ passes every test, π_ref ranks "
                       "without c")
    group.add_argument("--beta", type=float, help="β of (2), see above")
    group.add_argument("--nll-weight", type=float, help="w of (2), the weight of NLL(τ+)")
    group.add_argument("--pairs-per-task", type=int, help="maximum, drawn at random; 0: all")
    group.add_argument("--max-trajectories", type=int, default=0, help="use the first N; 0: all")
    add_training_flags(parser)
    environment.add_flags(parser, "train_critic")
    args, given = parse_flags(parser)
    check_critic_flags(args, given, environment)
    at_least_one(args, "save_every batch_size epochs tokens_per_step max_tokens")
    args.score = "sum" if args.no_length_norm else "turn-mean"  # which trajectory_score
    if args.official:
        args.nll_weight, args.score = 0.0, "trajectory-mean"
    args.examples_per_step = args.batch_size  # an example has one pair
    args.trajectories = args.trajectories or Path(args.run) / "trajectories.jsonl"
    args.critic_folder = Path(args.run) / "critic"
    args.preferences = Path(args.run) / "preferences.jsonl"
    print_settings(parser, args)
    return args, environment


if __name__ == "__main__":
    run_main(main, out_of_memory=OUT_OF_MEMORY)
