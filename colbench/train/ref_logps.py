"""The frozen reference's log-probs on disk: they do not change, so they are computed once."""
import hashlib
import json
from pathlib import Path

import torch
import transformers
from accelerate.utils import gather_object
from tqdm import tqdm

from colbench.lm.logps import pack, tree_tokens
from colbench.run.files import append_jsonl, repair_jsonl


def cached_ref_logps(accelerator, path: Path, model, trees: list[tuple], budget: int,
                 compute) -> list[list[torch.Tensor]]:
    """Log-probs of the messages of every tree under the frozen reference, which do not change.

    compute(trees of one forward pass) gives them as message_logps does. It is called once for each group of at most
    `budget` tokens; the groups are shared among the processes.

    A line of the file at `path` holds a group, under a hash of all that its log-probs depend on: weights, tokens, what
    lies in one row with them, precision, device, versions. So an interrupted pass goes on, and another run on the same
    pairs (another learning rate, say) does not repeat it.
    """
    kind = {"key": str, "logps": list}
    rows = repair_jsonl(path, kind) if accelerator.is_main_process else []
    accelerator.wait_for_everyone()
    known = {row["key"]: row["logps"] for row in rows or repair_jsonl(path, kind)}
    weights, groups = weights_hash(model), pack([tree_tokens(tree) for tree in trees], budget)
    keys = [hashlib.sha256(json.dumps([weights, [trees[k] for k in group]]).encode()).hexdigest() for group in groups]
    todo = [g for g, key in enumerate(keys) if key not in known]
    for start in tqdm(range(0, len(todo), accelerator.num_processes), desc="reference", unit="batch",
                      disable=not accelerator.is_main_process or not todo):
        mine = todo[start + accelerator.process_index:][:1] if start + accelerator.process_index < len(todo) else []
        made = []
        for g in mine:
            logps = compute([trees[k] for k in groups[g]])
            made.append({"key": keys[g], "logps": [[_floats(message) for message in tree] for tree in logps]})
        for row in gather_object(made):
            known[row["key"]] = row["logps"]
            if accelerator.is_main_process:
                append_jsonl(path, row)
    return [[torch.tensor(message, device=accelerator.device) for message in tree]
            for key in keys for tree in known[key]]


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
