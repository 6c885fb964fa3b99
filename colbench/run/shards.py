"""One stage's work split among machines: the i-th of n parts writes a file of its own."""
import re
from pathlib import Path

from colbench.run.errors import UserError


def shard(text):
    """(i, n) from "i/n", the i-th of n parts of the work, 1 <= i <= n. UserError for another text."""
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--shard {text}: i/n is wanted, the i-th of n parts, for instance 1/4")
    return int(found[1]), int(found[2])


def shard_path(path, part):
    """The file of one shard: trajectories.jsonl is trajectories-2of4.jsonl for (2, 4), and itself for (1, 1)."""
    path, (i, n) = Path(path), part
    return path if n == 1 else path.with_stem(f"{path.stem}-{i}of{n}")


def shards_hint(path, part):
    """What to do with the file of one shard when all are there, in one line."""
    end = Path(path).suffix
    stem = str(path).removesuffix(f"-{part[0]}of{part[1]}{end}")
    return (f"with all {part[1]} shards in one place: cat {stem}-*of{part[1]}{end} > {stem}{end}, "
            "and the same command without --shard puts them in order")
