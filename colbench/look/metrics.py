"""metrics.json and the table that evaluate.py prints."""
from pathlib import Path

from colbench.env.evidence import evidence, evidence_remarks
from colbench.run.settings import hide_password, read_json, write_json


def write_metrics(args, env, by_policy: dict[str, list[dict]], tasks: list[dict]) -> dict:
    """Write args.metrics and return its content without the settings: {"policies": {...}, ...}.

    args: flags of evaluate.py. by_policy: the lines of episodes.jsonl of each policy."""
    evaluation = env.evaluation(by_policy, tasks, read_json(args.metrics))
    for name, found in evidence(env, by_policy, args.episodes).items():
        evaluation["policies"][name] |= found
    settings = {name: str(value) if isinstance(value, Path) else hide_password(value)
                for name, value in vars(args).items() if name != "names"}
    settings["policies"] = [hide_password(policy) for policy in args.policies]
    write_json(args.metrics, {"settings": settings, **evaluation})
    return evaluation


def print_table(env, evaluation: dict, tasks: list[dict]) -> None:
    """Print a row per policy, in the environment's columns, and remarks below."""
    rows = [["", *env.columns]]
    for policy, metrics in evaluation["policies"].items():
        rows.append([policy, *(column(metrics) for column in env.columns.values())])
    widths = [max(map(len, column)) for column in zip(*rows)]
    print()
    for name, *cells in rows:
        print(f"{name:{widths[0]}}", *(f"{cell:>{width}}" for cell, width in
                                       zip(cells, widths[1:])), sep="  ")
    remarks = env.remarks(evaluation, tasks) + evidence_remarks(evaluation["policies"])
    print("", *remarks, sep="\n")
