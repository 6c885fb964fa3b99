"""Finished runs against each other on the same tasks, pair by pair.

    python -m colbench.look.comparison runs/four              # each policy of the run against its first
    python -m colbench.look.comparison runs/a runs/b          # each policy of both against the first of runs/a

Prints differences on the (task, sample) that both played, with 95 % bootstrap intervals over tasks, wins, ties and
losses, and the smallest true difference that such a comparison would have found in 80 % of all cases. Says where
another human played.
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

LINE = {"policy": str, "id": str, "sample": COUNT, "outcome": str, "reward?": float, "scores?": dict}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or a file of episodes")
    compare_runs(parser.parse_args().runs)


def compare_runs(runs: list[str]) -> None:
    """Print, for every policy in RUN/episodes.jsonl of these runs, its difference to the first, by each measure."""
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
                    raise UserError(f"{path}:{number}: scores: not those of the environment that the settings beside "
                                    "it name") from None
                episodes.setdefault(name, {})[line["id"], line["sample"]] = values
    if len(episodes) < 2:
        raise UserError(f"{' '.join(runs)}: two policies at least are wanted, these files hold {len(episodes)}")
    if len(environments) > 1:
        raise UserError(f"{' '.join(runs)}: runs of different environments do not compare")
    if len({*humans.values()}) > 1:
        print("warning: the human differs, and with it the task: "
              + "; ".join(f"{human} in {run}" for run, human in humans.items()))
    one, *others = episodes
    for other in others:
        shared = sorted(episodes[one].keys() & episodes[other].keys())
        tasks = {task for task, _ in shared}
        print(f"\n{other}  against  {one}: {len(shared)} episodes on {len(tasks)} tasks that both played")
        for i, name in enumerate(environment.measures if shared else ()):
            pairs = [(episodes[other][key][i], episodes[one][key][i]) for key in shared]
            difference, (low, high) = paired(pairs, [task for task, _ in shared])
            least = smallest_difference([a - b for a, b in pairs], [task for task, _ in shared])
            ties = sum(abs(a - b) < 1e-6 for a, b in pairs)
            wins = sum(a > b and abs(a - b) >= 1e-6 for a, b in pairs)
            print(f"  {name}  {np.mean([a for a, _ in pairs]):6.1%} - {np.mean([b for _, b in pairs]):6.1%} = "
                  f"{difference:+7.1%}  [{low:+.1%}, {high:+.1%}]   "
                  + (f"could show {least:.1%}   " if least else "")
                  + f"wins {wins}, ties {ties}, losses {len(pairs) - wins - ties}")


if __name__ == "__main__":
    run_main(main)
