"""evaluate.py --compare: the policies of finished runs against each other on the same tasks, pair by pair."""

from pathlib import Path

import numpy as np

from colbench.files import UserError, read_jsonl
from colbench.scorer import share, success
from colbench.tasks import failed


def compare(runs: list[str]) -> None:
    """Print, for every policy in RUN/episodes.jsonl of these runs, its difference to the first on the (task, sample) that both played:
    success and tests passed, each with a 95 % bootstrap interval over tasks, and wins, ties and losses; under both scorers."""
    episodes = {}
    for run in runs:
        path = Path(run) / "episodes.jsonl" if Path(run).is_dir() else Path(run)
        for line in read_jsonl(path, ("policy", "id", "sample", "outcome")):
            if not failed(line):
                name = line["policy"] if len(runs) == 1 else f"{run}: {line['policy']}"
                episodes.setdefault(name, {})[line["id"], line["sample"]] = line["scores"]
    if len(episodes) < 2:
        raise UserError(f"{' '.join(runs)}: two policies at least are wanted, these files hold {len(episodes)}")
    one, *others = episodes
    for other in others:
        shared = sorted(episodes[one].keys() & episodes[other].keys())
        print(f"\n{other}  against  {one}: {len(shared)} episodes on {len({task for task, _ in shared})} tasks that both played")
        for mode in ("fixed", "official") if shared else ():
            wins, shares = ([(f(episodes[other][key], mode), f(episodes[one][key], mode)) for key in shared] for f in (success, share))
            for name, pairs in (("success", wins), ("tests passed", shares)):
                difference, (low, high) = paired(pairs, [task for task, _ in shared])
                print(f"  {mode:8}  {name:12}  {np.mean([a for a, _ in pairs]):6.1%} - {np.mean([b for _, b in pairs]):6.1%} = "
                      f"{difference:+7.1%}  [{low:+.1%}, {high:+.1%}]   wins {sum(a > b for a, b in pairs)}, "
                      f"ties {sum(a == b for a, b in pairs)}, losses {sum(a < b for a, b in pairs)}")


def paired(pairs: list[tuple[float, float]], tasks: list[str]) -> tuple[float, tuple[float, float]]:
    """(mean difference, 95 % interval) of pairs of values: percentiles of 10,000 means over resampled tasks, since episodes of one
    task are not independent."""
    by_task = {}
    for (a, b), task in zip(pairs, tasks):
        by_task.setdefault(task, []).append(float(a) - float(b))
    sums, counts = np.array([(sum(d), len(d)) for d in by_task.values()]).T
    rows = np.random.default_rng(0).integers(len(sums), size=(10_000, len(sums)))
    low, high = np.percentile(sums[rows].sum(1) / counts[rows].sum(1), [2.5, 97.5])
    return float(sums.sum() / counts.sum()), (float(low), float(high))
