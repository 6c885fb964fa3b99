"""One command that turns WebSight's pages into Frontend Design tasks in the published format.

    pip install datasets
    python -m colbench.env.frontend.tasks --output data/frontend_tasks

It writes train.jsonl and test.jsonl, 10,000 tasks each. As published, the first 10,000 rows of
HuggingFaceM4/WebSight v0.2 are training tasks and the next 10,000 test tasks. The request is the
idea that the page was generated from; picture addresses are rewritten to picture 48. The rows are
streamed. `Frontend.tasks` (colbench.env.frontend.environment) reads these files.
"""
import argparse
import itertools
import os
from pathlib import Path

from colbench.env.frontend.protocol import rewrite_urls
from colbench.run.errors import UserError, run_main
from colbench.run.fields import checked
from colbench.run.files import append_jsonl, write_aside


def websight_rows(source: str):
    """Rows {"text", "llm_generated_idea"} of the hub's data set or of a folder `datasets` can load.

    UserError if `datasets` is not installed or cannot load the source.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError("WebSight needs one more package: pip install datasets") from None
    try:
        config = () if os.path.isdir(source) else ("v0.2",)
        rows = load_dataset(source, *config, split="train", streaming=True)
        return iter(rows.select_columns(["text", "llm_generated_idea"]))
    except Exception as error:  # gated, no network, wrong format: they share no class
        first_line = (str(error).strip().splitlines() or [''])[0][:160]
        raise UserError(f"{source}: {type(error).__name__}: {first_line}; "
                        "check the network and the name") from None


def task_of(row: dict, where: str) -> dict:
    """One WebSight row as a task in the published format."""
    row = checked(row, {"llm_generated_idea": str, "text": str}, where)
    return {"problem_description": row["llm_generated_idea"],
            "ground_truth": rewrite_urls(row["text"])}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/frontend_tasks"),
                        help="folder (default: %(default)s)")
    parser.add_argument("--n", type=int, default=10_000,
                        help="tasks per file (default: %(default)s)")
    parser.add_argument("--source", default="HuggingFaceM4/WebSight",
                        help="hub id or local folder (default: %(default)s)")
    args = parser.parse_args()
    rows = enumerate(websight_rows(args.source), 1)
    for split in ("train", "test"):
        tasks = [task_of(row, f"{args.source}: row {number}")
                 for number, row in itertools.islice(rows, args.n)]
        if len(tasks) < args.n:
            raise UserError(f"{args.source}: too few rows for {args.n} {split} tasks: "
                            f"{len(tasks)}; give a smaller --n")

        def write(temporary):
            with open(temporary, "w", encoding="utf-8") as file:
                for task in tasks:
                    append_jsonl(file, task)
        path = args.output / f"{split}.jsonl"
        write_aside(path, write)
        print(f"{path}: {len(tasks)} tasks")


if __name__ == "__main__":
    run_main(main)
