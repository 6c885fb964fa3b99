"""What a stage keeps about how its output was made, and what it prints before it starts."""
import hashlib
import json
import re
import sys
from pathlib import Path

from colbench.run.errors import UserError
from colbench.run.fields import FROM_1, checked
from colbench.run.files import write_aside

# flags that change where, how much or how fast, but not what comes out
FREE = {"run", "preset", "trajectories", "preferences", "critic_folder", "policy", "policies",
        "names", "episodes", "metrics", "against", "n_tasks", "k", "shard", "parallel",
        "batch_tokens", "tokens_per_step", "gradient_checkpointing", "save_every", "max_tokens",
        "allow_weak_sandbox"}

# what is read back from an earlier stage's flags, and from metrics.json
FIELDS = {"env?": str, "model?": str, "load_in_4bit?": bool, "human?": str, "tasks?": str,
          "agent_prompt?": str, "temperature?": float, "max_turns?": FROM_1,
          "max_new_tokens?": FROM_1, "batch_tokens?": FROM_1, "tokens_per_step?": FROM_1,
          "critic?": str, "vision_critic?": str, "no_hidden_info?": bool,
          "no_length_norm?": bool, "official?": bool, "policies?": dict,
          "audit?": {"tasks": str, "flawed": dict}}


def hide_password(text):
    """A server's address without user, password and query; anything else unchanged."""
    if not isinstance(text, str) or not re.match(r"\w+://", text):
        return text
    scheme, _, rest = text.partition("://")
    name = rest.partition("#")[2]
    model = f"#{name}" if "#" in rest and "@" not in name else ""
    host, slash, path = rest.split("?")[0].split("#")[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}{model}"


def settings_file(output: Path) -> Path:
    """Where the flags behind `output` are: critic_args.json for critic/, episodes_args.json for
    episodes.jsonl."""
    return output.with_name(output.name.removesuffix(".jsonl") + "_args.json")


def read_json(path: Path) -> dict:
    """The object in a JSON file; {} if it is missing or damaged. UserError for a wrong field."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return checked(content, FIELDS, str(path)) if isinstance(content, dict) else {}


def write_json(path: Path, content: dict) -> None:
    """Write an object to a JSON file, aside and then renamed."""
    text = json.dumps(content, indent=1) + "\n"
    write_aside(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def keep_settings(output: Path, args, started: bool, free=(), refuse=False) -> None:
    """Keep a stage's flags next to its output, as OUTPUT_args.json.

    If `output` has an earlier start (or shards), its flags stay; one line on stderr
    names those that differ now. free: more flags that may differ. refuse: raise UserError instead,
    for results that would otherwise be reported under flags they were not made with. A path is
    named in place of `output`.
    """
    path = settings_file(output)
    now = {name: hide_password(value) for name, value in vars(args).items()
           if name not in FREE and name not in free}
    now = json.loads(json.dumps(now, default=str))
    shards = sorted(output.parent.glob(f"{output.name.removesuffix('.jsonl')}-*of*_args.json"))
    differing = []
    for kept in ([path] if path.exists() else shards) if started else ():
        earlier = read_json(kept)
        differing += [f"{flag(name)} {earlier[name]}, not {now[name]}"
                      for name in now if name in earlier and earlier[name] != now[name]]
    differing = "; ".join(dict.fromkeys(differing))
    if differing and refuse:
        what = output if refuse is True else refuse
        raise UserError(f"{what}: made with {differing}; choose another --run, or delete it to "
                        "start over")
    if not started or not path.exists():
        write_json(path, now)
    if differing:
        print(f"warning: {output}: made with {differing}; it stays as it is; choose another --run, "
              "or delete it to start over", file=sys.stderr)


def refuse_other(path: Path, args, names: list[str], what: str) -> None:
    """UserError if the flags `names` differ from those in the file `path`, or it is missing."""
    earlier = read_json(path)
    differing = [f"{flag(name)} {earlier.get(name)}, not {getattr(args, name, None)}"
                 for name in names if earlier.get(name) != getattr(args, name, None)]
    if differing:
        raise UserError(f"{what} with {'; '.join(differing)}: repeat these flags, or choose "
                        "another --run")


def flag(name: str) -> str:
    """no_hidden_info -> --no-hidden-info"""
    return "--" + name.replace("_", "-")


def keep_weights(output: Path, folders) -> None:
    """Keep in OUTPUT_weights.json which trained weights `output` is made with.

    UserError if one of `folders` has changed since: the file would mix results of both."""
    path = output.with_name(output.name.removesuffix(".jsonl") + "_weights.json")
    now = {str(folder): weights_of(Path(folder)) for folder in folders}
    earlier = read_json(path) if output.exists() and output.stat().st_size else {}
    for folder in now:
        if earlier.get(folder, now[folder]) != now[folder]:
            raise UserError(f"{output}: was made with earlier weights of {folder}; delete it to "
                            "make it again, or choose another --run")
    if earlier | now != earlier:
        write_json(path, earlier | now)


def weights_of(folder: Path) -> str:
    """A hash of trained weights: name, size and first megabyte of each file in a folder."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.pt")]):
        with open(path, "rb") as file:
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(1 << 20))
    return digest.hexdigest()[:16]


def plan(title: str, rows: dict) -> None:
    """Print a block: the title, then a line per name and text. Rows with None are left out."""
    rows = {name: text for name, text in rows.items() if text is not None}
    width = max(map(len, rows))
    lines = [f"  {name:{width}}  {text}" for name, text in rows.items()]
    print(f"\n{title}", *lines, "", sep="\n", flush=True)


def count(n: float) -> str:
    """A number in short: 1.9 M, 8.0 G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n:.0f}"


def next_step(script: str, args) -> str:
    """The command of the next stage, with the flags that continue the same run."""
    env = getattr(args, "env", "backend")
    flags = []
    if env != "backend":
        flags.append(f"--env {env}")
    if args.preset != "tiny":
        flags.append(f"--preset {args.preset}")
    if str(args.run) != default_run(args.preset, env):
        flags.append(f"--run {args.run}")
    for name, reader in (("trajectories", "train_critic.py"), ("preferences", "train_policy.py")):
        path = getattr(args, name, None)
        if script == reader and path and Path(path) != Path(args.run) / f"{name}.jsonl":
            flags.append(f"--{name} {path}")
    words = {word.partition("=")[0] for word in sys.argv[1:]}
    if "--model" in words and "://" not in args.model:
        flags.append(f"--model {args.model}")
    flags += [word for word in ("--load-in-4bit", "--no-load-in-4bit") if word in words]
    return " ".join(["next: python", script, *flags])


def default_run(preset: str, env: str) -> str:
    """The default of --run: runs/tiny, runs/llama-frontend, runs/tiny-twenty_questions."""
    return f"runs/{preset}" if env == "backend" else f"runs/{preset}-{Path(env).stem}"
