"""What both trainers need and no formula: which examples a step takes, its end, the log, the checkpoint."""
import json
import math
import os
import pickle
import random
import resource
import sys
import time
import zipfile
from argparse import ArgumentParser, BooleanOptionalAction
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from colbench.lm.adapters import training_mode
from colbench.lm.memory import model_row, training_memory
from colbench.run.errors import UserError
from colbench.run.fields import COUNT
from colbench.run.files import append_jsonl, lock_run, repair_jsonl, seed_of, write_aside
from colbench.run.settings import count, keep_settings, next_step, plan

LOG = {"step": COUNT, "skipped?": COUNT}  # what is read again of a line of a log
DIVERGED = ("loss or gradient was NaN or infinite five times in a row; a checkpoint of the last sound weights is "
            "written; try a lower --learning-rate (delete the checkpoint to start anew), or give the same command to "
            "go on behind these batches")


def add_training_flags(parser: ArgumentParser) -> None:
    """The flags that both trainers have in common: the model, and how it is optimised."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="hub id or folder")
    group.add_argument("--load-in-4bit", action=BooleanOptionalAction, help="NF4 weights")
    group.add_argument("--lora-rank", type=int, help="rank of the LoRA adapters; 0 trains all weights")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--learning-rate", type=float, help="peak; 10%% warm-up, linear decay")
    group.add_argument("--epochs", type=int, help="passes over the pairs")
    group.add_argument("--batch-size", type=int, help="pairs a step; in train_policy.py rounded down to whole states")
    group.add_argument("--tokens-per-step", type=int, help="tokens in one forward pass: lower it when memory runs out; "
                       "the batch stays what it is")
    group.add_argument("--max-tokens", type=int, help="an example with more tokens is left out and counted")
    group.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    group.add_argument("--seed", type=int, default=0, help="of pairs, order and LoRA's start")


def start_accelerator(output: Path) -> Accelerator:
    """Accelerate's processes and precision; the first of them locks `output` against a second run until it ends."""
    try:
        accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    except ValueError as error:  # torch.distributed's
        known = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        names = ", ".join(name for name in known if name in os.environ)
        if not names:
            raise
        raise UserError(f"{names}: a launcher sets all of {', '.join(known)}, to numbers but for the address; unset "
                        f"what was left of one ({error})") from None
    if accelerator.is_main_process:
        lock_run(output.parent, output.name)
    return accelerator


def is_trained(output: Path, args, next_script: str) -> bool:
    """Whether `output` is there already; then it stays, and flags that differ from its own are named."""
    if output.exists():
        keep_settings(output, args, begun=True)
        print(f"{output} is complete: nothing to do (to train again: another --run); {next_step(next_script, args)}")
    return output.exists()


class Training:
    """One training of `model` into the folder `output`, or the rest of one that was interrupted.

    The script has the loss, `backward` and `optimizer.step()`; what all loops share is here. In a loop over
    `steps()`, `batch` says which examples to take, `clip` ends the backward passes, `end_step` the step. `save` ends
    the training.
    """

    def __init__(self, accelerator, args, output: Path, model, optimizer, weights: list[float], per_step: int, data,
                 tokens: int | None, unit: str, nats: tuple[float, float] | None = None):
        """weights: what each example counts in the mean of a batch (pairs of a state, say). per_step: examples a
        step. data: a hash of all that is learned from, a checkpoint goes on with the same only. tokens: in one epoch.
        unit: for the plan. nats: −log π_ref of a message on average, and of what a margin is about."""
        from transformers import get_linear_schedule_with_warmup  # here, not above: it takes seconds to import
        self.accelerator, self.args, self.output = accelerator, args, output
        self.model, self.optimizer = model, optimizer
        self.weights, self.per_step, self.data, self.nats = weights, per_step, data, nats
        self.ratios, self.warned = [], False
        self.steps_per_epoch = -(-len(weights) // per_step)
        self.n_steps = args.epochs * self.steps_per_epoch
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.schedule = get_linear_schedule_with_warmup(optimizer, self.n_steps // 10, self.n_steps)
        self.first = load_checkpoint(accelerator, output, model, optimizer, self.schedule, args, data)
        self.log = StepLog(accelerator, output.with_name(output.name + "_log.jsonl"), self.first)
        if accelerator.is_main_process:
            keep_settings(output, args, begun=bool(self.first))
            processes = accelerator.num_processes
            plan(f"train_{output.name}", {
                "model": model_row(model, args.model, training=True), "processes": processes if processes > 1 else None,
                "steps": f"{self.n_steps} of {unit}, {args.epochs} epochs, learning rate {args.learning_rate:g}"
                         + f", {self.first} are done" * (self.first > 0),
                "tokens": tokens and f"about {count(args.epochs * tokens)} in all",
                "nats": nats and f"{nats[0]:.3g} a message under the base model; margins should stay below "
                                 f"{nats[1]:.3g}",
                "memory": tokens and training_memory(model, args.tokens_per_step, args.gradient_checkpointing),
                "output": f"{output}; curves at any time: python -m colbench.look.report {args.run}"})
        training_mode(model)

    def steps(self):
        """The numbers of the steps that are to be done, behind a progress bar."""
        self.bar = tqdm(range(self.first, self.n_steps), initial=self.first, total=self.n_steps, desc=self.output.name,
                        unit="step", disable=not self.accelerator.is_main_process)
        return self.bar

    def batch(self, step: int) -> tuple[list[int], float]:
        """(numbers of this process's examples, the weight of one in the mean over the batch of all processes)."""
        accelerator, seed = self.accelerator, self.args.seed
        epoch, place = divmod(step, self.steps_per_epoch)
        numbers = range(len(self.weights))
        order = random.Random(seed_of(seed, self.output.name, epoch)).sample(numbers, len(numbers))
        batch = order[place * self.per_step:(place + 1) * self.per_step]
        mine = batch[accelerator.process_index::accelerator.num_processes]
        if not mine:  # more processes than examples: take part in the gradient's average with nothing
            return batch[:1], 0.0
        return mine, accelerator.num_processes / sum(self.weights[k] for k in batch)

    def clip(self, largest_norm: float) -> bool:
        """Average the gradients over the processes and clip them. False where loss or gradient is NaN or infinite in
        any process: this step is to be left out."""
        for parameter in self.parameters:
            # what no text of this process passed (an expert, say) may have a gradient in another one
            if parameter.grad is None and self.accelerator.num_processes > 1:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        self.log.means(float(self.accelerator.clip_grad_norm_(self.parameters, largest_norm)))
        return self.log.sound

    def end_step(self, step: int) -> None:
        """Learning rate, log line, progress bar, checkpoint. UserError after five unsound steps in a row."""
        if self.nats:
            self.log.row["margin/nats"] = self.log.row["margin"] / self.nats[1]
        row = self.log.write(step, self.schedule.get_last_lr()[0])
        self.warn_of_displacement(row)
        self.schedule.step()
        self.optimizer.zero_grad()
        diverged = self.log.unsound_in_a_row == 5
        if diverged or (step + 1) % self.args.save_every == 0:
            save_checkpoint(self.accelerator, self.output, self.model, self.optimizer, self.schedule, step + 1,
                            self.data)
        if diverged:
            raise UserError(f"step {step}: {DIVERGED}")
        shown = {"loss": "loss", "accuracy": "rewards/accuracies", "margin/nats": "margin/nats",
                 "log-ratio of chosen": "log_ratio/chosen", "skipped": "skipped"}
        self.bar.set_postfix({label: row[name] for label, name in shown.items() if row.get(name) is not None})

    def warn_of_displacement(self, row: dict) -> None:
        """Say once if the chosen messages have become less likely than under the base model, over 20 steps."""
        if row.get("log_ratio/chosen") is None or not self.nats:
            return
        self.ratios = [*self.ratios[-19:], row["log_ratio/chosen"]]
        fallen = -sum(self.ratios) / len(self.ratios)
        if not self.warned and len(self.ratios) == 20 and fallen > 0.1 * self.nats[0]:
            self.warned = True
            flags = "--beta" if getattr(self.args, "official", False) else "--nll-weight, or --beta"
            self.bar.write(
                f"warning: the chosen messages, {self.nats[0]:.3g} nats each under the base model, have become less "
                f"likely by {fallen:.2g} (likelihood displacement): raise {flags}", file=sys.stderr)

    def save(self, tokenizer) -> None:
        """Write `output`: adapter (or all weights), tokenizer, head, flags."""
        save_trained(self.accelerator, self.output, self.model, tokenizer, vars(self.args))


def checkpoint_path(output: Path) -> Path:
    """Where training of `output` (a folder) keeps its checkpoint until it is done."""
    return output.with_name(output.name + ".checkpoint")


def previous(path: Path) -> Path:
    """Where the checkpoint before the newest one is."""
    return path.with_name(path.name + ".previous")


def save_checkpoint(accelerator, output: Path, model, optimizer, schedule, step: int, data) -> None:
    """Trained weights, optimiser and schedule after `step` steps on `data` (a hash), written aside and renamed; the
    one before is kept. Data order needs no state: it is a function of seed and epoch."""
    if accelerator.is_main_process:
        path = checkpoint_path(output)
        parameters = accelerator.unwrap_model(model).named_parameters()
        weights = {n: p.detach().cpu() for n, p in parameters if p.requires_grad}
        state = {"step": step, "data": data, "weights": weights, "optimizer": optimizer.state_dict(),
                 "schedule": schedule.state_dict()}

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:  # torch's own writer tells a full disk in its own words
                torch.save(state, file)
            if path.exists():
                os.replace(path, previous(path))
        write_aside(path, write)


def load_checkpoint(accelerator, output: Path, model, optimizer, schedule, args, data) -> int:
    """Restore what save_checkpoint wrote, or what it wrote the time before if that is damaged; returns the number of
    steps done, 0 if there is no sound checkpoint. UserError where it was begun with other flags or data: the result
    would be of both."""
    if checkpoint_path(output).exists():
        keep_settings(output, args, begun=True, refuse=f"{checkpoint_path(output)}: its training")
    for path in (checkpoint_path(output), previous(checkpoint_path(output))):
        if not path.exists():
            continue
        try:
            damaged = zipfile.ZipFile(path).testzip()  # compares all checksums, which torch.load does not
            state = torch.load(path, map_location="cpu", weights_only=True) if not damaged else None
        except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
            damaged = " ".join(str(error).split())[:80]
        if damaged:
            if accelerator.is_main_process:
                print(f"{path}: damaged ({damaged}), the one before is taken", file=sys.stderr)
            continue
        if state["data"] != data:
            raise UserError(f"{path}: was trained on other data than there is now; delete it to start anew, "
                            "or choose another --run")
        parameters = {n: p for n, p in accelerator.unwrap_model(model).named_parameters() if p.requires_grad}
        if {n: p.shape for n, p in parameters.items()} != {n: p.shape for n, p in state["weights"].items()}:
            raise UserError(f"{path}: is of another model or --lora-rank; give that again, "
                            "or delete the file to start anew")
        with torch.no_grad():
            for name, value in state["weights"].items():
                parameters[name].copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        return state["step"]
    return 0


def save_trained(accelerator, output: Path, model, tokenizer, settings: dict) -> None:
    """The result: a PEFT adapter (or a whole model after full fine-tuning) and its settings; ends the checkpoint."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        def write(temporary: Path) -> None:
            accelerator.unwrap_model(model).save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            if hasattr(model, "value_head"):
                torch.save(model.value_head.state_dict(), temporary / "value_head.pt")
            (temporary / "training_args.json").write_text(json.dumps(settings, indent=1, default=str) + "\n")
            if (temporary / "README.md").exists():  # PEFT's empty model card
                (temporary / "README.md").unlink()
        write_aside(output, write)
        newest = checkpoint_path(output)
        torn = newest.with_name(f".{newest.name}.new")  # what a kill in mid-write left
        for path in (newest, previous(newest), torn):
            path.unlink(missing_ok=True)
    accelerator.wait_for_everyone()


class StepLog:
    """One JSON line a step: the means of what was added since the last line, over micro-batches and processes.

    sound: whether loss and gradient of the last line are finite; the same in every process, for a NaN or an infinity
    anywhere reaches the means and the shared gradient. "skipped" counts the lines that are not; there, what is not
    finite is null.
    """

    def __init__(self, accelerator, path: Path, first_step: int):
        """On resume the lines from `first_step` on are dropped: those steps are done again."""
        self.accelerator, self.path, self.sums, self.count = accelerator, path, {}, 0
        self.since, self.tokens = time.time(), 0
        self.sound, self.skipped, self.unsound_in_a_row = True, 0, 0
        if accelerator.is_main_process:
            rows = [row for row in repair_jsonl(path, LOG) if row["step"] < first_step]
            self.skipped = rows[-1].get("skipped", 0) if rows else 0

            def write(temporary: Path) -> None:
                temporary.touch()
                for row in rows:
                    append_jsonl(temporary, row)
            write_aside(path, write)

    def add(self, tokens: int, **values) -> None:
        """Values of one pair: floats or scalar tensors; `tokens`: how many it took."""
        self.count += 1
        self.tokens += tokens
        for name, value in values.items():
            value = value.detach().float() if torch.is_tensor(value) else float(value)
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self, grad_norm: float) -> dict:
        """The means since the last line, and whether they and the gradient are finite, in `sound`."""
        names = sorted(self.sums)
        sums = torch.stack([torch.as_tensor(v, dtype=torch.float64, device="cpu")
                            for v in [self.count, self.tokens, *(self.sums[n] for n in names)]])
        sums = self.accelerator.reduce(sums.float().to(self.accelerator.device), reduction="sum").tolist()
        row = {name: total / max(1, sums[0]) for name, total in zip(names, sums[2:])} | {"grad_norm": grad_norm}
        self.sound = math.isfinite(row["loss"]) and math.isfinite(grad_norm)
        self.skipped += not self.sound
        self.unsound_in_a_row = 0 if self.sound else self.unsound_in_a_row + 1
        self.row, self.all_tokens = row, sums[1]
        self.sums, self.count, self.tokens = {}, 0, 0
        return row

    def write(self, step: int, learning_rate: float) -> dict:
        """Write and return the line of this step."""
        row = {"step": step, **self.row, "learning_rate": learning_rate,
               "tokens_per_second": self.all_tokens / (time.time() - self.since), "peak_memory_gb": peak_memory_gb()}
        row = {name: value if math.isfinite(value) else None for name, value in row.items()} | {"skipped": self.skipped}
        row = {name: round(value, 6) if isinstance(value, float) and abs(value) > 1e-2 else value
               for name, value in row.items()}
        self.since = time.time()
        if self.accelerator.is_main_process:
            append_jsonl(self.path, row)
        return row


def peak_memory_gb() -> float:
    """Most memory this process has held so far, in GB (10^9 bytes): GPU memory on CUDA, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
