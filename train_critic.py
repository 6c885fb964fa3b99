"""Stage 2 of SWEET-RL: train the turn-level critic, which MAY see the hidden reference, then rank the candidates with it.

    python train_critic.py                                        # embedded default: runs/tiny/critic, runs/tiny/preferences.jsonl
    python train_critic.py --preset llama --run runs/llama        # 4-bit Llama-3.1-8B, the paper's settings but for LoRA's
    accelerate launch --num_processes 2 train_critic.py ...       # data parallel, on two GPUs

The critic is a language model itself: the advantage of a message is how much likelier the critic finds it than the base model
does, per token, both reading the reference c in their prompt (paper, section 4.1; o: the dialogue so far; a: a message, L tokens long):

    (1)  A_θ(o, a, c) = 1/L Σ_l [ log π_θ(a^l | c, o, a^<l) − log π_ref(a^l | c, o, a^<l) ]

It is learned from whole trajectories only, Bradley-Terry on pairs of one task with r(τ+) > r(τ−):

    (2)  J(θ) = −log σ( β Σ_t A_θ(o_t+, a_t+, c) − β Σ_t A_θ(o_t−, a_t−, c) ) + 0.01 · NLL(τ+)

Other critics, by --critic: `regression`, A_θ = a linear head on the message's mean last hidden state, trained by (2) without NLL;
`value`, the same head as success probability, trained by binary cross-entropy on every turn; and three that need no training:
`untrained`, log-ratio of the base model with c to itself without; `judge`, the base model is asked which of two messages is better;
`rollout`, the dialogue is played on from each candidate and the rewards are averaged.

Reads RUN/trajectories.jsonl. Writes RUN/critic/ (a PEFT adapter), RUN/critic_log.jsonl (a line a step) and
RUN/preferences.jsonl: a line a state with messages, candidates and their advantages. Interrupted, the same command goes on.
"""

import argparse
import random
from functools import partial
from pathlib import Path

from colbench.dialogue import AGENT_PROMPT, MAX_TURNS, prompt_messages, states_with_candidates
from colbench.frontend.environment import PRESETS as FRONTEND_PRESETS, add_env, add_page_flags
from colbench.files import UserError, lock_run, repair_jsonl, run_main, seed_of
from colbench.judges import judge_scores, rollout_scores
from colbench.model import (adapters_off, add_lora, candidate_trees, context_length, encode_dialogue, load_model, load_tokenizer,
                            message_logps, message_means, pack, tree_tokens)
from colbench.show import keep_settings, keep_weights, next_step, refuse_other, training_plan
from colbench.tasks import failed, load_trajectories, of_first_tasks
from colbench.training import DIVERGED, StepLog, cached_logps, load_checkpoint, save_checkpoint, save_trained, value_head, write_ranking

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tqdm import tqdm

PRESETS = {
    "tiny": dict(run="runs/tiny", model="tiny", load_in_4bit=False, lora_rank=32, learning_rate=1e-4, pairs_per_task=6, min_gap=0.5, epochs=2,
                 tokens_per_step=384, max_tokens=1024, gradient_checkpointing=False, agent_prompt=None, human="scripted", max_new_tokens=96,
                 batch_tokens=65536),
    "llama": dict(run="runs/llama", model="meta-llama/Llama-3.1-8B-Instruct", load_in_4bit=True, lora_rank=32,
                  learning_rate=5e-5, pairs_per_task=0, min_gap=0.0, epochs=4, tokens_per_step=8192, max_tokens=8192,
                  gradient_checkpointing=True, agent_prompt=AGENT_PROMPT, human="self", max_new_tokens=1024, batch_tokens=32768),
}
TRAINED, UNTRAINED = ("logprob", "regression", "value"), ("untrained", "judge", "rollout")
HIDDEN_INFO = "\n\nHidden from the agent, the reference is:\n"


def parse_args():
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", choices=PRESETS, default="tiny", help="defaults for all other flags")
    env, preset = add_env(first), first.parse_known_args()[0].preset
    parser = argparse.ArgumentParser(
        description=__doc__, parents=[first], formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("files")
    group.add_argument("--run", help="directory of this run (default: %(default)s)")
    group.add_argument("--trajectories", help="input (default: RUN/trajectories.jsonl)")
    group.add_argument("--critic-folder", help="output: the trained critic (default: RUN/critic)")
    group.add_argument("--preferences", help="output: the ranked candidates (default: RUN/preferences.jsonl)")
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="hub id or folder (default: %(default)s)")
    group.add_argument("--load-in-4bit", action=argparse.BooleanOptionalAction, help="NF4 weights (default: %(default)s)")
    group.add_argument("--lora-rank", type=int, help="0 trains all weights (default: %(default)s)")
    group.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction,
                       help="compute activations twice: less memory, slower (default: %(default)s)")
    group = parser.add_argument_group("objective")
    group.add_argument("--critic", choices=TRAINED + UNTRAINED, default="logprob", help="see above (default: %(default)s)")
    group.add_argument("--no-hidden-info", action="store_true", help="the critic does not see c")
    group.add_argument("--no-length-norm", action="store_true",
                       help="(1) is a sum over the tokens, not their mean, in training and ranking; includes --aggregate sum")
    group.add_argument("--aggregate", choices=("turn-mean", "trajectory-mean", "sum"),
                       help="a trajectory's score in (2): sum of (1) over turns, mean or sum over all tokens; in training only (default: turn-mean)")
    group.add_argument("--official", action="store_true", help="as the released code has it: --aggregate trajectory-mean, "
                       "--nll-weight 0, τ+ passes every test, and π_ref's log-probs do not see c when candidates are ranked")
    group.add_argument("--beta", type=float, default=0.1, help="β of (2) (default: %(default)s)")
    group.add_argument("--nll-weight", type=float, default=0.01, help="weight of NLL(τ+) in (2) (default: %(default)s)")
    group.add_argument("--pairs-per-task", type=int, help="at most so many, drawn at random; 0: all (default: %(default)s)")
    group.add_argument("--min-gap", type=float, help="leave out pairs whose rewards differ by less (default: %(default)s)")
    group.add_argument("--max-trajectories", type=int, default=0, help="only so many, of the first tasks; 0: all (default: %(default)s)")
    group.add_argument("--rollouts", type=int, default=4, help="--critic rollout: dialogues a candidate (default: %(default)s)")
    group.add_argument("--human", help="--critic rollout: scripted, self or a server's URL (default: %(default)s)")
    group.add_argument("--max-new-tokens", type=int, help="--critic rollout: bound on one message (default: %(default)s)")
    group.add_argument("--batch-tokens", type=int, help="--critic rollout: tokens held at once while sampling (default: %(default)s)")
    group.add_argument("--allow-weak-sandbox", action="store_true", help="--critic rollout: score even where the sandbox cannot be made safe")
    add_page_flags(parser).add_argument("--vision-critic", metavar="MODEL", help="with --critic regression, as in the paper: the "
                                        "head sits on this vision-language model, which sees both pages (default: a text critic)")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--learning-rate", type=float, help="peak; 10%% warm-up, linear decay (default: %(default)s)")
    group.add_argument("--epochs", type=int, help="passes over the pairs (default: %(default)s)")
    group.add_argument("--batch-size", type=int, default=8, help="pairs a step (default: %(default)s)")
    group.add_argument("--tokens-per-step", type=int, help="tokens in one forward pass: lower it when memory runs out; the "
                       "batch stays what it is (default: %(default)s)")
    group.add_argument("--max-tokens", type=int, help="longer trajectories are left out and counted (default: %(default)s)")
    group.add_argument("--save-every", type=int, default=50, help="steps between checkpoints (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="of pairs, order and LoRA's start (default: %(default)s)")
    group.add_argument("--log-with", choices=("tensorboard", "wandb"), help="also log there, through accelerate")
    parser.set_defaults(**PRESETS[preset] | (FRONTEND_PRESETS["train_critic"][preset] if env == "frontend" else {}))
    args = parser.parse_args()
    if args.critic != "logprob" and (args.no_length_norm or args.aggregate or args.official):
        raise UserError("--no-length-norm, --aggregate and --official concern --critic logprob")
    if args.critic == "untrained" and args.no_hidden_info:
        raise UserError("--critic untrained is the base model's log-ratio with c to itself without: --no-hidden-info leaves nothing of it")
    if env == "frontend" and (args.critic in ("value", "rollout") or args.official):
        raise UserError("--critic value, --critic rollout and --official want rewards of tests, which --env frontend does not have")
    if min(args.save_every, args.batch_size, args.epochs, args.tokens_per_step, args.max_tokens, args.rollouts) < 1:
        raise UserError("--save-every, --batch-size, --epochs, --tokens-per-step, --max-tokens and --rollouts are at least 1")
    if args.vision_critic and (env != "frontend" or args.critic != "regression"):
        raise UserError("--vision-critic wants --env frontend --critic regression")
    if args.no_length_norm + bool(args.aggregate) + args.official > 1:
        raise UserError("--no-length-norm, --aggregate and --official each say what a trajectory's score is: give one of them")
    args.aggregate = args.aggregate or ("trajectory-mean" if args.official else "sum" if args.no_length_norm else "turn-mean")
    args.nll_weight = 0.0 if args.official else args.nll_weight
    args.trajectories = Path(args.trajectories or Path(args.run) / "trajectories.jsonl")
    args.critic_folder = Path(args.critic_folder or Path(args.run) / "critic")
    args.preferences = Path(args.preferences or Path(args.run) / "preferences.jsonl")
    return args


def with_hidden_info(messages: list[dict], reference: str) -> list[dict]:
    """The critic's view of a dialogue: c, the hidden reference, stands at the end of the system message. Of all that agent, critic
    and policy stage read, c is in this alone: the others' prompts are `prompt_messages`. (The simulated human knows c too.)"""
    system, *rest = messages
    return [{"role": "system", "content": system["content"] + HIDDEN_INFO + reference}, *rest]


def advantage(logps: torch.Tensor, ref_logps: torch.Tensor, length_norm: bool = True) -> torch.Tensor:
    """(1): the mean log-ratio over the L tokens of one message, end-of-turn token included. Both (L,); returns a scalar."""
    return (logps - ref_logps).mean() if length_norm else (logps - ref_logps).sum()


def trajectory_score(logps, ref_logps, aggregate: str = "turn-mean") -> torch.Tensor:
    """Σ_t A_θ(o_t, a_t, c) of (2), for lists over turns t of (L_t,) log-probs; or another score of a trajectory's tokens."""
    if aggregate == "turn-mean":
        return sum(advantage(turn, ref) for turn, ref in zip(logps, ref_logps))
    return advantage(torch.cat(logps), torch.cat(ref_logps), length_norm=aggregate == "trajectory-mean")


def critic_loss(chosen, rejected, ref_chosen, ref_rejected, beta: float, nll_weight: float, aggregate: str = "turn-mean"):
    """(2) for one pair τ+, τ−. Each argument: a list over turns t of (L_t,) log-probs. Returns (loss, Σ_t A(τ+), Σ_t A(τ−))."""
    score_chosen = trajectory_score(chosen, ref_chosen, aggregate)  # Σ_t A_θ(o_t+, a_t+, c)
    score_rejected = trajectory_score(rejected, ref_rejected, aggregate)  # Σ_t A_θ(o_t−, a_t−, c)
    nll = -torch.cat(chosen).mean()  # over all agent tokens of τ+
    loss = -F.logsigmoid(beta * (score_chosen - score_rejected)) + nll_weight * nll
    return loss, score_chosen, score_rejected


def make_pairs(trajectories: list[dict], pairs_per_task: int, seed: int, min_gap: float = 0.0, chosen_from: float = 0.0):
    """[(index of τ+, index of τ−)] for all or some of the pairs of one task with r(τ+) > r(τ−), by min_gap at least; r(τ+) is
    chosen_from at least."""
    by_task = {}
    for index, trajectory in enumerate(trajectories):
        by_task.setdefault(trajectory["id"], []).append(index)
    pairs = []
    for task, indices in by_task.items():
        of_task = [(a, b) for a in indices for b in indices if trajectories[a]["reward"] >= chosen_from
                   and (gap := trajectories[a]["reward"] - trajectories[b]["reward"]) > 0 and gap >= min_gap]
        random.Random(seed_of(seed, task, "pairs")).shuffle(of_task)
        pairs += of_task[:pairs_per_task or None]
    return pairs


def load_pairs(args, tokenizer):
    """Trajectories, their pairs, and the tree (token ids, spans of the agent's turns) of every trajectory in a pair."""
    everything = load_trajectories(args.trajectories)
    for number, trajectory in enumerate(everything, 1):
        if "reward" not in trajectory and not failed(trajectory):
            raise UserError(f"{args.trajectories}:{number}: reward: missing; score it with collect.py --run OTHER --add-candidates-to {args.trajectories}")
        trajectory.setdefault("system", (args.agent_prompt or AGENT_PROMPT).replace("{max_turns}", str(MAX_TURNS)))
    trajectories = [t for t in of_first_tasks(everything, args.max_trajectories) if "reward" in t]
    if args.critic == "value":  # learns from single trajectories
        pairs = [(index,) for index in range(len(trajectories))]
    else:
        pairs = make_pairs(trajectories, args.pairs_per_task, args.seed, args.min_gap, chosen_from=float(args.official))
    if not pairs:
        rewards = sorted({round(t["reward"], 3) for t in trajectories})
        raise UserError(f"{args.trajectories}: no pair to learn from: no task has two trajectories of different reward"
                        f"{f', by --min-gap {args.min_gap:g} at least' * bool(args.min_gap)}{', one of 1 (--official)' * args.official} ("
                        f"{len(trajectories)} trajectories, rewards {rewards[:5]}); collect more with a larger --k or more tasks")
    trees = {}
    for index in sorted({index for pair in pairs for index in pair}):
        t = trajectories[index]
        messages = prompt_messages(t["system"], t["dialogue_history"])
        seen = messages if args.no_hidden_info else with_hidden_info(messages, t["task"]["ground_truth"])
        trees[index] = (*encode_dialogue(tokenizer, seen), [])
    fitting = [pair for pair in pairs if all(tree_tokens(trees[index]) <= args.max_tokens for index in pair)]
    if not fitting:
        raise UserError(f"{args.trajectories}: every pair is longer than --max-tokens {args.max_tokens}")
    print(f"{len(fitting)} {'trajectories' if args.critic == 'value' else 'pairs'} of {len({trajectories[pair[0]]['id'] for pair in fitting})} tasks; "
          f"{len(pairs) - len(fitting)} left out for their length")
    return trajectories, fitting, trees


def main():
    args = parse_args()
    accelerator = Accelerator(log_with=args.log_with, project_dir=args.run,
                              mixed_precision="bf16" if torch.cuda.is_available() else "no")
    if accelerator.is_main_process:
        lock = lock_run(args.critic_folder.parent, args.critic_folder.name)  # noqa: F841  held until the process ends
    trained = args.critic_folder.exists() or args.critic in UNTRAINED
    ranked_with = args.preferences.with_name(args.preferences.stem + "_args.json")
    if args.preferences.exists() and args.preferences.stat().st_size and (args.critic in UNTRAINED or ranked_with.exists()):
        refuse_other(ranked_with, args, ["critic"], f"{args.preferences} was ranked")
    if trained and args.preferences.exists() and not states_to_rank(args)[1]:
        keep_settings(args.critic_folder if args.critic in TRAINED else args.preferences, args, begun=True)
        keep_weights(args.preferences, [args.critic_folder] if args.critic in TRAINED else [])
        print(f"{args.preferences} is complete: nothing to do; {next_step('train_policy.py', args)}")
        return
    if not trained and args.preferences.exists() and args.preferences.stat().st_size:
        raise UserError(f"{args.preferences}: holds another critic's ranking; delete it to train and rank anew, or choose another --run")
    if args.critic_folder.exists() and args.critic in TRAINED:  # it ranks as it was trained
        refuse_other(args.critic_folder / "training_args.json", args, ["critic", "vision_critic", "no_hidden_info", "no_length_norm", "official",
                                                                     "lora_rank"], f"{args.critic_folder} was trained")
    if args.vision_critic:
        from colbench.frontend.vision_critic import train_and_rank  # (2) on pictures
        return train_and_rank(args, accelerator, make_pairs, states_to_rank)
    tokenizer = load_tokenizer(args.model)
    args.max_tokens = min(args.max_tokens, context_length(args.model))
    if not trained:
        trajectories, pairs, trees = load_pairs(args, tokenizer)
    adapter = str(args.critic_folder) if args.critic_folder.exists() and args.critic in TRAINED else None
    model = load_model(args.model, args.load_in_4bit, accelerator.device, adapter)
    if not trained:
        torch.manual_seed(args.seed)  # LoRA's A matrices start at random
        model = add_lora(model, args.lora_rank, args.gradient_checkpointing)
    if args.critic in ("regression", "value"):
        model.value_head = value_head(model, adapter)
    # π_ref: the same weights with adapters off; only full fine-tuning needs a second copy
    reference = model if args.lora_rank or args.critic in UNTRAINED else load_model(args.model, args.load_in_4bit, accelerator.device)

    def reference_logps(trees):
        with torch.no_grad(), accelerator.autocast(), adapters_off(reference):
            return message_logps(reference, trees)

    if not trained:
        train(args, accelerator, model, reference, tokenizer, trajectories, pairs, trees, reference_logps)
    rank(args, accelerator, model.eval(), reference_logps, tokenizer)
    accelerator.end_training()  # the processes part here


def train(args, accelerator, model, reference, tokenizer, trajectories, pairs, trees, reference_logps):
    """The loop: batches of pairs in a seeded order, log-ratios to the reference, (2), AdamW. Writes RUN/critic."""
    beside = lambda name: args.critic_folder.with_name(args.critic_folder.name + name)  # noqa: E731  critic -> critic_log.jsonl
    if args.critic == "logprob":  # log π_ref, trajectory -> list over turns of (L_t,)
        ref_logps = dict(zip(trees, cached_logps(accelerator, beside("_reference.jsonl"), reference, list(trees.values()),
                                                 args.tokens_per_step, reference_logps)))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)
    steps_per_epoch = -(-len(pairs) // args.batch_size)
    steps = args.epochs * steps_per_epoch
    from transformers import get_linear_schedule_with_warmup  # here, not above: it takes seconds to import
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    data = seed_of(pairs, trees)  # a checkpoint goes on with the pairs that it was begun with
    first = load_checkpoint(accelerator, args.critic_folder, model, optimizer, schedule, args, data)
    log = StepLog(accelerator, beside("_log.jsonl"), first)
    if accelerator.is_main_process:
        keep_settings(args.critic_folder, args, begun=bool(first))
        tokens = args.epochs * sum(tree_tokens(trees[index]) for pair in pairs for index in pair)
        what = f"{args.batch_size} of {len(pairs)} {'trajectories' if args.critic == 'value' else 'pairs'}"
        training_plan("train_critic", args, model, steps, first, what, tokens, args.critic_folder)
    accelerator.init_trackers("critic", config={name: str(value) for name, value in vars(args).items()})
    model.train()
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="critic", unit="step",
               disable=not accelerator.is_main_process)
    for step in bar:
        torch.manual_seed(seed_of(args.seed, "critic", step, accelerator.process_index))  # for models with dropout
        epoch, place = divmod(step, steps_per_epoch)
        order = random.Random(seed_of(args.seed, "critic", epoch)).sample(pairs, len(pairs))
        batch = order[place * args.batch_size:(place + 1) * args.batch_size]
        mine, weight = batch[accelerator.process_index::accelerator.num_processes], accelerator.num_processes / len(batch)
        if not mine:  # more processes than pairs: take part in the gradient's average with nothing
            mine, weight = batch[:1], 0.0
        for group in pack([sum(tree_tokens(trees[i]) for i in pair) for pair in mine], args.tokens_per_step):
            in_group = [trees[i] for k in group for i in mine[k]]
            with accelerator.autocast():
                if args.critic == "logprob":
                    turns = iter(message_logps(model, in_group))  # per trajectory a list over turns t of (L_t,)
                else:
                    turns = iter([[model.value_head(mean)[0] for mean in tree] for tree in message_means(model, in_group)])
            total = 0.0
            for pair in [mine[k] for k in group]:
                if args.critic == "value":  # V(o_t, a_t, c) of every turn against the success of the whole
                    (i,), values = pair, torch.stack(next(turns))
                    success = torch.full_like(values, float(trajectories[i]["reward"] == 1))
                    loss = F.binary_cross_entropy_with_logits(values, success)
                    row = {"loss": loss, "rewards/accuracies": ((values > 0) == (success > 0)).float().mean()}
                else:
                    (a, b), chosen, rejected = pair, next(turns), next(turns)
                    if args.critic == "regression":
                        a_chosen, a_rejected = sum(chosen), sum(rejected)
                        loss = -F.logsigmoid(args.beta * (a_chosen - a_rejected))
                    else:
                        loss, a_chosen, a_rejected = critic_loss(
                            chosen, rejected, ref_logps[a], ref_logps[b], args.beta, args.nll_weight, args.aggregate)
                    row = {"loss": loss, "margin": a_chosen - a_rejected, "rewards/accuracies": a_chosen > a_rejected,
                           "rewards/chosen": args.beta * a_chosen, "rewards/rejected": args.beta * a_rejected,
                           "rewards/margins": args.beta * (a_chosen - a_rejected)}
                    if args.critic == "logprob":
                        row |= {"logps/chosen": torch.cat(chosen).sum(), "logps/rejected": torch.cat(rejected).sum()}
                total = total + weight * loss
                log.add(sum(tree_tokens(trees[i]) for i in pair), **row)
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
            save_checkpoint(accelerator, args.critic_folder, model, optimizer, schedule, step + 1, data)
            raise UserError(f"step {step}: {DIVERGED}")
        bar.set_postfix(loss=row["loss"], accuracy=row["rewards/accuracies"], margin=row.get("margin"), skipped=row["skipped"])
        if (step + 1) % args.save_every == 0:
            save_checkpoint(accelerator, args.critic_folder, model, optimizer, schedule, step + 1, data)
    save_trained(accelerator, args.critic_folder, model, tokenizer, vars(args))


def states_to_rank(args) -> tuple[list[dict], set]:
    """All states with candidates, and (id, sample, turn) of those that have no line in preferences.jsonl yet."""
    done = {(line["id"], line["sample"], line["turn"]) for line in repair_jsonl(args.preferences)}
    trajectories = of_first_tasks(load_trajectories(args.trajectories), args.max_trajectories)
    states = states_with_candidates(trajectories, args.agent_prompt or AGENT_PROMPT)
    if not states:
        raise UserError(f"{args.trajectories}: no candidates to rank; add them with collect.py --run OTHER --add-candidates-to {args.trajectories}")
    return states, {(state["id"], state["sample"], state["turn"]) for state in states} - done


def score_candidates(args, states: list[dict], tokenizer, model, reference_logps) -> list[list[float]]:
    """A(o, a, c) of every candidate a of every state, by the critic that `args` describes; [] for a state that is too long.

    A state: {"messages", "candidates", "task", ...}. args: the critic's settings, as its folder's training_args.json has them.
    model: the critic. reference_logps: message_logps under π_ref. Both see the same tokens and the same prompt, c included.
    """
    without_c = [state["messages"] for state in states]
    with_c = [with_hidden_info(state["messages"], state["task"]["ground_truth"]) for state in states]
    prompts = without_c if args.no_hidden_info else with_c
    if args.critic == "rollout":
        return rollout_scores(args, states, tokenizer, model)
    if args.critic == "judge":
        return judge_scores(reference_logps, tokenizer, prompts, [state["candidates"] for state in states], args.tokens_per_step)

    def outputs(forward, prompts):  # a list over candidates of what `forward` gives for a message
        jobs = candidate_trees(tokenizer, list(zip(prompts, [s["candidates"] for s in states])), args.max_tokens, args.tokens_per_step)
        found = [[] for _ in states]
        for group in pack([tree_tokens(tree) for _, tree in jobs], args.tokens_per_step):
            for k, messages in zip(group, forward([jobs[k][1] for k in group])):
                found[jobs[k][0]] += messages
        return found

    with torch.no_grad():
        if args.critic in ("regression", "value"):
            return [[model.value_head(mean).item() for mean in means] for means in outputs(partial(message_means, model), prompts)]
        if args.critic == "untrained":
            logps, ref_logps = outputs(reference_logps, with_c), outputs(reference_logps, without_c)
        else:
            logps = outputs(partial(message_logps, model), prompts)
            ref_logps = outputs(reference_logps, without_c if args.official else prompts)
    return [[advantage(*both, length_norm=not args.no_length_norm).item() for both in zip(*of_state)] for of_state in zip(logps, ref_logps)]


def rank(args, accelerator, model, reference_logps, tokenizer):
    """Writes preferences.jsonl."""
    states, missing = states_to_rank(args)
    if accelerator.is_main_process:
        keep_settings(args.preferences, args, begun=args.preferences.exists())
        keep_weights(args.preferences, [args.critic_folder] if args.critic in TRAINED else [])
    left_out = write_ranking(accelerator, args.preferences, states, missing,
                             lambda mine: score_candidates(args, mine, tokenizer, model, reference_logps))
    if accelerator.is_main_process:
        print(f"{args.preferences}: {len(missing) - left_out} states ranked, {left_out} left out for their length")
        print(next_step("train_policy.py", args))


if __name__ == "__main__":
    run_main(main, out_of_memory="lower --tokens-per-step (the batch stays what it is) or --max-tokens")
