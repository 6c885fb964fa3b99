"""What a stage keeps about how its output was made, and what it prints before it starts."""
import hashlib
import json
import re
import sys
from pathlib import Path

from colbench.run.errors import UserError
from colbench.run.fields import FROM_1, checked
from colbench.run.files import write_aside

# flags that say where, how much or how fast, and not what comes out
FREE = {"run", "preset", "trajectories", "preferences", "critic_folder", "policy", "policies", "names", "episodes",
        "metrics", "against", "n_tasks", "k", "shard", "parallel", "batch_tokens", "tokens_per_step",
        "gradient_checkpointing", "save_every", "max_tokens", "allow_weak_sandbox"}

# what is read again of an earlier stage's flags, and of metrics.json
FIELDS = {"env?": str, "model?": str, "load_in_4bit?": bool, "human?": str, "tasks?": str, "agent_prompt?": str,
          "temperature?": float, "max_turns?": FROM_1, "max_new_tokens?": FROM_1, "batch_tokens?": FROM_1,
          "tokens_per_step?": FROM_1, "critic?": str, "vision_critic?": str, "no_hidden_info?": bool,
          "no_length_norm?": bool, "official?": bool, "policies?": dict, "audit?": {"tasks": str, "flawed": dict}}


def hide_password(text):
    """`text` for people and files: a server's address without user, password and query; anything else as it is."""
    if not isinstance(text, str) or not re.match(r"\w+://", text):
        return text
    scheme, _, rest = text.partition("://")
    model = "#" + rest.partition("#")[2] if "#" in rest and "@" not in rest.partition("#")[2] else ""
    host, slash, path = rest.split("?")[0].split("#")[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}{model}"


def settings_file(output: Path) -> Path:
    """Where `output`'s flags are kept: critic_args.json for critic/, episodes_args.json for episodes.jsonl."""
    return output.with_name(output.name.removesuffix(".jsonl") + "_args.json")


def read_json(path: Path) -> dict:
    """The object in a JSON file; {} for none, or one that is damaged. UserError for a field of a wrong kind."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return checked(found, FIELDS, str(path)) if isinstance(found, dict) else {}


def keep_settings(output: Path, args, begun: bool, free=(), refuse=False) -> None:
    """Keep a stage's flags beside its output, as OUTPUT_args.json. Where `output` was begun by an earlier call, or by
    those of its shards, print one line to stderr that names the flags that differ now: what is there stays as it was
    made. free: more flags that may differ. refuse: a UserError instead of the line, for results that would stand
    under flags they were not made with."""
    path = settings_file(output)
    now = {name: hide_password(value) for name, value in vars(args).items() if name not in FREE and name not in free}
    now = json.loads(json.dumps(now, default=str))
    shards = sorted(output.parent.glob(f"{output.name.removesuffix('.jsonl')}-*of*_args.json"))
    other = []
    for kept in ([path] if path.exists() else shards) if begun else ():
        before = read_json(kept)
        other += [f"{flag(name)} {before[name]}, not {now[name]}"
                  for name in now if name in before and before[name] != now[name]]
    if other and refuse:
        raise UserError(f"{refuse if isinstance(refuse, str) else output} was begun with "
                        f"{'; '.join(dict.fromkeys(other))}: choose another --run, or delete it to start anew")
    if not begun or not path.exists():
        write_aside(path, lambda temporary: temporary.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8"))
    if other:
        print(f"warning: {output} was begun with {'; '.join(other)}: what is there stays; choose another --run, "
              "or delete it to start anew", file=sys.stderr)


def refuse_other(path: Path, args, names: list[str], what: str) -> None:
    """UserError where the flags `names` are others than those in the file `path`, or there is no such file."""
    before = read_json(path)
    other = [f"{flag(name)} {before.get(name)}, not {getattr(args, name, None)}"
             for name in names if before.get(name) != getattr(args, name, None)]
    if other:
        raise UserError(f"{what} with {'; '.join(other)}: give the same flags, or choose another --run")


def flag(name: str) -> str:
    """no_hidden_info -> --no-hidden-info"""
    return "--" + name.replace("_", "-")


def keep_weights(output: Path, folders) -> None:
    """Keep in OUTPUT_weights.json which trained weights `output` is made with. UserError where one of `folders` holds
    other weights than made what is in `output` already: the same file would hold results of both."""
    path = output.with_name(output.name.removesuffix(".jsonl") + "_weights.json")
    now = {str(folder): weights_of(Path(folder)) for folder in folders}
    before = read_json(path) if output.exists() and output.stat().st_size else {}
    for folder in now:
        if before.get(folder, now[folder]) != now[folder]:
            raise UserError(f"{output}: was made with earlier weights of {folder}; delete it to make it anew, "
                            "or choose another --run")
    if before | now != before:
        text = json.dumps(before | now, indent=1) + "\n"
        write_aside(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def weights_of(folder: Path) -> str:
    """A hash of a folder's trained weights: name, size and first megabyte of each file, training changes it all."""
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


def count(n: float) -> str:
    """A number for people: 1.9 M, 8.0 G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n:.0f}"


def next_step(script: str, args) -> str:
    """The command of the next stage, with the flags that make it the same run."""
    env = getattr(args, "env", "backend")
    flags = [f"--env {env}"] * (env != "backend") + [f"--preset {args.preset}"] * (args.preset != "tiny")
    flags += [f"--run {args.run}"] * (str(args.run) != default_run(args.preset, env))
    for name, reader in (("trajectories", "train_critic.py"), ("preferences", "train_policy.py")):
        if script == reader and hasattr(args, name) and Path(getattr(args, name)) != Path(args.run) / f"{name}.jsonl":
            flags.append(f"--{name} {getattr(args, name)}")
    words = {word.partition("=")[0] for word in sys.argv[1:]}
    flags += [f"--model {hide_password(args.model)}"] * ("--model" in words and "://" not in args.model)
    flags += [word for word in ("--load-in-4bit", "--no-load-in-4bit") if word in words]
    return " ".join(["next: python", script, *flags])


def default_run(preset: str, env: str) -> str:
    """The folder of a run where no --run is given: runs/tiny, runs/llama-frontend, runs/tiny-twenty_questions."""
    return f"runs/{preset}" + f"-{Path(env).stem}" * (env != "backend")
