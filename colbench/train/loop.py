"""Code that both trainers share, without formulas: flags, the log of the steps, checkpoints."""
import json
import math
import os
import pickle
import resource
import sys
import time
import zipfile
from argparse import ArgumentParser, BooleanOptionalAction
from pathlib import Path

import torch
from accelerate.utils import gather_object

from colbench.run.errors import UserError
from colbench.run.fields import COUNT
from colbench.run.files import append_jsonl, repair_jsonl, write_aside
from colbench.run.settings import keep_settings

LOG = {"step": COUNT, "skipped?": COUNT}  # the fields of a log line that are read again
DIVERGED = ("loss or gradient was NaN or infinite five times in a row; a checkpoint of the last "
            "finite weights is saved; try a lower --learning-rate (delete the checkpoint to start "
            "over), or repeat the command to continue after these batches")
OUT_OF_MEMORY = "lower --tokens-per-step (the batch stays the same) or --max-tokens"


# ---- flags

def add_training_flags(parser: ArgumentParser) -> None:
    """Add the flags that both trainers have: the model, and how it is optimised."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="hub id or folder")
    group.add_argument("--load-in-4bit", action=BooleanOptionalAction, help="NF4 weights")
    group.add_argument("--lora-rank", type=int,
                       help="rank of the LoRA adapters; 0 trains all weights")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--learning-rate", type=float,
                       help="peak; 10%% linear warm-up, then linear decay")
    group.add_argument("--epochs", type=int, help="passes over the pairs")
    group.add_argument("--batch-size", type=int,
                       help="pairs per step; train_policy.py rounds it down to whole states")
    group.add_argument("--tokens-per-step", type=int,
                       help="tokens in one forward pass: lower it when memory runs out; the batch "
                       "stays the same")
    group.add_argument("--max-tokens", type=int,
                       help="leave out longer trajectories, or pairs with their prompt")
    group.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    group.add_argument("--seed", type=int, default=0,
                       help="for pairs, their order, and LoRA's initial weights")


# ---- the log of the steps

class StepLog:
    """One JSON line per step: means over the pairs of the batch, over all processes.

    A step whose loss or gradient is not finite has null for these values and counts as "skipped".
    nats: the mean −log π_ref of a message, and of what a margin compares. With it each line also
    has "margin/nats", and a fall of the chosen messages' log-probs is reported.
    """

    def __init__(self, accelerator, output: Path, bar, first_step: int,
                 nats: tuple[float, float] | None = None):
        """output: what is trained; the log is OUTPUT_log.jsonl. bar: tqdm's.

        Lines from first_step on are dropped: a resumed run repeats those steps."""
        self.accelerator, self.bar, self.nats = accelerator, bar, nats
        self.path = output.with_name(output.name + "_log.jsonl")
        self.sums, self.count, self.tokens, self.since = {}, 0, 0, time.time()
        self.skipped = self.skipped_in_a_row = 0
        self.log_ratios, self.warned = [], False
        if not accelerator.is_main_process:
            return
        rows = [row for row in repair_jsonl(self.path, LOG) if row["step"] < first_step]
        if rows:
            self.skipped = rows[-1].get("skipped", 0)

        def write(temporary: Path) -> None:
            temporary.touch()
            for row in rows:
                append_jsonl(temporary, row)
        write_aside(self.path, write)

    def add(self, tokens: float, **values) -> None:
        """Add the values of one pair (floats or scalar tensors) and the tokens it took."""
        self.count += 1
        self.tokens += tokens
        for name, value in values.items():
            value = value.detach().float() if torch.is_tensor(value) else float(value)
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """The mean of each value over all pairs since the last call, the same in every process."""
        sums = {name: torch.as_tensor(total, dtype=torch.float32).item()
                for name, total in self.sums.items()}
        parts = gather_object([(self.count, self.tokens, sums)])
        self.sums, self.count, self.tokens = {}, 0, 0
        n_pairs = sum(count for count, _, _ in parts)
        self.batch_tokens = sum(tokens for _, tokens, _ in parts)
        names = sorted({name for *_, sums in parts for name in sums})
        return {name: sum(sums.get(name, 0.0) for *_, sums in parts) / n_pairs for name in names}

    def write(self, step: int, means: dict, grad_norm: float, learning_rate: float) -> None:
        """Write the line of a step and show it in the progress bar."""
        finite = math.isfinite(means["loss"]) and math.isfinite(grad_norm)
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        row = {"step": step, **means, "grad_norm": grad_norm}
        if self.nats:
            row["margin/nats"] = row["margin"] / self.nats[1]
        row["learning_rate"] = learning_rate
        row["tokens_per_second"] = self.batch_tokens / (time.time() - self.since)
        row["peak_memory_gb"] = peak_memory_gb()
        row = {name: for_json(value) for name, value in row.items()} | {"skipped": self.skipped}
        self.since = time.time()
        if self.accelerator.is_main_process:
            append_jsonl(self.path, row)
        shown = {"loss": "loss", "accuracy": "rewards/accuracies", "margin/nats": "margin/nats",
                 "log-ratio of chosen": "log_ratio/chosen", "skipped": "skipped"}
        self.bar.set_postfix({label: row[name] for label, name in shown.items()
                              if row.get(name) is not None})
        if self.nats and row["log_ratio/chosen"] is not None:
            self.warn_of_displacement(row["log_ratio/chosen"])

    def warn_of_displacement(self, log_ratio: float) -> None:
        """Warn once if, over 20 steps, the chosen messages became less likely than under π_ref."""
        self.log_ratios = [*self.log_ratios[-19:], log_ratio]
        fall = -sum(self.log_ratios) / len(self.log_ratios)
        if not self.warned and len(self.log_ratios) == 20 and fall > 0.1 * self.nats[0]:
            self.warned = True
            self.bar.write(
                f"warning: the chosen messages, {self.nats[0]:.3g} nats each under the base model, "
                f"became less likely by {fall:.2g} nats (likelihood displacement): raise "
                "--nll-weight (not with --official) or --beta", file=sys.stderr)


def for_json(value: float) -> float | None:
    """None for NaN and infinity; six decimals are enough for larger numbers."""
    if not math.isfinite(value):
        return None
    if isinstance(value, float) and abs(value) > 1e-2:
        return round(value, 6)
    return value


def peak_memory_gb() -> float:
    """Peak memory of this process in GB (10^9 bytes): GPU memory on CUDA, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ---- the checkpoint

def checkpoint_path(output: Path) -> Path:
    """Where training of `output` (a folder) keeps its checkpoint until it is done."""
    return output.with_name(output.name + ".checkpoint")


def previous(path: Path) -> Path:
    """Where the checkpoint before the newest one is."""
    return path.with_name(path.name + ".previous")


def save_checkpoint(accelerator, output: Path, model, optimizer, schedule, step: int, data) -> None:
    """Save trained weights, optimiser and schedule after `step` steps on `data` (a hash).

    Written aside and renamed; the one before is kept. The order of the data needs no state: it is
    a function of seed and epoch."""
    if not accelerator.is_main_process:
        return
    path = checkpoint_path(output)
    weights = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
    state = {"step": step, "data": data, "weights": weights, "optimizer": optimizer.state_dict(),
             "schedule": schedule.state_dict()}

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # torch's own writer reports a full disk differently
            torch.save(state, file)
        if path.exists():
            os.replace(path, previous(path))
    write_aside(path, write)


def load_checkpoint(output: Path, model, optimizer, schedule, args, data) -> int:
    """Restore what save_checkpoint wrote and return the number of steps done, 0 without one.

    A damaged checkpoint is reported and the one before is used. UserError where it was made with
    other flags or data."""
    if checkpoint_path(output).exists():
        keep_settings(output, args, started=True,
                      refuse=checkpoint_path(output))
    for path in (checkpoint_path(output), previous(checkpoint_path(output))):
        state = read_checkpoint(path)
        if state is None:
            continue
        if state["data"] != data:
            raise UserError(f"{path}: was trained on different data; delete it to start over, or "
                            "choose another --run")
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        shapes = {name: p.shape for name, p in parameters.items()}
        if shapes != {name: p.shape for name, p in state["weights"].items()}:
            raise UserError(f"{path}: belongs to another model or --lora-rank; repeat that flag, "
                            "or delete the file to start over")
        with torch.no_grad():
            for name, value in state["weights"].items():
                parameters[name].copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        return state["step"]
    return 0


def read_checkpoint(path: Path) -> dict | None:
    """The content of a checkpoint. None without one, and for a damaged one, which is reported."""
    if not path.exists():
        return None
    try:
        damaged = zipfile.ZipFile(path).testzip()  # compares checksums, which torch.load does not
        if not damaged:
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile,
            pickle.UnpicklingError) as error:
        damaged = " ".join(str(error).split())[:80]
    print(f"{path}: damaged ({damaged}), using the one before", file=sys.stderr)
    return None


def save_trained(accelerator, output: Path, model, tokenizer, settings: dict) -> None:
    """Save the result, a PEFT adapter (or all weights) with its settings; delete the checkpoint."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        def write(temporary: Path) -> None:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            if hasattr(model, "value_head"):
                torch.save(model.value_head.state_dict(), temporary / "value_head.pt")
            text = json.dumps(settings, indent=1, default=str) + "\n"
            (temporary / "training_args.json").write_text(text)
            (temporary / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        write_aside(output, write)
        newest = checkpoint_path(output)
        torn = newest.with_name(f".{newest.name}.new")  # left by a kill during a write
        for path in (newest, previous(newest), torn):
            path.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
