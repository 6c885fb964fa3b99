"""What happens before the first step: processes, what a run folder already holds, the plan."""
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR

from colbench.env.data import load_trajectories, of_first_tasks, state_line
from colbench.env.dialogue import states_with_candidates
from colbench.lm.memory import model_row, training_memory
from colbench.run.errors import UserError
from colbench.run.files import lock_run, repair_jsonl
from colbench.run.settings import (count, keep_settings, keep_weights, next_step, plan,
                                   refuse_other, settings_file)
from colbench.train.critics import TRAINED, state_key

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start_accelerator(output: Path) -> Accelerator:
    """Start accelerate's processes. The main one locks `output` against a second run."""
    try:
        precision = "bf16" if torch.cuda.is_available() else "no"
        accelerator = Accelerator(mixed_precision=precision)
    except ValueError as error:  # torch.distributed's
        names = ", ".join(name for name in LAUNCHER if name in os.environ)
        if not names:
            raise
        raise UserError(
            f"{names}: a launcher sets all of {', '.join(LAUNCHER)}, to numbers except for the "
            f"address; unset what an earlier one left behind ({error})") from None
    if accelerator.is_main_process:
        lock_run(output.parent, output.name)
    return accelerator


def is_trained(output: Path, args, next_script: str) -> bool:
    """Whether `output` is already trained. If so, say so, and name the flags that differ now."""
    if output.exists():
        keep_settings(output, args, started=True)
        print(f"{output}: already trained; use a new --run to train again; "
              f"{next_step(next_script, args)}")
    return output.exists()


def critic_to_do(args, environment) -> str | None:
    """What is left to do: "train" (and rank), "rank" with the trained critic, or None.

    UserError where the run holds another critic or its ranking."""
    preferences = args.preferences
    needs_training = args.critic in TRAINED
    is_ready = args.critic_folder.exists() or not needs_training
    has_rows = preferences.exists() and preferences.stat().st_size > 0
    ranked_with = settings_file(preferences)
    if has_rows and (not needs_training or ranked_with.exists()):
        refuse_other(ranked_with, args, ["critic"], f"{preferences} was ranked")
    if is_ready and preferences.exists() and not states_to_rank(args, environment):
        keep_settings(args.critic_folder if needs_training else preferences, args, started=True)
        keep_weights(preferences, [args.critic_folder] if needs_training else [])
        print(f"{preferences}: already complete; {next_step('train_policy.py', args)}")
        return None
    if not is_ready and has_rows:
        raise UserError(f"{preferences}: holds another critic's ranking; delete it to train and "
                        "rank again, or choose another --run")
    if not is_ready:
        return "train"
    if needs_training:  # it ranks the way it was trained
        refuse_other(args.critic_folder / "training_args.json", args,
                     ["critic", "vision_critic", "no_hidden_info", "no_length_norm", "official",
                      "lora_rank"], f"{args.critic_folder} was trained")
    return "rank"


def states_to_rank(args, environment) -> list[dict]:
    """The states with candidates that have no line in preferences.jsonl yet."""
    done = {state_key(line) for line in repair_jsonl(args.preferences, state_line)}
    trajectories = load_trajectories(args.trajectories, environment.check_task)
    trajectories = of_first_tasks(trajectories, args.max_trajectories)
    states = states_with_candidates(trajectories, environment.prompt)
    if not states:
        raise UserError(f"{args.trajectories}: no candidates to rank; add them with collect.py "
                        f"--run OTHER --add-candidates-to {args.trajectories}")
    return [state for state in states if state_key(state) not in done]


def begin_ranking(args, accelerator, environment) -> list[dict]:
    """The states to rank. Keeps flags and weights that preferences.jsonl is made with."""
    states = states_to_rank(args, environment)
    if accelerator.is_main_process:
        keep_settings(args.preferences, args, started=args.preferences.exists())
        keep_weights(args.preferences, [args.critic_folder] if args.critic in TRAINED else [])
    return states


def linear_schedule(optimizer, n_steps: int) -> LambdaLR:
    """Learning rate: linear warm-up over the first tenth of the steps, then linear decay to 0."""
    warm_up = n_steps // 10

    def factor(step: int) -> float:
        if step < warm_up:
            return step / warm_up
        return (n_steps - step) / max(1, n_steps - warm_up)
    return LambdaLR(optimizer, factor)


def training_plan(accelerator, args, output: Path, model, examples: list, n_steps: int,
                  first_step: int, nats: tuple[float, float] | None = None) -> None:
    """Keep the flags next to `output` and print what will be trained, on what, and the memory.

    examples: each with `pairs` and, unless they are pictures, `tokens`. nats: as in StepLog."""
    if not accelerator.is_main_process:
        return
    keep_settings(output, args, started=first_step > 0)
    rows = {"model": model_row(model, args.model, training=True)}
    if accelerator.num_processes > 1:
        rows["processes"] = accelerator.num_processes
    n_pairs = sum(len(example.pairs) for example in examples)
    rows["steps"] = (f"{n_steps} of {args.batch_size} pairs: {args.epochs} epochs of {n_pairs}; "
                     f"learning rate {args.learning_rate:g}")
    if first_step:
        rows["steps"] += f"; {first_step} done"
    tokens = sum(example.tokens or 0 for example in examples)
    if tokens:
        rows["tokens"] = f"about {count(args.epochs * tokens)} in total"
        rows["memory"] = training_memory(model, args.tokens_per_step, args.gradient_checkpointing)
    if nats:
        rows["nats"] = (f"{nats[0]:.3g} per message under the base model; margins should stay "
                        f"below {nats[1]:.3g}")
    rows["output"] = f"{output}; curves at any time: python -m colbench.look.report {args.run}"
    plan(f"train_{output.name}", rows)
