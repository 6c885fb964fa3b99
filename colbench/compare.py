"""evaluate.py --compare: the policies of finished runs against each other on the same tasks, pair by pair. Intervals over tasks."""

from functools import partial
from pathlib import Path

import numpy as np

from colbench.files import UserError, read_jsonl
from colbench.scorer import share, success
from colbench.tasks import failed


def compare(runs: list[str]) -> None:
    """Print, for every policy in RUN/episodes.jsonl of these runs, its difference to the first on the (task, sample) that both played,
    with a 95 % bootstrap interval over tasks, and wins, ties and losses: success and tests passed, both under both scorers, or the
    similarity of Frontend Design."""
    episodes = {}
    for run in runs:
        path = Path(run) / "episodes.jsonl" if Path(run).is_dir() else Path(run)
        for line in read_jsonl(path, ("policy", "id", "sample", "outcome")):
            if not failed(line):
                name = line["policy"] if len(runs) == 1 else f"{run}: {line['policy']}"
                episodes.setdefault(name, {})[line["id"], line["sample"]] = line["scores"]
    if len(episodes) < 2:
        raise UserError(f"{' '.join(runs)}: two policies at least are wanted, these files hold {len(episodes)}")
    kinds = {"similarity" in scores for played in episodes.values() for scores in played.values()}
    if len(kinds) > 1:
        raise UserError(f"{' '.join(runs)}: runs of Backend Programming and of Frontend Design do not compare")
    measures = {"similarity": lambda scores: scores["similarity"]} if kinds == {True} else {
        f"{mode:8}  {name:12}": partial(f, mode=mode) for mode in ("fixed", "official") for name, f in (("success", success), ("tests passed", share))}
    one, *others = episodes
    for other in others:
        shared = sorted(episodes[one].keys() & episodes[other].keys())
        print(f"\n{other}  against  {one}: {len(shared)} episodes on {len({task for task, _ in shared})} tasks that both played")
        for name, measure in measures.items() if shared else ():
            pairs = [(float(measure(episodes[other][key])), float(measure(episodes[one][key]))) for key in shared]
            difference, (low, high) = paired(pairs, [task for task, _ in shared])
            ties = sum(abs(a - b) < 1e-6 for a, b in pairs)
            wins = sum(a > b and abs(a - b) >= 1e-6 for a, b in pairs)
            print(f"  {name}  {np.mean([a for a, _ in pairs]):6.1%} - {np.mean([b for _, b in pairs]):6.1%} = "
                  f"{difference:+7.1%}  [{low:+.1%}, {high:+.1%}]   wins {wins}, ties {ties}, losses {len(pairs) - wins - ties}")


def paired(pairs: list[tuple[float, float]], tasks: list[str]) -> tuple[float, tuple[float, float]]:
    """(mean difference, its 95 % interval) of pairs of values, one pair an episode of a task."""
    differences = [float(a) - float(b) for a, b in pairs]
    return float(np.mean(differences)), bootstrap(differences, tasks)


def bootstrap(values, tasks) -> tuple[float, float]:
    """95 % interval of a mean over episodes: percentiles of 10,000 means over resampled tasks, since episodes of one task are not
    independent. tasks: the id of each value's task. (0, 1) without values."""
    if not len(values):
        return 0.0, 1.0
    by_task = {}
    for value, task in zip(values, tasks):
        by_task.setdefault(task, []).append(float(value))
    sums, counts = np.array([(sum(of_task), len(of_task)) for of_task in by_task.values()]).T
    rows = np.random.default_rng(0).integers(len(sums), size=(10_000, len(sums)))
    low, high = np.percentile(sums[rows].sum(1) / counts[rows].sum(1), [2.5, 97.5])
    return float(low), float(high)
