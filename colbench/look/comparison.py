"""Finished runs against each other on the same tasks, pair by pair.

    python -m colbench.look.comparison runs/four      # each policy of a run against its first
    python -m colbench.look.comparison runs/a runs/b  # each policy of both against runs/a's first

Prints, over the (task, sample) that both played: differences with 95 % bootstrap intervals over
tasks, wins, ties, losses, and the smallest true difference detected with 80 % power. Warns if the
runs have different humans.
"""
import argparse
from pathlib import Path

import numpy as np

from colbench.env.base import environment_of_run
from colbench.env.data import failed
from colbench.env.metrics import paired, smallest_difference
from colbench.run.errors import UserError, run_main
from colbench.run.fields import COUNT
from colbench.run.files import numbered_rows
from colbench.run.settings import read_json, settings_file

LINE = {"policy": str, "id": str, "sample": COUNT, "outcome": str, "reward?": float,
        "scores?": dict}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="folder of a run, or a file of episodes")
    compare_runs(parser.parse_args().runs)


def compare_runs(runs: list[str]) -> None:
    """Print the difference of every policy in these runs to the first policy, by each measure."""
    episodes, environments, humans = {}, {}, {}
    for run in runs:
        path = Path(run) / "episodes.jsonl" if Path(run).is_dir() else Path(run)
        environment = environment_of_run(path.parent)
        environments[environment.__module__, environment.__name__] = environment
        humans[run] = read_json(settings_file(path)).get("human", "unknown")
        for number, line in numbered_rows(path, LINE):
            if not failed(line):
                name = line["policy"] if len(runs) == 1 else f"{run}: {line['policy']}"
                try:
                    values = [float(measure(line)) for measure in environment.measures.values()]
                except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
                    raise UserError(f"{path}:{number}: scores: do not fit the environment that "
                                    f"{settings_file(path)} names") from None
                episodes.setdefault(name, {})[line["id"], line["sample"]] = values
    if len(episodes) < 2:
        raise UserError(f"{' '.join(runs)}: expected at least two policies, got {len(episodes)}")
    if len(environments) > 1:
        raise UserError(f"{' '.join(runs)}: runs of different environments do not compare")
    if len({*humans.values()}) > 1:
        print("warning: the human differs, and with it the task: "
              + "; ".join(f"{human} in {run}" for run, human in humans.items()))
    first, *others = episodes
    for other in others:
        shared = sorted(episodes[first].keys() & episodes[other].keys())
        tasks = [task for task, _ in shared]
        print(f"\n{other}  against  {first}: {len(shared)} episodes on {len({*tasks})} tasks that "
              "both played")
        for i, name in enumerate(environment.measures if shared else ()):
            pairs = [(episodes[other][key][i], episodes[first][key][i]) for key in shared]
            difference, (low, high) = paired(pairs, tasks)
            least = smallest_difference([a - b for a, b in pairs], tasks)
            ties = sum(abs(a - b) < 1e-6 for a, b in pairs)
            wins = sum(a > b and abs(a - b) >= 1e-6 for a, b in pairs)
            losses = len(pairs) - wins - ties
            other_mean = np.mean([a for a, _ in pairs])
            first_mean = np.mean([b for _, b in pairs])
            detectable = f"detectable: {least:.1%}   " if least else ""
            print(f"  {name}  {other_mean:6.1%} - {first_mean:6.1%} = {difference:+7.1%}  "
                  f"[{low:+.1%}, {high:+.1%}]   {detectable}"
                  f"wins {wins}, ties {ties}, losses {losses}")


if __name__ == "__main__":
    run_main(main)
