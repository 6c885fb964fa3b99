"""Stage 2 of SWEET-RL: train the turn-level critic, which MAY see the hidden reference, then rank the candidates with it.

    python train_critic.py                                        # embedded default: runs/tiny/critic, runs/tiny/preferences.jsonl
    python train_critic.py --preset llama --run runs/llama        # 4-bit Llama-3.1-8B with the paper's settings
    accelerate launch --num_processes 2 train_critic.py ...       # data parallel

The critic is a language model itself: the advantage of a message is how much likelier the critic finds it than the base model
does, per token, both reading the reference c in their prompt (paper, section 4.1; o dialogue so far, a message of L tokens):

    (1)  A_θ(o, a, c) = 1/L Σ_l [ log π_θ(a^l | c, o, a^<l) − log π_ref(a^l | c, o, a^<l) ]

It is learned from whole trajectories only, Bradley-Terry on pairs of one task with r(τ+) > r(τ−):

    (2)  J(θ) = −log σ( β Σ_t A_θ(o_t+, a_t+, c) − β Σ_t A_θ(o_t−, a_t−, c) ) + 0.01 · NLL(τ+)

Reads RUN/trajectories.jsonl. Writes RUN/critic/ (a PEFT adapter), RUN/critic_log.jsonl (a line a step) and
RUN/preferences.jsonl: a line a state with messages, candidates and their advantages. Interrupted, the same command goes on.
"""

import argparse
import random
from pathlib import Path

from colbench.dialogue import AGENT_PROMPT, MAX_TURNS, prompt_messages
from colbench.files import UserError, append_jsonl, lock_run, repair_jsonl, run_main, seed_of
from colbench.model import (adapters_off, add_lora, context_length, encode_dialogue, end_of_turn, load_model, load_tokenizer,
                            message_ids, message_logps, pack, tree_tokens)
from colbench.show import next_step, training_plan
from colbench.tasks import failed, load_trajectories
from colbench.training import DIVERGED, StepLog, cached_logps, load_checkpoint, save_checkpoint, save_trained

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

PRESETS = {
    "tiny": dict(run="runs/tiny", model="tiny", load_in_4bit=False, lora_rank=32, learning_rate=3e-4, pairs_per_task=4, epochs=2,
                 tokens_per_step=1024, max_tokens=1024, gradient_checkpointing=False, agent_prompt=None),
    "llama": dict(run="runs/llama", model="meta-llama/Llama-3.1-8B-Instruct", load_in_4bit=True, lora_rank=32,
                  learning_rate=5e-5, pairs_per_task=0, epochs=4, tokens_per_step=8192, max_tokens=8192,
                  gradient_checkpointing=True, agent_prompt=AGENT_PROMPT),
}
HIDDEN_INFO = "\n\nHidden from the agent, the reference is:\n"


def parse_args():
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", choices=PRESETS, default="tiny", help="defaults for all other flags")
    preset = first.parse_known_args()[0].preset
    parser = argparse.ArgumentParser(
        description=__doc__, parents=[first], formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("files")
    group.add_argument("--run", help="directory of this run (default: %(default)s)")
    group.add_argument("--trajectories", help="input (default: RUN/trajectories.jsonl)")
    group.add_argument("--critic", help="output: the trained critic (default: RUN/critic)")
    group.add_argument("--preferences", help="output: the ranked candidates (default: RUN/preferences.jsonl)")
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="hub id or folder (default: %(default)s)")
    group.add_argument("--load-in-4bit", action=argparse.BooleanOptionalAction, help="NF4 weights (default: %(default)s)")
    group.add_argument("--lora-rank", type=int, help="0 trains all weights (default: %(default)s)")
    group.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, help="(default: %(default)s)")
    group = parser.add_argument_group("objective")
    group.add_argument("--beta", type=float, default=0.1, help="β of (2) (default: %(default)s)")
    group.add_argument("--nll-weight", type=float, default=0.01, help="weight of NLL(τ+) in (2) (default: %(default)s)")
    group.add_argument("--pairs-per-task", type=int, help="at most so many, drawn at random; 0: all (default: %(default)s)")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--learning-rate", type=float, help="peak; 10%% warm-up, linear decay (default: %(default)s)")
    group.add_argument("--epochs", type=int, help="(default: %(default)s)")
    group.add_argument("--batch-size", type=int, default=8, help="pairs a step (default: %(default)s)")
    group.add_argument("--tokens-per-step", type=int, help="tokens in one forward pass: lower it when memory runs out; the "
                       "batch stays what it is (default: %(default)s)")
    group.add_argument("--max-tokens", type=int, help="longer trajectories are left out and counted (default: %(default)s)")
    group.add_argument("--save-every", type=int, default=50, help="steps between checkpoints (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    group.add_argument("--log-with", choices=("tensorboard", "wandb"), help="also log there, through accelerate")
    parser.set_defaults(**PRESETS[preset])
    args = parser.parse_args()
    for name in ("trajectories", "critic", "preferences"):
        suffix = "" if name == "critic" else ".jsonl"
        setattr(args, name, Path(getattr(args, name) or Path(args.run) / (name + suffix)))
    return args


def with_hidden_info(messages: list[dict], reference: str) -> list[dict]:
    """The critic's view of a dialogue: c, the hidden reference, stands at the end of the system message. Only here does it
    enter; the agent and the policy stage never see a prompt made by this function."""
    system, *rest = messages
    return [{"role": "system", "content": system["content"] + HIDDEN_INFO + reference}, *rest]


def advantage(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """(1): the mean log-ratio over the L tokens of one message, end-of-turn token included. Both (L,); returns a scalar."""
    return (logps - ref_logps).mean()


def critic_loss(chosen, rejected, ref_chosen, ref_rejected, beta: float, nll_weight: float):
    """(2) for one pair τ+, τ−. Each argument: a list over turns t of (L_t,) log-probs. Returns (loss, Σ_t A(τ+), Σ_t A(τ−))."""
    sum_chosen = sum(advantage(logps, ref) for logps, ref in zip(chosen, ref_chosen))  # Σ_t A_θ(o_t+, a_t+, c)
    sum_rejected = sum(advantage(logps, ref) for logps, ref in zip(rejected, ref_rejected))  # Σ_t A_θ(o_t−, a_t−, c)
    nll = -torch.cat(chosen).mean()  # over all agent tokens of τ+
    loss = -F.logsigmoid(beta * (sum_chosen - sum_rejected)) + nll_weight * nll
    return loss, sum_chosen, sum_rejected


def make_pairs(trajectories: list[dict], pairs_per_task: int, seed: int) -> list[tuple[int, int]]:
    """(index of τ+, index of τ−) for all or some of the pairs of one task with r(τ+) > r(τ−)."""
    by_task = {}
    for index, trajectory in enumerate(trajectories):
        by_task.setdefault(trajectory["id"], []).append(index)
    pairs = []
    for task, indices in by_task.items():
        of_task = [(a, b) for a in indices for b in indices if trajectories[a]["reward"] > trajectories[b]["reward"]]
        random.Random(seed_of(seed, task, "pairs")).shuffle(of_task)
        pairs += of_task[:pairs_per_task or None]
    return pairs


def load_pairs(args, tokenizer):
    """Trajectories, their pairs, and the tree (token ids, spans of the agent's turns) of every trajectory in a pair."""
    everything = load_trajectories(args.trajectories)
    for number, trajectory in enumerate(everything, 1):
        if "reward" not in trajectory and not failed(trajectory):
            raise UserError(f"{args.trajectories}:{number}: reward: missing; score it with collect.py --add-candidates-to")
        trajectory.setdefault("system", (args.agent_prompt or AGENT_PROMPT).replace("{max_turns}", str(MAX_TURNS)))
    trajectories = [t for t in everything if "reward" in t]
    pairs = make_pairs(trajectories, args.pairs_per_task, args.seed)
    if not pairs:
        rewards = sorted({round(t["reward"], 3) for t in trajectories})
        raise UserError(f"{args.trajectories}: no pair to learn from: no task has two trajectories of different reward ("
                        f"{len(trajectories)} trajectories, rewards {rewards[:5]}); collect more with a larger --k or more tasks")
    trees = {}
    for index in sorted({index for pair in pairs for index in pair}):
        t = trajectories[index]
        messages = with_hidden_info(prompt_messages(t["system"], t["dialogue_history"]), t["task"]["ground_truth"])
        trees[index] = (*encode_dialogue(tokenizer, messages), [])
    fitting = [pair for pair in pairs if all(tree_tokens(trees[index]) <= args.max_tokens for index in pair)]
    if not fitting:
        raise UserError(f"{args.trajectories}: every pair is longer than --max-tokens {args.max_tokens}")
    print(f"{len(fitting)} pairs of {len({trajectories[a]['id'] for a, _ in fitting})} tasks; "
          f"{len(pairs) - len(fitting)} left out for their length")
    return trajectories, fitting, trees


def main():
    args = parse_args()
    accelerator = Accelerator(log_with=args.log_with, project_dir=args.run,
                              mixed_precision="bf16" if torch.cuda.is_available() else "no")
    if accelerator.is_main_process:
        lock = lock_run(args.critic.parent, "critic")  # noqa: F841  held until the process ends
    if args.critic.exists() and args.preferences.exists() and not states_to_rank(args)[1]:
        print(f"{args.critic} and {args.preferences} are complete: nothing to do; next: python train_policy.py")
        return
    tokenizer = load_tokenizer(args.model)
    args.max_tokens = min(args.max_tokens, context_length(args.model))
    trained = args.critic.exists()
    if not trained:
        trajectories, pairs, trees = load_pairs(args, tokenizer)
    model = load_model(args.model, args.load_in_4bit, accelerator.device, adapter=str(args.critic) if trained else None)
    if not trained:
        torch.manual_seed(args.seed)  # LoRA's A matrices start at random
        model = add_lora(model, args.lora_rank, args.gradient_checkpointing)
    # π_ref: the same weights with adapters off; only full fine-tuning needs a second copy
    reference = model if args.lora_rank else load_model(args.model, args.load_in_4bit, accelerator.device)

    def reference_logps(trees):
        with torch.no_grad(), accelerator.autocast(), adapters_off(reference):
            return message_logps(reference, trees)

    if not trained:
        train(args, accelerator, model, reference, tokenizer, pairs, trees, reference_logps)
    rank(args, accelerator, model.eval(), tokenizer, reference_logps)


def train(args, accelerator, model, reference, tokenizer, pairs, trees, reference_logps):
    """The loop: batches of pairs in a seeded order, log-ratios to the reference, (2), AdamW. Writes RUN/critic."""
    # log π_ref, trajectory -> list over turns of (L_t,)
    ref_logps = dict(zip(trees, cached_logps(accelerator, args.critic.with_name("critic_reference.jsonl"), reference,
                                             list(trees.values()), args.tokens_per_step, reference_logps)))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)
    steps_per_epoch = -(-len(pairs) // args.batch_size)
    steps = args.epochs * steps_per_epoch
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    first = load_checkpoint(accelerator, args.critic, model, optimizer, schedule)
    log = StepLog(accelerator, Path(args.run) / "critic_log.jsonl", first)
    if accelerator.is_main_process:
        tokens = args.epochs * sum(tree_tokens(trees[index]) for pair in pairs for index in pair)
        training_plan("train_critic", args, model, steps, first, f"{args.batch_size} of {len(pairs)} pairs", tokens, args.critic)
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
        groups = pack([tree_tokens(trees[a]) + tree_tokens(trees[b]) for a, b in mine], args.tokens_per_step)
        for group in groups:
            with accelerator.autocast():
                logps = message_logps(model, [trees[index] for k in group for index in mine[k]])
            total = 0.0
            for (a, b), chosen, rejected in zip([mine[k] for k in group], logps[::2], logps[1::2]):
                loss, a_chosen, a_rejected = critic_loss(chosen, rejected, ref_logps[a], ref_logps[b], args.beta, args.nll_weight)
                total = total + weight * loss
                log.add(tree_tokens(trees[a]) + tree_tokens(trees[b]), **{
                    "loss": loss, "margin": a_chosen - a_rejected, "rewards/accuracies": a_chosen > a_rejected,
                    "rewards/chosen": args.beta * a_chosen, "rewards/rejected": args.beta * a_rejected,
                    "rewards/margins": args.beta * (a_chosen - a_rejected),
                    "logps/chosen": torch.cat(chosen).sum(), "logps/rejected": torch.cat(rejected).sum(),
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
            save_checkpoint(accelerator, args.critic, model, optimizer, schedule, step + 1)
            raise UserError(f"step {step}: {DIVERGED}")
        bar.set_postfix(loss=row["loss"], accuracy=row["rewards/accuracies"], margin=row["margin"], skipped=row["skipped"])
        if (step + 1) % args.save_every == 0:
            save_checkpoint(accelerator, args.critic, model, optimizer, schedule, step + 1)
    accelerator.end_training()
    save_trained(accelerator, args.critic, model, tokenizer, vars(args))


def states_to_rank(args) -> tuple[list[dict], set]:
    """All states with candidates, exact duplicates among these dropped, and (id, sample, turn) of those that have no line in
    preferences.jsonl yet."""
    done = {(line["id"], line["sample"], line["turn"]) for line in repair_jsonl(args.preferences)}
    states = []
    for trajectory in load_trajectories(args.trajectories):
        system = trajectory.get("system", (args.agent_prompt or AGENT_PROMPT).replace("{max_turns}", str(MAX_TURNS)))
        turn = 0
        for i, message in enumerate(trajectory["dialogue_history"]):
            turn += message["role"] == "assistant"
            if message.get("candidates"):
                states.append({
                    "id": trajectory["id"], "sample": trajectory["sample"], "turn": turn,
                    "last_turn": turn == trajectory.get("max_turns", MAX_TURNS),
                    "messages": prompt_messages(system, trajectory["dialogue_history"][:i]),
                    "candidates": list(dict.fromkeys(message["candidates"])),
                    "reference": trajectory["task"]["ground_truth"],
                })
    if not states:
        raise UserError(f"{args.trajectories}: no candidates to rank; add them with collect.py --add-candidates-to {args.trajectories}")
    return states, {(state["id"], state["sample"], state["turn"]) for state in states} - done


def rank(args, accelerator, model, tokenizer, reference_logps):
    """Advantage (1) of every candidate of every state: same tokens and same prompt, c included, for critic and reference. After
    an interruption a chunk that lacks a state is computed as a whole: its batches, and with them the last bits, stay the same."""
    (states, missing), end_id, left_out = states_to_rank(args), end_of_turn(tokenizer), 0
    chunk = 16 * accelerator.num_processes
    bar = tqdm(total=len(states), desc="ranking", unit="state", disable=not accelerator.is_main_process)
    for start in range(0, len(states), chunk):
        if missing.isdisjoint((state["id"], state["sample"], state["turn"]) for state in states[start:start + chunk]):
            bar.update(len(states[start:start + chunk]))
            continue
        mine = states[start:start + chunk][accelerator.process_index::accelerator.num_processes]
        jobs = []  # (number of the state, tree); a state with long candidates becomes several trees
        for number, state in enumerate(mine):
            prompt, _ = encode_dialogue(tokenizer, with_hidden_info(state["messages"], state.pop("reference")))
            leaves = [message_ids(tokenizer, text, end_id) for text in state["candidates"]]
            state["advantages"] = []
            if len(prompt) + max(map(len, leaves)) > args.max_tokens:
                state.update(candidates=[], left_out="longer than --max-tokens")
                continue
            for part in pack([len(leaf) for leaf in leaves], max(1, args.tokens_per_step - len(prompt))):
                jobs.append((number, (prompt, [], [leaves[k] for k in part])))
        for group in pack([tree_tokens(tree) for _, tree in jobs], args.tokens_per_step):
            trees = [jobs[k][1] for k in group]
            with torch.no_grad(), accelerator.autocast():
                logps = message_logps(model, trees)
            for k, candidates, ref_candidates in zip(group, logps, reference_logps(trees)):
                mine[jobs[k][0]]["advantages"] += [advantage(*both).item() for both in zip(candidates, ref_candidates)]
        rows = sorted(gather_object(mine), key=lambda row: (row["id"], row["sample"], row["turn"]))
        for row in rows if accelerator.is_main_process else ():
            if (row["id"], row["sample"], row["turn"]) in missing:
                append_jsonl(args.preferences, row)
                left_out += "left_out" in row
        bar.update(len(rows))
    bar.close()
    if accelerator.is_main_process:
        print(f"{args.preferences}: {len(missing) - left_out} states ranked, {left_out} left out for their length")
        print(next_step("train_policy.py", args))


if __name__ == "__main__":
    run_main(main, out_of_memory="lower --tokens-per-step (the batch stays what it is) or --max-tokens")
