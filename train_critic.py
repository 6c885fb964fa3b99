"""Stage 2 of SWEET-RL: train the turn-level critic, which MAY see the hidden reference, and rank candidates.

    python train_critic.py                                   # embedded default, a minute: runs/tiny/critic
    python train_critic.py --preset llama                    # 4-bit Llama-3.1-8B; PRESETS says what differs
    accelerate launch --num_processes 2 train_critic.py ...  # data parallel, on two GPUs

The critic is a language model itself: the advantage of a message is how much likelier the critic finds it
than the base model does, per token, both reading the reference c in their prompt (paper, section 4.1; o: the
dialogue so far; a: a message, L tokens long with its end-of-turn token):

    (1)  A_θ(o, a, c) = 1/L Σ_l [ log π_θ(a^l | c, o, a^<l) − log π_ref(a^l | c, o, a^<l) ]

It is learned from whole trajectories only, Bradley-Terry on pairs of one task with r(τ+) > r(τ−):

    (2)  J(θ) = −log σ( β Σ_t A_θ(o_t+, a_t+, c) − β Σ_t A_θ(o_t−, a_t−, c) ) + w · NLL(τ+)

with β = 0.1 and w = 0.01 in the paper, NLL a mean over tokens. How to choose them for another model: a pair
stops pulling at a margin of about 3/β. This should be less than the messages of a trajectory hold, Σ_t of
−log π_ref a token, which the plan prints: else all messages become unlikely, long useless ones least of all,
which then outrank short useful ones. If log_ratio/chosen in the log falls far below 0 all the same, raise w;
a line warns of it.

c enters through one function, with_hidden_info in colbench/env/hidden_info.py, which appends it to the system
message: for training in load_pairs below, for ranking in colbench/train/ranking.py. There without_hidden_info
takes it away again, before a state is written for stage 3.

Other critics, by --critic: `regression`, A_θ = a linear head on the message's mean last hidden state,
trained by (2) without NLL; `value`, the same head as success probability, trained by binary cross-entropy
on every turn; and four that need no training: `untrained`, log-ratio of the base model with c to itself
without; `random`, numbers at random: what stage 3 does without a critic; `judge`, the base model is asked
which of two messages is better; `rollout`, the dialogue is played on from each candidate and the rewards
are averaged (colbench/train/judges.py).

Reads RUN/trajectories.jsonl. Writes RUN/critic/ (a PEFT adapter), RUN/critic_log.jsonl (a line a step),
RUN/critic_ref_logps.jsonl (log π_ref, a cache) and RUN/preferences.jsonl: a line a state with messages,
candidates and their advantages. Interrupted, the same command goes on.
"""
import colbench  # noqa: F401  isort: skip (first: libraries read variables while they are imported)
import random
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from colbench.env.data import load_trajectories, of_first_tasks
from colbench.env.dialogue import MAX_TURNS, prompt_messages
from colbench.env.flags import at_least_one, parse_flags, played_with, refuse_unused, script_parser
from colbench.env.hidden_info import with_hidden_info
from colbench.lm.adapters import adapters_off, add_lora
from colbench.lm.load import context_length, load_model, load_tokenizer, prepare_machine
from colbench.lm.logps import dialogue_tree, message_logps, message_means, pack, tree_tokens
from colbench.run.errors import UserError, run_main
from colbench.run.files import seed_of
from colbench.train.heads import value_head
from colbench.train.loop import Training, add_training_flags, start_accelerator
from colbench.train.ranking import TRAINED, UNTRAINED, critic_to_do, rank, score_candidates
from colbench.train.ref_logps import cached_ref_logps

PRESETS = {
    "tiny": dict(  # the embedded model on the bundled mini benchmark
        model="tiny", load_in_4bit=False, lora_rank=32, gradient_checkpointing=False, learning_rate=3e-4,
        epochs=2, batch_size=8, beta=3.0, nll_weight=0.3, pairs_per_task=6, tokens_per_step=384,
        max_tokens=1024),
    "llama": dict(  # the paper's, but for 4-bit LoRA with its learning rate, and β and w by the rule above
        model="meta-llama/Llama-3.1-8B-Instruct", load_in_4bit=True, lora_rank=32,
        gradient_checkpointing=True,  # activations twice: less memory, slower
        learning_rate=5e-5, epochs=4, batch_size=8, beta=3.0, nll_weight=0.3, pairs_per_task=0,
        tokens_per_step=8192, max_tokens=8192),
}


def advantage(logps: torch.Tensor, ref_logps: torch.Tensor, length_norm: bool = True) -> torch.Tensor:
    """(1): the mean log-ratio over the L tokens of a message, end-of-turn token included. Both (L,)."""
    return (logps - ref_logps).mean() if length_norm else (logps - ref_logps).sum()


def trajectory_score(logps, ref_logps, score: str = "turn-mean") -> torch.Tensor:
    """Σ_t A_θ(o_t, a_t, c) of (2), for lists over turns t of (L_t,) log-probs. By flag one sum
    (--no-length-norm) or one mean (--official) over all agent tokens of the trajectory."""
    if score == "turn-mean":
        return sum(advantage(turn, ref) for turn, ref in zip(logps, ref_logps))
    return advantage(torch.cat(logps), torch.cat(ref_logps), length_norm=score == "trajectory-mean")


def critic_loss(chosen, rejected, ref_chosen, ref_rejected, beta, nll_weight, score: str = "turn-mean"):
    """(2) for one pair τ+, τ−; each a list over turns t of (L_t,) log-probs. (loss, Σ_t A(τ+), Σ_t A(τ−))."""
    score_chosen = trajectory_score(chosen, ref_chosen, score)  # Σ_t A_θ(o_t+, a_t+, c)
    score_rejected = trajectory_score(rejected, ref_rejected, score)  # Σ_t A_θ(o_t−, a_t−, c)
    nll = -torch.cat(chosen).mean()  # over all agent tokens of τ+
    loss = -F.logsigmoid(beta * (score_chosen - score_rejected)) + nll_weight * nll
    return loss, score_chosen, score_rejected


def trajectory_pairs(trajectories: list[dict], pairs_per_task: int, seed: int, chosen_at_least: float = 0.0):
    """[(index of τ+, index of τ−)] for all or some of the pairs of one task with r(τ+) > r(τ−); r(τ+) is
    chosen_at_least or more. As in train_policy.py."""
    by_task = {}
    for index, trajectory in enumerate(trajectories):
        by_task.setdefault(trajectory["id"], []).append(index)
    pairs = []
    for task, indices in by_task.items():
        reward = {index: trajectories[index]["reward"] for index in indices}
        of_task = [(a, b) for a in indices for b in indices
                   if reward[a] > reward[b] and reward[a] >= chosen_at_least]
        random.Random(seed_of(seed, task, "pairs")).shuffle(of_task)
        pairs += of_task[:pairs_per_task or None]
    return pairs


def score_of(args) -> str:  # which trajectory_score the flags ask for
    return "sum" if args.no_length_norm else "trajectory-mean" if args.official else "turn-mean"


def losses(args, model, trajectories, ref_logps):
    """(what the critic gives for trees of trajectories, the loss of a pair from it), for the kind of critic.
    The loss: (scalar, {name in the log: value}). turns: of each trajectory a list over turns."""
    def bradley_terry(pair, turns):
        if args.critic == "logprob":
            ref = ref_logps[pair[0]], ref_logps[pair[1]]
            loss, chosen, rejected = critic_loss(*turns, *ref, args.beta, args.nll_weight, score_of(args))
        else:  # regression
            chosen, rejected = (sum(values) for values in turns)
            loss = -F.logsigmoid(args.beta * (chosen - rejected))
        row = {"margin": chosen - rejected, "rewards/accuracies": chosen > rejected,
               "rewards/chosen": args.beta * chosen, "rewards/rejected": args.beta * rejected,
               "rewards/margins": args.beta * (chosen - rejected)}
        if args.critic == "logprob":
            for side, messages, before in zip(("chosen", "rejected"), turns, ref):
                logps = row[f"logps/{side}"] = torch.cat(messages).sum()
                row[f"log_ratio/{side}"] = (logps - torch.cat(before).sum()) / len(messages)  # nats a message
        return loss, row

    def success_probability(pair, turns):  # V(o_t, a_t, c) of every turn against the success of the whole
        values = torch.stack(turns[0])
        success = torch.full_like(values, float(trajectories[pair[0]]["reward"] == 1))
        loss = F.binary_cross_entropy_with_logits(values, success)
        return loss, {"rewards/accuracies": ((values > 0) == (success > 0)).float().mean()}

    def by_head(trees):  # per trajectory a list over turns of scalars
        return [[model.value_head(mean)[0] for mean in tree] for tree in message_means(model, trees)]

    forward = partial(message_logps, model) if args.critic == "logprob" else by_head  # logps: (L_t,) a turn
    return forward, success_probability if args.critic == "value" else bradley_terry


def train(args, accelerator, model, reference, reference_logps, tokenizer, trajectories, pairs, trees):
    """The loop: batches of pairs in a seeded order, (2), AdamW. Writes RUN/critic."""
    ref_logps = nats = None
    if args.critic == "logprob":  # log π_ref, kept on disk: {trajectory: list over turns of (L_t,)}
        path, all_trees = args.critic_folder.with_name("critic_ref_logps.jsonl"), list(trees.values())
        found = cached_ref_logps(accelerator, path, reference, all_trees, args.tokens_per_step, reference_logps)
        ref_logps = dict(zip(trees, found))
        whole = [trajectory_score([0 * turn for turn in t], t, score_of(args)).item() for t in found]
        messages = [-turn.sum().item() for turns in found for turn in turns]
        nats = sum(messages) / len(messages), sum(whole) / len(whole)  # of a message; of τ as (2) counts
    forward, loss_of = losses(args, model, trajectories, ref_logps)
    sizes = [sum(tree_tokens(trees[i]) for i in pair) for pair in pairs]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)
    training = Training(accelerator, args, args.critic_folder, model, optimizer, weights=[1] * len(pairs),
                        per_step=args.batch_size, data=seed_of(pairs, trees), tokens=sum(sizes), nats=nats,
                        unit=f"{args.batch_size} of {len(pairs)} {examples(args)}")
    for step in training.steps():
        batch, weight = training.batch(step)  # this process's pairs, and what one weighs in the batch's mean
        for group in pack([sizes[k] for k in batch], args.tokens_per_step):  # what fits into one forward pass
            group = [batch[place] for place in group]
            with accelerator.autocast():
                turns = iter(forward([trees[i] for k in group for i in pairs[k]]))  # one row, no padding
            total = 0.0
            for k in group:
                loss, row = loss_of(pairs[k], [next(turns) for _ in pairs[k]])
                total = total + weight * loss
                training.log.add(sizes[k], loss=loss, **row)
            accelerator.backward(total)
        if training.clip(1.0):  # False: a NaN or an infinity somewhere, this step is left out
            optimizer.step()
        training.end_step(step)  # learning rate, log line, checkpoint
    training.save(tokenizer)


def examples(args) -> str:
    """What a batch holds, for people. The value function learns from single trajectories."""
    return "trajectories" if args.critic == "value" else "pairs"


def load_pairs(args, environment, tokenizer):
    """Trajectories, their pairs, and the tree (tokens, spans of the agent's turns) of each one in a pair."""
    everything = load_trajectories(args.trajectories, environment.check_task, scored=True)
    for trajectory in everything:
        trajectory.setdefault("system", environment.prompt.replace("{max_turns}", str(MAX_TURNS)))
    trajectories = [t for t in of_first_tasks(everything, args.max_trajectories) if "reward" in t]
    if args.critic == "value":
        pairs = [(index,) for index in range(len(trajectories))]
    else:
        pairs = trajectory_pairs(trajectories, args.pairs_per_task, args.seed, float(args.official))
    if not pairs:
        rewards = sorted({round(t["reward"], 3) for t in trajectories})
        wanted = ", one of 1 (--official)" * args.official
        raise UserError(f"{args.trajectories}: no pair to learn from: no task has two trajectories of "
                        f"different reward{wanted} ({len(trajectories)} trajectories, rewards {rewards[:5]})"
                        "; collect more with a larger --k or more tasks")
    trees = {}
    for index in sorted({index for pair in pairs for index in pair}):
        t = trajectories[index]
        messages = prompt_messages(t["system"], t["dialogue_history"])
        if not args.no_hidden_info:
            messages = with_hidden_info(messages, t["task"]["ground_truth"])  # the critic reads c
        trees[index] = dialogue_tree(tokenizer, messages)
    fitting = [pair for pair in pairs if all(tree_tokens(trees[index]) <= args.max_tokens for index in pair)]
    if not fitting:
        raise UserError(f"{args.trajectories}: every pair is longer than --max-tokens {args.max_tokens}")
    tasks = {trajectories[pair[0]]["id"] for pair in fitting}
    left_out = len(pairs) - len(fitting)
    print(f"{len(fitting)} {examples(args)} of {len(tasks)} tasks; {left_out} left out for their length")
    return trajectories, fitting, trees


def main():
    prepare_machine()
    args, environment = parse_args()
    accelerator = start_accelerator(args.critic_folder)
    todo = critic_to_do(args, environment)  # "train" and rank, "rank", or None; refuses another's run
    if not todo:
        return
    if args.vision_critic:
        from colbench.train.vision_critic import train_and_rank  # (2) on pictures
        return train_and_rank(args, accelerator, environment, trajectory_pairs, todo)
    tokenizer = load_tokenizer(args.model)
    args.max_tokens = min(args.max_tokens, context_length(args.model))
    data = load_pairs(args, environment, tokenizer) if todo == "train" else ()
    adapter = str(args.critic_folder) if args.critic in TRAINED and todo == "rank" else None
    model = load_model(args.model, args.load_in_4bit, accelerator.device, adapter)
    if todo == "train":
        torch.manual_seed(args.seed)  # LoRA's A matrices start at random
        model = add_lora(model, args.lora_rank, args.gradient_checkpointing)
    if args.critic in ("regression", "value"):
        model.value_head = value_head(model, adapter)
    # π_ref: the same weights with adapters off; only full fine-tuning needs a second copy
    reference = model
    if not args.lora_rank and args.critic in TRAINED:
        reference = load_model(args.model, args.load_in_4bit, accelerator.device)

    def reference_logps(trees):
        with torch.no_grad(), accelerator.autocast(), adapters_off(reference):
            return message_logps(reference, trees)

    if todo == "train":
        train(args, accelerator, model, reference, reference_logps, tokenizer, *data)
    model.eval()
    how = SimpleNamespace(**played_with(args, environment) | vars(args))  # rollouts: as the trajectories were
    with environment(how, args.run) if args.critic == "rollout" else nullcontext() as playing:
        rank(args, accelerator, environment, lambda states: score_candidates(
            how, states, tokenizer, model, reference_logps, advantage, playing))
    accelerator.end_training()  # the processes part here


def parse_args():
    parser, environment = script_parser(__doc__, "train_critic", PRESETS)
    parser.add_argument("--trajectories", type=Path, help="input (default: RUN/trajectories.jsonl)")
    group = parser.add_argument_group("objective")
    group.add_argument("--critic", choices=TRAINED + UNTRAINED, default="logprob", help="see above")
    group.add_argument("--no-hidden-info", action="store_true", help="the critic does not see c")
    group.add_argument("--no-length-norm", action="store_true", help="(1) is a sum, L times as large")
    group.add_argument("--official", action="store_true", help="as the released code: a trajectory's score "
                       "is one mean over its tokens, no NLL, τ+ passes every test, and π_ref ranks without c")
    group.add_argument("--beta", type=float, help="β of (2), see above")
    group.add_argument("--nll-weight", type=float, help="w of (2), the weight of NLL(τ+)")
    group.add_argument("--pairs-per-task", type=int, help="at most so many, drawn at random; 0: all")
    group.add_argument("--max-trajectories", type=int, default=0, help="the first so many; 0: all")
    add_training_flags(parser)
    environment.add_flags(parser, "train_critic")
    args, given = parse_flags(parser)
    if args.critic != "logprob":
        refuse_unused(given, f"--critic {args.critic}", "no_length_norm official nll_weight")
    if args.critic == "value":
        refuse_unused(given, "--critic value", "beta pairs_per_task")
    if args.critic in UNTRAINED:
        refuse_unused(given, f"--critic {args.critic}", "lora_rank beta pairs_per_task learning_rate "
                      "epochs batch_size save_every" + " no_hidden_info" * (args.critic != "judge"))
    if args.official:
        refuse_unused(given, "--official", "no_length_norm nll_weight")
        args.nll_weight = 0.0
    if not environment.has_success and (args.critic == "value" or args.official):
        raise UserError(f"--critic value and --official want answers wholly right: --env {args.env} has none")
    at_least_one(args, "save_every batch_size epochs tokens_per_step max_tokens")
    args.vision_critic = getattr(args, "vision_critic", None)
    if args.vision_critic:
        refuse_unused(given, "--vision-critic", "model no_hidden_info tokens_per_step max_tokens")
        if args.critic != "regression":
            raise UserError("--vision-critic wants --critic regression")
    args.trajectories = args.trajectories or Path(args.run) / "trajectories.jsonl"
    args.critic_folder, args.preferences = Path(args.run) / "critic", Path(args.run) / "preferences.jsonl"
    return args, environment


if __name__ == "__main__":
    run_main(main, out_of_memory="lower --tokens-per-step (the batch stays what it is) or --max-tokens")
