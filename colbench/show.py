"""What a stage prints before it starts: what will be done with what. One block of aligned lines, and the figures in it."""
import hashlib
import json
import resource
import sys
from pathlib import Path

import torch

from colbench.files import UserError, write_aside
from colbench.model import LOGITS_AT_ONCE
from colbench.server import shown

FREE = {"run", "preset", "trajectories", "preferences", "critic_folder", "policy", "policies", "names", "episodes", "metrics", "against",
        "n_tasks", "k", "shard", "parallel", "tabs", "batch_tokens", "tokens_per_step", "gradient_checkpointing", "save_every", "log_with",
        "max_tokens", "retry_errors", "allow_weak_sandbox", "compare", "talk"}  # flags that say where, how much or how fast, not what comes out


def keep_settings(output: Path, args, begun: bool, free=(), refuse=False) -> None:
    """Keep a stage's flags beside its output, as OUTPUT_args.json. Where `output` was begun by an earlier call, or by those of its
    shards, print one line to stderr that names the flags that differ now: what is there stays as it was made. free: more flags that
    may differ. refuse: a UserError instead of the line, for results that would stand under a flag that they were not made with."""
    stem = output.name.removesuffix(".jsonl")
    path = output.with_name(f"{stem}_args.json")
    now = {name: shown(value) for name, value in vars(args).items() if name not in FREE and name not in free}
    now = json.loads(json.dumps(now, default=str))
    other = []
    for kept in ([path] if path.exists() else sorted(output.parent.glob(f"{stem}-*of*_args.json"))) if begun else ():
        try:
            before = json.loads(kept.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # a damaged file says nothing
            continue
        other += [f"--{name.replace('_', '-')} {before[name]}, not {now[name]}" for name in now if name in before and before[name] != now[name]]
    if other and refuse:
        raise UserError(f"{refuse if isinstance(refuse, str) else output} was begun with {'; '.join(dict.fromkeys(other))}: choose another "
                        "--run, or delete it to start anew")
    if not begun or not path.exists():
        write_aside(path, lambda temporary: temporary.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8"))
    if other:
        print(f"warning: {output} was begun with {'; '.join(other)}: what is there stays; choose another --run, or delete it to start anew",
              file=sys.stderr)


def refuse_other(path: Path, args, names: list[str], what: str) -> None:
    """UserError where the flags `names` are others than those in the file `path`, or there is no such file."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    other = [f"--{name.replace('_', '-')} {before.get(name)}, not {getattr(args, name)}" for name in names if before.get(name) != getattr(args, name)]
    if other:
        raise UserError(f"{what} with {'; '.join(other)}: give the same flags, or choose another --run")


def keep_weights(output: Path, folders) -> None:
    """Keep in OUTPUT_weights.json which trained weights `output` is made with. UserError where the weights in one of `folders` are
    others than those that made what is in `output` already: the same file would hold results of both."""
    path = output.with_name(output.name.removesuffix(".jsonl") + "_weights.json")
    now = {str(folder): fingerprint(Path(folder)) for folder in folders}
    try:
        before = json.loads(path.read_text(encoding="utf-8")) if output.exists() and output.stat().st_size else {}
    except (OSError, ValueError):  # made elsewhere, or by an earlier version
        before = {}
    for folder in now:
        if before.get(folder, now[folder]) != now[folder]:
            raise UserError(f"{output}: was made with earlier weights of {folder}; delete it to make it anew, or choose another --run")
    if before | now != before:
        write_aside(path, lambda temporary: temporary.write_text(json.dumps(before | now, indent=1) + "\n", encoding="utf-8"))


def fingerprint(folder: Path) -> str:
    """A hash of the trained weights in a folder: name, size and first megabyte of each file (training changes all of it)."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.pt")]):
        with open(path, "rb") as file:
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(1 << 20))
    return digest.hexdigest()[:16]


def plan(title: str, rows: dict) -> None:
    """Print a block: the title, then a line for each name and text. Rows with nothing to say (None) are left out."""
    rows = {name: text for name, text in rows.items() if text is not None}
    width = max(map(len, rows))
    print(f"\n{title}", *(f"  {name:{width}}  {text}" for name, text in rows.items()), "", sep="\n", flush=True)


def model_row(model, name: str, training: bool = False) -> str:
    """Its name, number of weights and the bytes they take; with `training` also how many are trained."""
    weights = model.num_parameters() if hasattr(model, "num_parameters") else sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = f"{name}: {count(weights)} weights in {model.get_memory_footprint() / 1e9:.2f} GB on {model.device}"
    return size + f", {count(trained)} of them are trained" * training


def count(n: float) -> str:
    """A number for people: 1.9 M, 8.0 G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n:.0f}"


def memory_now(device) -> float:
    """Bytes held at this moment: on the GPU by tensors, else the most the process has had resident."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def sampling_memory(model, batch_tokens: int) -> str:
    """Estimate for sampling `batch_tokens` tokens at a time: what is held now, their keys and values with room to grow, and the activations
    of one layer while the prompts are read."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 9 / 8 * config.num_hidden_layers * 2 * heads * width
    layer = 4 * config.hidden_size + 3 * config.intermediate_size
    total = memory_now(model.device) + batch_tokens * (cache + layer) * model.dtype.itemsize
    return f"at most about {total / 1e9:.1f} GB while sampling (--batch-tokens {batch_tokens:,})"


def training_memory(model, tokens: int, checkpointing: bool) -> str:
    """Estimate for training with `tokens` tokens in one pass: what is held now, gradients and Adam's two moments of what is
    trained, activations (of one layer at a time with gradient checkpointing), mask, and one chunk of logits with its gradient."""
    config = model.config.get_text_config()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    hidden, inner = config.hidden_size, config.intermediate_size
    layer = tokens * (14 * hidden + 6 * inner) * model.dtype.itemsize  # kept for the backward pass, LoRA's inputs included
    layers = config.num_hidden_layers
    activations = layer + layers * tokens * hidden * model.dtype.itemsize if checkpointing else layers * layer
    logits = 3 * 4 * min(LOGITS_AT_ONCE, tokens * config.vocab_size)
    total = memory_now(model.device) + 12 * trained + activations + tokens**2 + logits
    return f"about {total / 1e9:.1f} GB with up to {tokens:,} tokens in one pass (--tokens-per-step)"


def training_plan(title: str, args, model, steps: int, first: int, batch: str, tokens: int, output) -> None:
    """The block of a training script. first: steps done by an interrupted run; tokens: of all epochs."""
    from accelerate.state import PartialState
    processes = PartialState().num_processes
    plan(title, {
        "model": model_row(model, args.model, training=True),
        "processes": processes if processes > 1 else None,
        "steps": f"{steps} of {batch}, {args.epochs} epochs, learning rate {args.learning_rate:g}"
                 + f", {first} are done" * (first > 0),
        "tokens": f"about {count(tokens)} in all",
        "memory": training_memory(model, args.tokens_per_step, args.gradient_checkpointing),
        "output": f"{output}; curves at any time: python -m colbench.report {args.run}"})


def next_step(script: str, args) -> str:
    """The command of the next stage, with the flags that make it the same run."""
    flags = ["--env frontend"] * (getattr(args, "env", None) == "frontend") + [f"--preset {args.preset}"] * (args.preset != "tiny")
    frontend = "-frontend" * (getattr(args, "env", None) == "frontend")
    flags += [f"--run {args.run}"] * (str(args.run) != f"runs/{args.preset}{frontend}")
    flags += [f"--{name} {getattr(args, name)}" for name, reader in (("trajectories", "train_critic.py"), ("preferences", "train_policy.py"))
              if script == reader and Path(getattr(args, name)) != Path(args.run) / f"{name}.jsonl"]
    given = {word.partition("=")[0] for word in sys.argv[1:]}
    flags += [f"--model {args.model}"] * ("--model" in given)
    flags += [flag for flag in ("--load-in-4bit", "--no-load-in-4bit") if flag in given]
    return " ".join(["next: python", script, *flags])
