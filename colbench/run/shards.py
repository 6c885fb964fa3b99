"""Split one stage's work among machines: the i-th of n parts writes its own file."""
import re
from pathlib import Path

from colbench.run.errors import UserError


def shard(text):
    """(i, n) from "i/n", the i-th of n parts of the work, 1 <= i <= n. UserError otherwise."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard {text}: expected i/n, the i-th of n parts, for example 1/4")
    return int(match[1]), int(match[2])


def shard_path(path, part):
    """The file of one shard: trajectories-2of4.jsonl for (2, 4), trajectories.jsonl for (1, 1)."""
    path, (i, n) = Path(path), part
    return path if n == 1 else path.with_stem(f"{path.stem}-{i}of{n}")


def shards_hint(path, part):
    """One line on what to do when all shards are finished."""
    end = Path(path).suffix
    stem = str(path).removesuffix(f"-{part[0]}of{part[1]}{end}")
    return (f"with all {part[1]} shards in one place: cat {stem}-*of{part[1]}{end} > {stem}{end}, "
            "then run the same command without --shard to put them in order")
