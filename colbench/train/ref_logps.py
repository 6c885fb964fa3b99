"""log π_ref on disk: the base model does not change, so its log-probs are computed once."""
import hashlib
import json
from pathlib import Path

import torch
import transformers
from accelerate.utils import gather_object
from tqdm import tqdm

from colbench.lm.logps import Tree, pack, tree_tokens
from colbench.run.files import append_jsonl, repair_jsonl

ROW = {"key": str, "logps": list}


def cached_ref_logps(accelerator, path: Path, base_model, trees: list[Tree], budget: int,
                     base_logps) -> list[list[torch.Tensor]]:
    """log π_ref of the messages of every tree: per tree a list over messages of (L,) float32.

    base_logps(trees of one forward pass) computes them, as message_logps does. It is called once
    per batch of at most `budget` tokens; the processes share the batches.

    Each line of the file at `path` holds one batch under a hash of everything its log-probs depend
    on: weights, tokens, their neighbours in the row, precision, device, versions. So an interrupted
    pass resumes, and another run on the same pairs (another learning rate, say) does not repeat it.
    """
    rows = repair_jsonl(path, ROW) if accelerator.is_main_process else []
    accelerator.wait_for_everyone()
    cache = {row["key"]: row["logps"] for row in rows or repair_jsonl(path, ROW)}
    model_hash = hash_of_base_model(base_model)
    batches = [[trees[k] for k in batch] for batch in pack(list(map(tree_tokens, trees)), budget)]
    keys = [hashlib.sha256(json.dumps([model_hash, batch]).encode()).hexdigest()
            for batch in batches]
    todo = [(key, batch) for key, batch in zip(keys, batches) if key not in cache]
    n = accelerator.num_processes
    for start in tqdm(range(0, len(todo), n), desc="log π_ref", unit="batch",
                      disable=not accelerator.is_main_process or not todo):
        made = []
        for key, batch in todo[start:start + n][accelerator.process_index:][:1]:
            logps = [[shortest_floats(message) for message in tree] for tree in base_logps(batch)]
            made.append({"key": key, "logps": logps})
        for row in gather_object(made):
            cache[row["key"]] = row["logps"]
            if accelerator.is_main_process:
                append_jsonl(path, row)
    return [[torch.tensor(message, device=accelerator.device) for message in tree]
            for key in keys for tree in cache[key]]


def shortest_floats(logps: torch.Tensor) -> list[float]:
    """float32 numbers as the shortest decimals that read back as the same float32."""
    return [float(str(value)) for value in logps.cpu().numpy()]


def hash_of_base_model(model) -> str:
    """A hash of the first numbers of every weight, precision, device and versions."""
    versions = f"{model.device.type} {torch.__version__} {transformers.__version__}"
    digest = hashlib.sha256(versions.encode())
    for name, weight in model.named_parameters():
        if "lora_" not in name:
            some = weight.detach().flatten()[:64].cpu()
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)} {some.tolist()}".encode())
    return digest.hexdigest()
