"""Stage 3 of SWEET-RL: train the agent, which never sees the reference, on what the critic prefers.

    python train_policy.py                                   # embedded default: runs/tiny/policy
    python train_policy.py --preset llama                    # 4-bit Llama-3.1-8B; PRESETS says what differs
    python train_policy.py --algorithm rft --run runs/rft --trajectories runs/tiny/trajectories.jsonl
    accelerate launch --num_processes 2 train_policy.py ...  # data parallel, on two GPUs

At each state (a dialogue so far, o) up to 16 candidate messages are ranked by their advantage A_θ(o, a, c). A
pair is a random one of the better half, a+, over a random one of the worse half, a−; four pairs a state. Then
DPO on single turns, without c (paper, section 4.2; log-probs are sums over the tokens of a message):

    (3)  J(φ) = −log σ( β′ log π_φ(a+|o)/π_ref(a+|o) − β′ log π_φ(a−|o)/π_ref(a−|o) ) + w · NLL(a+)

with w = 0.01 in the paper, NLL a mean over tokens. How to choose β′ and w for another model: the plan prints
how many nats (−log π_ref) a message has. (3) stops pulling at a margin of about 3/β′ nats, which should be
less than that: else it goes on until the chosen messages have become unlikely too (likelihood displacement).
If log_ratio/chosen in the log falls far below 0 all the same, raise w; a line warns of it. Messages of the
embedded model have 10 nats, of Llama-3.1-8B probably 30 to 100, to which the paper's β′ = 0.1 belongs.

The baselines need no critic. `multi-turn-dpo` is (3) with all messages of the agent in a trajectory τ+ of
higher reward as a+, those of a τ− of the same task as a−. `rft`, rejection fine-tuning, is NLL on the agent's
messages of successful ones:

    (4)  J(φ) = −1/L Σ_l log π_φ(a^l | o, a^<l),   all L agent tokens of a τ with r(τ) = 1

Reads RUN/preferences.jsonl, from which c was taken away (baselines: RUN/trajectories.jsonl; prompts hold the
dialogue alone). Writes RUN/policy/ (a PEFT adapter), RUN/policy_log.jsonl and RUN/policy_ref_logps.jsonl (log
π_ref, a cache). Interrupted, the same command goes on.
"""
import colbench  # noqa: F401  isort: skip (first: libraries read variables while they are imported)
import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F

from colbench.env.data import load_trajectories, of_first_tasks, state_line
from colbench.env.dialogue import MAX_TURNS, prompt_messages
from colbench.env.flags import at_least_one, parse_flags, refuse_unused, script_parser
from colbench.lm.adapters import adapters_off, add_lora
from colbench.lm.load import context_length, load_model, load_tokenizer, prepare_machine
from colbench.lm.logps import Tree, dialogue_tree, message_logps, pack, tree_tokens
from colbench.lm.tokens import encode_dialogue, end_of_turn, message_ids
from colbench.run.errors import UserError, run_main
from colbench.run.files import read_jsonl, seed_of
from colbench.run.settings import next_step
from colbench.train.loop import Training, add_training_flags, is_trained, start_accelerator
from colbench.train.ref_logps import cached_ref_logps

PRESETS = {
    "tiny": dict(  # the embedded model on the bundled mini benchmark
        model="tiny", load_in_4bit=False, lora_rank=32, gradient_checkpointing=False, learning_rate=1e-3,
        epochs=2, batch_size=32, beta=1.0, nll_weight=1.0, pairs_per_task=4,
        tokens_per_step=384, max_tokens=1024),
    "llama": dict(  # the paper's, but for 4-bit LoRA and its learning rate
        model="meta-llama/Llama-3.1-8B-Instruct", load_in_4bit=True, lora_rank=32,
        gradient_checkpointing=True,  # activations twice: less memory, slower
        learning_rate=5e-5, epochs=1, batch_size=8, beta=0.1, nll_weight=0.01,
        pairs_per_task=0, tokens_per_step=8192, max_tokens=8192),
}
BASELINES = {("tiny", "multi-turn-dpo"): dict(batch_size=8, learning_rate=5e-4, beta=0.1, nll_weight=0.3),
             ("tiny", "rft"): dict(batch_size=8, learning_rate=1e-3, epochs=6)}


def policy_loss(chosen, rejected, ref_chosen, ref_rejected, beta: float, nll_weight: float):
    """(3) for a pair a+, a−: two messages at a state, or all messages of two trajectories. chosen, rejected:
    (L,) log-probs of their tokens under π_φ, ref_*: the same under π_ref. Returns (loss, β′ log-ratio of a+,
    that of a−); the latter two are DPO's implicit rewards."""
    reward_chosen = beta * (chosen - ref_chosen).sum()  # β′ [ log π_φ(a+|o) − log π_ref(a+|o) ]
    reward_rejected = beta * (rejected - ref_rejected).sum()  # β′ [ log π_φ(a−|o) − log π_ref(a−|o) ]
    margin, nll = reward_chosen - reward_rejected, -chosen.mean()
    loss = -F.logsigmoid(margin) + nll_weight * nll
    return loss, reward_chosen, reward_rejected


def policy_pairs(advantages: list[float], rng: random.Random, n: int) -> list[tuple[int, int]]:
    """n random pairs (chosen, rejected) of candidate numbers at one state, better half over worse half; fewer
    if it has fewer."""
    ranked = sorted(range(len(advantages)), key=lambda k: -advantages[k])
    half = len(ranked) // 2
    top, bottom = ranked[:half], ranked[len(ranked) - half:]
    pairs = [(a, b) for a in top for b in bottom]
    return rng.sample(pairs, min(n, len(pairs)))


def trajectory_pairs(trajectories: list[dict], pairs_per_task: int, seed: int):
    """[(index of τ+, index of τ−)] for multi-turn DPO: all or some of the pairs of a task with r(τ+) > r(τ−).
    As in train_critic.py."""
    by_task = {}
    for index, trajectory in enumerate(trajectories):
        by_task.setdefault(trajectory["id"], []).append(index)
    pairs = []
    for task, indices in by_task.items():
        reward = {index: trajectories[index]["reward"] for index in indices}
        of_task = [(a, b) for a in indices for b in indices if reward[a] > reward[b]]
        random.Random(seed_of(seed, task, "pairs")).shuffle(of_task)
        pairs += of_task[:pairs_per_task or None]
    return pairs


def pair_loss(args, chosen, rejected, ref_chosen, ref_rejected, n_chosen, n_rejected):
    """(3) and what is logged of it, for a pair of messages, or of trajectories of so many. All (L,)."""
    loss, reward_chosen, reward_rejected = policy_loss(
        chosen, rejected, ref_chosen, ref_rejected, args.beta, args.nll_weight)
    chosen, rejected = chosen.sum(), rejected.sum()
    ratio_chosen, ratio_rejected = chosen - ref_chosen.sum(), rejected - ref_rejected.sum()
    return loss, {"rewards/accuracies": ratio_chosen > ratio_rejected, "rewards/chosen": reward_chosen,
                  "rewards/rejected": reward_rejected, "rewards/margins": reward_chosen - reward_rejected,
                  "margin": ratio_chosen - ratio_rejected,  # without β′, as in the critic's log
                  "log_ratio/chosen": ratio_chosen / n_chosen,  # a message; a fall is displacement
                  "log_ratio/rejected": ratio_rejected / n_rejected,
                  "logps/chosen": chosen, "logps/rejected": rejected}


def imitation_loss(args, chosen, *_):
    """(4) for one successful trajectory, chosen: (L,)."""
    return -chosen.mean(), {"logps/chosen": chosen.sum()}


def joined(logps, numbers):
    """The (L,) log-probs of the tokens of some messages, one behind the other; None for none."""
    return torch.cat([logps[k] for k in numbers]) if logps and numbers else None


def train(args, accelerator, model, tokenizer, units):
    """The loop: a unit is a state with its pairs (or a pair of trajectories, or one). Writes RUN/policy."""
    def reference_logps(trees):  # π_ref: the weights with adapters off, or all weights before the first step
        with torch.no_grad(), accelerator.autocast(), adapters_off(model):
            return message_logps(model, trees)

    loss_of = imitation_loss if args.algorithm == "rft" else pair_loss
    nats = None
    if args.algorithm != "rft":  # log π_ref, kept on disk: a list over the messages of a unit of (L,)
        path = args.policy.with_name("policy_ref_logps.jsonl")
        trees = [tree for unit in units for tree in unit["trees"]]
        ref = iter(cached_ref_logps(accelerator, path, model, trees, args.tokens_per_step, reference_logps))
        for unit in units:
            unit["ref_logps"] = [logps for _ in unit["trees"] for logps in next(ref)]
        messages = [-logps.sum().item() for unit in units for logps in unit["ref_logps"]]
        compared = len(messages) if args.algorithm == "sweet" else 2 * len(units)  # messages, or trajectories
        nats = sum(messages) / len(messages), sum(messages) / compared  # −log π_ref of one, on average
    sizes = [sum(map(tree_tokens, unit["trees"])) for unit in units]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)
    pairs_a_unit = args.pairs_per_state if args.algorithm == "sweet" else 1  # those of a state stay together
    training = Training(accelerator, args, args.policy, model, optimizer,
                        weights=[len(unit["pairs"]) for unit in units], tokens=sum(sizes),
                        per_step=max(1, args.batch_size // pairs_a_unit), unit=f"{args.batch_size} pairs",
                        nats=nats, data=seed_of([[unit["trees"], unit["pairs"]] for unit in units]))
    for step in training.steps():
        batch, weight = training.batch(step)  # this process's units; a pair's weight in the mean
        for group in pack([sizes[k] for k in batch], args.tokens_per_step):  # what fits into one forward pass
            group = [batch[place] for place in group]
            with accelerator.autocast():
                # per tree a list over messages of (L,); prompt and distinct messages are computed once
                logps = iter(message_logps(model, [tree for k in group for tree in units[k]["trees"]]))
            total = 0.0
            for k in group:
                messages, ref = [m for _ in units[k]["trees"] for m in next(logps)], units[k].get("ref_logps")
                for a, b in units[k]["pairs"]:  # numbers of the messages: one each, or a whole τ's
                    chosen, rejected = joined(messages, a), joined(messages, b)  # under π_φ
                    before = joined(ref, a), joined(ref, b)  # under π_ref
                    loss, row = loss_of(args, chosen, rejected, *before, len(a), len(b))
                    total = total + weight * loss
                    training.log.add(sizes[k] / len(units[k]["pairs"]), loss=loss, **row)
            accelerator.backward(total)
        if training.clip(1.0):  # False: a NaN or an infinity somewhere, this step is left out
            optimizer.step()
        training.end_step(step)  # learning rate, log line, checkpoint
    training.save(tokenizer)
    accelerator.end_training()
    if accelerator.is_main_process:
        print(f"{args.policy}: learned by {args.algorithm} from {sum(training.weights)} examples")
        print(next_step("evaluate.py", args))


def load_states(args, _, tokenizer) -> list[dict]:
    """States with pairs: {"trees": [a prompt with its distinct messages as leaves], "pairs": [([number of
    a+], [number of a−]), ...]}; the numbers are those of the messages in message_logps' order."""
    rows = [row for row in read_jsonl(args.preferences, state_line) if row["candidates"]]
    states, end_id, too_long = [], end_of_turn(tokenizer), 0
    for row in rows:
        rng = random.Random(seed_of(args.seed, row["id"], row["sample"], row["turn"], "pairs"))
        pairs = policy_pairs(row["advantages"], rng, args.pairs_per_state)
        prompt, _ = encode_dialogue(tokenizer, row["messages"])
        used = {k for pair in pairs for k in pair}
        leaves = {k: message_ids(tokenizer, row["candidates"][k], end_id) for k in used}
        room = args.max_tokens - len(prompt)
        fitting = [pair for pair in pairs if sum(len(leaves[k]) for k in {*pair}) <= room]
        too_long += len(pairs) - len(fitting)
        used = sorted({k for pair in fitting for k in pair})
        number = {k: i for i, k in enumerate(used)}
        if fitting:
            states.append({"trees": [Tree(prompt, [], [leaves[k] for k in used])],
                           "pairs": [([number[a]], [number[b]]) for a, b in fitting]})
    if not states:
        raise UserError(f"{args.preferences}: no pair to learn from: {len(rows)} states with candidates, "
                        f"none with two that fit into --max-tokens {args.max_tokens}")
    print(f"{sum(len(s['pairs']) for s in states)} pairs at {len(states)} of {len(rows)} states; "
          f"{too_long} left out for their length")
    return states


def load_baseline(args, environment, tokenizer) -> list[dict]:
    """Multi-turn DPO: {"trees": [τ+, τ−], "pairs": [(numbers of τ+'s agent messages, numbers of τ−'s)]} for
    each pair. Rejection fine-tuning: {"trees": [τ], "pairs": [(numbers of τ's agent messages, [])]} for each
    successful τ."""
    everything = load_trajectories(args.trajectories, environment.check_task)
    trajectories = [t for t in of_first_tasks(everything, args.max_trajectories) if "reward" in t]
    if args.algorithm == "rft":
        groups = [(i,) for i, t in enumerate(trajectories) if t["reward"] == 1]
    else:
        groups = trajectory_pairs(trajectories, args.pairs_per_task, args.seed)
    trees = {}
    for i in sorted({i for group in groups for i in group}):
        system = trajectories[i].get("system", environment.prompt.replace("{max_turns}", str(MAX_TURNS)))
        trees[i] = dialogue_tree(tokenizer, prompt_messages(system, trajectories[i]["dialogue_history"]))
    units = []
    for group in groups:
        if all(tree_tokens(trees[i]) <= args.max_tokens for i in group):
            turns = [len(trees[i].spans) for i in group]
            pair = list(range(turns[0])), list(range(turns[0], sum(turns)))
            units.append({"trees": [trees[i] for i in group], "pairs": [pair]})
    if not units:
        what = "trajectory of reward 1" if args.algorithm == "rft" else "task with differing rewards"
        raise UserError(f"{args.trajectories}: nothing to learn from: no {what} within --max-tokens "
                        f"{args.max_tokens}, among {len(trajectories)} scored trajectories")
    print(f"{len(units)} {'trajectories' if args.algorithm == 'rft' else 'pairs'}; "
          f"{len(groups) - len(units)} left out for their length")
    return units


def main():
    prepare_machine()
    args, environment = parse_args()
    accelerator = start_accelerator(args.policy)
    if is_trained(args.policy, args, "evaluate.py"):
        return
    tokenizer = load_tokenizer(args.model)
    args.max_tokens = min(args.max_tokens, context_length(args.model))
    load = load_states if args.algorithm == "sweet" else load_baseline
    units = load(args, environment, tokenizer)
    model = load_model(args.model, args.load_in_4bit, accelerator.device)
    torch.manual_seed(args.seed)  # LoRA's A matrices start at random
    train(args, accelerator, add_lora(model, args.lora_rank, args.gradient_checkpointing), tokenizer, units)


def parse_args():
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--algorithm", choices=("sweet", "multi-turn-dpo", "rft"), default="sweet",
                       help="(3) on ranked candidates, (3) on pairs of trajectories, or (4)")
    algorithm = first.parse_known_args()[0].algorithm
    presets = {preset: known | BASELINES.get((preset, algorithm), {}) for preset, known in PRESETS.items()}
    parser, environment = script_parser(__doc__, "train_policy", presets, first)
    parser.add_argument("--preferences", type=Path, help="input (default: RUN/preferences.jsonl)")
    parser.add_argument("--trajectories", type=Path, help="the baselines' (default: RUN/trajectories.jsonl)")
    group = parser.add_argument_group("objective")
    group.add_argument("--beta", type=float, help="β′ of (3), see above; 0: a+ is imitated only")
    group.add_argument("--nll-weight", type=float, help="w of (3)")
    group.add_argument("--pairs-per-state", type=int, default=4, help="at most so many pairs of a state")
    group.add_argument("--pairs-per-task", type=int, help="multi-turn DPO: at most so many; 0: all")
    group.add_argument("--max-trajectories", type=int, default=0, help="baselines: the first so many; 0: all")
    add_training_flags(parser)
    environment.add_flags(parser, "train_policy")
    args, given = parse_flags(parser)
    unused = {"sweet": "trajectories pairs_per_task max_trajectories",
              "multi-turn-dpo": "preferences pairs_per_state",
              "rft": "preferences pairs_per_state pairs_per_task beta nll_weight"}
    refuse_unused(given, f"--algorithm {args.algorithm}", unused[args.algorithm])
    at_least_one(args, "save_every batch_size epochs tokens_per_step max_tokens pairs_per_state")
    if args.beta < 0 or args.beta == args.nll_weight == 0:
        raise UserError(f"--beta {args.beta:g}: β′ of (3) is above 0, or 0 with a --nll-weight above 0")
    args.preferences = args.preferences or Path(args.run) / "preferences.jsonl"
    args.trajectories = args.trajectories or Path(args.run) / "trajectories.jsonl"
    args.policy = Path(args.run) / "policy"
    return args, environment


if __name__ == "__main__":
    run_main(main, out_of_memory="lower --tokens-per-step (the batch stays what it is) or --max-tokens")
