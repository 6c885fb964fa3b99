"""Plumbing of the two training scripts that is no part of the algorithm: the reference's log-probs on disk, checkpoints, step log."""

import hashlib
import json
import math
import os
import pickle
import resource
import sys
import time
import zipfile
from pathlib import Path

import torch
import transformers
from accelerate.utils import gather_object
from tqdm import tqdm

from colbench.files import UserError, append_jsonl, repair_jsonl, write_aside
from colbench.model import pack, tree_tokens
from colbench.show import keep_settings

DIVERGED = ("loss or gradient was NaN or infinite five times in a row; a checkpoint of the last sound weights is written; try a "
            "lower --learning-rate (delete the checkpoint to start anew), or give the same command to go on behind these batches")


def cached_logps(accelerator, path: Path, model, trees: list[tuple], budget: int, compute) -> list[list[torch.Tensor]]:
    """Log-probs of the messages of every tree under the frozen reference, which do not change: compute(trees of one forward pass),
    as message_logps gives them, called once for each group of at most `budget` tokens, the groups shared among the processes.

    A line of the file at `path` holds a group, under a hash of all that its log-probs depend on: weights, tokens, what lies in
    one row with them, precision, device, versions. So an interrupted pass goes on, and another run on the same pairs
    (another learning rate, say) does not repeat it.
    """
    rows = repair_jsonl(path) if accelerator.is_main_process else []
    accelerator.wait_for_everyone()
    known = {row["key"]: row["logps"] for row in rows or repair_jsonl(path)}
    weights, groups = weights_hash(model), pack([tree_tokens(tree) for tree in trees], budget)
    keys = [hashlib.sha256(json.dumps([weights, [trees[k] for k in group]]).encode()).hexdigest() for group in groups]
    todo = [g for g, key in enumerate(keys) if key not in known]
    for start in tqdm(range(0, len(todo), accelerator.num_processes), desc="reference", unit="batch",
                      disable=not accelerator.is_main_process or not todo):
        mine = todo[start + accelerator.process_index:][:1] if start + accelerator.process_index < len(todo) else []
        made = [{"key": keys[g], "logps": [[_floats(message) for message in tree] for tree in compute([trees[k] for k in groups[g]])]}
                for g in mine]
        for row in gather_object(made):
            known[row["key"]] = row["logps"]
            if accelerator.is_main_process:
                append_jsonl(path, row)
    return [[torch.tensor(message, device=accelerator.device) for message in tree] for key in keys for tree in known[key]]


def write_ranking(accelerator, path: Path, states: list[dict], missing: set, score) -> int:
    """Append a line for each of `states` whose (id, sample, turn) is `missing`, with the advantages that score(states) gives, a chunk at
    a time, shared among the processes. Returns how many are too long to be scored. After an interruption a chunk that lacks a
    state is computed as a whole: its batches, and with them the last bits, stay the same."""
    chunk, left_out = 16 * accelerator.num_processes, 0
    key = lambda row: (row["id"], row["sample"], row["turn"])  # noqa: E731
    sixteen = {key(state): i // 16 for i, state in enumerate(states)}  # sorted within these: one order for any number of processes
    bar = tqdm(total=len(states), desc="ranking", unit="state", disable=not accelerator.is_main_process)
    for start in range(0, len(states), chunk):
        if missing.isdisjoint(map(key, states[start:start + chunk])):
            bar.update(len(states[start:start + chunk]))
            continue
        mine = states[start:start + chunk][accelerator.process_index::accelerator.num_processes]
        with accelerator.autocast():
            scores = score(mine)
        for state, advantages in zip(mine, scores):
            del state["task"], state["max_turns"]  # the policy stage must not see c
            state["advantages"] = advantages
            if not advantages:
                state.update(candidates=[], left_out="longer than --max-tokens")
        rows = sorted(gather_object(mine), key=lambda row: (sixteen[key(row)], key(row)))
        for row in rows if accelerator.is_main_process else ():
            if key(row) in missing:
                append_jsonl(path, row)
                left_out += "left_out" in row
        bar.update(len(rows))
    bar.close()
    return left_out


def _floats(logps: torch.Tensor) -> list[float]:
    """float32 numbers as the shortest decimals that give the same float32 again."""
    return [float(str(value)) for value in logps.cpu().numpy()]


def weights_hash(model) -> str:
    """A hash of the base model: some numbers of every weight (training changes all), precision, device, versions."""
    digest = hashlib.sha256(f"{model.device.type} {torch.__version__} {transformers.__version__}".encode())
    for name, weight in model.named_parameters():
        if "lora_" not in name:
            some = weight.detach().flatten()[:64].cpu()
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)} {some.tolist()}".encode())
    return digest.hexdigest()


class ValueHead(torch.nn.Linear):
    """Stays in float32 under autocast: in bfloat16 candidates closer than a part in 256 would tie."""

    def forward(self, mean: torch.Tensor) -> torch.Tensor:
        with torch.autocast(mean.device.type, enabled=False):
            return super().forward(mean.float())


def value_head(model, folder: str | None = None) -> ValueHead:
    """The linear head of the critics `regression` and `value` on a message's mean last hidden state; starts at 0."""
    head = ValueHead(model.config.get_text_config().hidden_size, 1, device=model.device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    if folder:
        head.load_state_dict(torch.load(Path(folder) / "value_head.pt", map_location=model.device, weights_only=True))
    return head


def checkpoint_path(output: Path) -> Path:
    """Where training of `output` (a folder) keeps its checkpoint until it is done."""
    return output.with_name(output.name + ".checkpoint")


def previous(path: Path) -> Path:
    """Where the checkpoint before the newest one is."""
    return path.with_name(path.name + ".previous")


def save_checkpoint(accelerator, output: Path, model, optimizer, schedule, step: int, data) -> None:
    """Trained weights, optimiser and schedule after `step` steps on `data` (a hash), written aside and renamed; the one before is kept. Data
    order and random numbers need no state: the order is a function of seed and epoch, and each step sets its own seed."""
    if accelerator.is_main_process:
        path = checkpoint_path(output)
        weights = {n: p.detach().cpu() for n, p in accelerator.unwrap_model(model).named_parameters() if p.requires_grad}
        state = {"step": step, "data": data, "weights": weights, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:  # torch's own writer tells a full disk in its own words
                torch.save(state, file)
            if path.exists():
                os.replace(path, previous(path))
        write_aside(path, write)


def load_checkpoint(accelerator, output: Path, model, optimizer, schedule, args, data) -> int:
    """Restore what save_checkpoint wrote, or what it wrote the time before if that is damaged; returns the number of steps done,
    0 if there is no sound checkpoint. UserError where it was begun with other flags or on other data: the result would be of both."""
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
            raise UserError(f"{path}: was trained on other data than there is now; delete it to start anew, or choose another --run")
        parameters = {n: p for n, p in accelerator.unwrap_model(model).named_parameters() if p.requires_grad}
        if {n: p.shape for n, p in parameters.items()} != {n: p.shape for n, p in state["weights"].items()}:
            raise UserError(f"{path}: is of another model or --lora-rank; give that again, or delete the file to start anew")
        with torch.no_grad():
            for name, value in state["weights"].items():
                parameters[name].copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        return state["step"]
    return 0


def save_trained(accelerator, output: Path, model, tokenizer, settings: dict) -> None:
    """The result: a PEFT adapter folder (or a whole model after full fine-tuning) with its settings; ends the checkpoint."""
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
        for path in (newest, previous(newest), newest.with_name(f".{newest.name}.new")):  # the last: of a kill in mid-write
            path.unlink(missing_ok=True)
    accelerator.wait_for_everyone()


class StepLog:
    """One JSON line a step: the means of what was added since the last line, over micro-batches and processes.

    sound: whether loss and gradient of the last line are finite; the same in every process, for a NaN or an infinity anywhere
    reaches the means and the shared gradient. "skipped" counts the lines that are not; in these, what is not finite is null.
    """

    def __init__(self, accelerator, path: Path, first_step: int):
        """On resume the lines from `first_step` on are dropped: those steps are done again."""
        self.accelerator, self.path, self.sums, self.count = accelerator, path, {}, 0
        self.since, self.tokens = time.time(), 0
        self.sound, self.skipped, self.unsound_in_a_row = True, 0, 0
        if accelerator.is_main_process:
            rows = [row for row in repair_jsonl(path) if row["step"] < first_step]
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
            self.sums[name] = self.sums.get(name, 0.0) + (value.detach().float() if torch.is_tensor(value) else float(value))

    def write(self, step: int, **more: float) -> dict:
        """Write and return the line of this step; `more` are values that are the same in every process."""
        names = sorted(self.sums)
        device = self.accelerator.device
        sums = torch.stack([torch.as_tensor(v, dtype=torch.float64, device="cpu")
                            for v in [self.count, self.tokens, *(self.sums[n] for n in names)]])
        sums = self.accelerator.reduce(sums.float().to(device), reduction="sum").tolist()
        seconds = time.time() - self.since
        row = {"step": step, **{name: total / max(1, sums[0]) for name, total in zip(names, sums[2:])}, **more,
               "tokens_per_second": sums[1] / seconds, "peak_memory_gb": peak_memory_gb()}
        self.sound = math.isfinite(row["loss"]) and math.isfinite(row["gradient_norm"])
        self.skipped += not self.sound
        self.unsound_in_a_row = 0 if self.sound else self.unsound_in_a_row + 1
        row = {name: value if math.isfinite(value) else None for name, value in row.items()} | {"skipped": self.skipped}
        row = {name: round(value, 6) if isinstance(value, float) and abs(value) > 1e-2 else value for name, value in row.items()}
        self.sums, self.count, self.tokens, self.since = {}, 0, 0, time.time()
        if self.accelerator.is_main_process:
            append_jsonl(self.path, row)
        self.accelerator.log({name: value for name, value in row.items() if name != "step" and value is not None}, step=step)
        return row


def peak_memory_gb() -> float:
    """Most memory this process has held so far, in GB (10^9 bytes): GPU memory on CUDA, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
