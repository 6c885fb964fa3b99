"""Every comparison of the paper on the embedded default, over seeds: one table and two figures.

    python tests/study.py --out runs/study            # 5 seeds, hours on two cores; after an interrupt it goes on
    python tests/study.py --out runs/study --more     # also four rows that the paper does not have: a fifth more time
    python tests/study.py --out runs/study --table    # only the table and the figures of what is there
    python tests/study.py --out runs/gate --gate      # before seeds are spent: do oracle labels beat RFT?
    python tests/study.py --out runs/sweep --sweep    # the same few settings for every method, on train-split tasks

It calls the four scripts as a user would, one thread each, as many at once as there are cores: the main rows of all
seeds, then the ablations of Table 3, the critics against rollouts, best-of-16, the rest. A job is done when its last
file is there. OUT/table.md has mean and 95 % interval over seeds (Student's t), and the paired difference to SWEET over
the same seeds; OUT/best_of_n.png and OUT/scaling.png are like the paper's Figures 3a and 3b, OUT/curves.png has SWEET's
learning curves (they need `pip install matplotlib`).
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TRAJECTORIES = 1800  # 300 tasks x 6, the preset of collect.py
CRITICS = {  # row -> flags of train_critic.py; each also trains a policy
    "SWEET": [],
    "regression head": ["--critic", "regression"],
    "without hidden information": ["--no-hidden-info"],
    "without length norm": ["--no-length-norm"],
    "untrained critic": ["--critic", "untrained"],
    "a quarter of the trajectories": ["--max-trajectories", str(TRAJECTORIES // 4)],
    "half of the trajectories": ["--max-trajectories", str(TRAJECTORIES // 2)],
}
RANKERS = {"SWEET": [], "without hidden information": ["--no-hidden-info"], "value": ["--critic", "value"],
           "untrained": ["--critic", "untrained"]}
POLICIES = {  # row -> flags of train_policy.py, on SWEET's own preferences
    "SWEET, the paper's policy settings": ["--gap", "0", "--nll-weight", "0.01", "--no-skip-last-turn"],
    "SWEET, a+ imitated only": ["--beta", "1e-6"],  # (3) all but without its first term
}
BASELINES = {"rejection fine-tuning": ["rft"], "multi-turn DPO": ["multi-turn-dpo"],
             # the best of the sweep, by little
             "rejection fine-tuning, learning rate 1.4e-3": ["rft", "--learning-rate", "1.4e-3"]}
MORE = {"untrained critic", "rejection fine-tuning, learning rate 1.4e-3", *POLICIES}  # only with --more
BEST_OF = (4, 16)
# train_critic.py --critic rollout with twice as many dialogues a candidate as it plays: here they are the truth
ROLLOUT = "import train_critic; from colbench.train import judges; judges.ROLLOUTS = 8; train_critic.main()"
COPY = "import shutil, sys; shutil.copytree(*sys.argv[1:], dirs_exist_ok=True)"
# six settings a method, then seven more for each baseline: SWEET had as many after it, when its pairs were looked into
SWEEP = {
    "sweet": [["--learning-rate", lr, "--nll-weight", w, "--gap", gap] for lr, w, gap in (
        ("1e-3", "3", "1"), ("5e-4", "3", "1"), ("3e-4", "3", "1"), ("5e-4", "1", "1"), ("5e-4", "10", "1"),
        ("5e-4", "3", "0.2"))],
    "rft": [["--learning-rate", lr, "--epochs", epochs, *more] for lr, epochs, *more in (
        ("3e-4", "6"), ("1e-3", "3"), ("1e-3", "6"), ("2e-3", "3"), ("2e-3", "6"), ("4e-3", "3"),
        ("1e-3", "9"), ("1e-3", "4"), ("6e-4", "6"), ("6e-4", "9"), ("1.4e-3", "6"),
        ("1e-3", "6", "--batch-size", "4"),
        ("1e-3", "6", "--batch-size", "16"))],
    "multi-turn-dpo": [["--learning-rate", lr, "--nll-weight", w, "--epochs", n, *more] for lr, w, n, *more in (
        ("3e-4", "0.1", "2"), ("3e-4", "1", "2"), ("3e-4", "3", "2"), ("1e-3", "1", "2"), ("1e-3", "3", "2"),
        ("1e-3", "3", "4"), ("1e-3", "10", "4"), ("1e-3", "3", "6"), ("2e-3", "3", "4"), ("5e-4", "3", "4"),
        ("1e-3", "3", "4", "--min-gap", "0.5"),
        ("1e-3", "3", "4", "--beta", "0.03"), ("1e-3", "3", "4", "--beta", "0.3"))],
}


def folder_name(row: str) -> str:
    return re.sub(r"\W+", "-", row.lower()).strip("-")


def jobs_of_seed(out: Path, seed: int, n_test: int, more: bool) -> tuple[list, ...]:
    """Jobs of one seed, (file that ends the job, files it needs, command): the main rows, the ablations of Table 3, the
    critics against rollouts, best-of-16, and the rest: smaller N, the data scaling of Figure 3b, with `more` MORE."""
    home, s = out / f"seed{seed}", ["--seed", str(seed)]
    data, held = home / "data" / "trajectories.jsonl", home / "held-out" / "trajectories.jsonl"
    main, ablations, rollouts, best_of, rest = [(data, [], ["collect.py", "--run", data.parent, *s])], [], [], [], []

    def evaluate(jobs, row, needs, *flags, n=n_test):
        run = home / folder_name(row)
        command = ["evaluate.py", "--run", run, "--n-tasks", n, "--seed", 1000 + seed, *flags]
        jobs.append((run / "metrics.json", needs, command))

    wanted = lambda rows: [(row, flags) for row, flags in rows.items() if more or row not in MORE]  # noqa: E731
    for row, flags in wanted(CRITICS):
        run = home / folder_name(row)
        jobs = main if row == "SWEET" else rest if "--max-trajectories" in flags else ablations
        command = ["train_critic.py", "--run", run, "--trajectories", data, *flags, *s]
        jobs.append((run / "preferences.jsonl", [data], command))
        jobs.append((run / "policy", [run / "preferences.jsonl"], ["train_policy.py", "--run", run, *s]))
        evaluate(jobs, row, [run / "policy"], "--policies", run / "policy")
    for row, flags in wanted(BASELINES):
        run = home / folder_name(row)
        command = ["train_policy.py", "--run", run, "--trajectories", data, "--algorithm", *flags, *s]
        main.append((run / "policy", [data], command))
        evaluate(main, row, [run / "policy"], "--policies", run / "policy")
    evaluate(main, "zero-shot", [], "--policies", "base")
    evaluate(main, "single turn", [], "--policies", "base", "--max-turns", 1)
    ranked, value = home / folder_name("SWEET") / "preferences.jsonl", home / "value"
    for row, flags in wanted(POLICIES):
        run = home / folder_name(row)
        command = ["train_policy.py", "--run", run, "--preferences", ranked, *flags, *s]
        rest.append((run / "policy", [ranked], command))
        evaluate(rest, row, [run / "policy"], "--policies", run / "policy")
    best_of.append((value / "preferences.jsonl", [data], [
        "train_critic.py", "--run", value, "--trajectories", data, "--critic", "value", *s]))
    truth = ranking_of(home, "rollout")
    rollouts += [(held, [], ["collect.py", "--run", held.parent, "--tasks", "mini:test", "--n-tasks", 24, "--k", 1,
                             "--candidate-share", 0.2, "--seed", 500 + seed]),
                 (truth, [held], [
                     "-c", ROLLOUT, "--run", truth.parent, "--trajectories", held, "--critic", "rollout", *s])]
    for row, flags in RANKERS.items():
        run = home / folder_name(row)
        critic = "untrained" if row == "untrained" else run / "critic"
        needs = [] if row == "untrained" else [run / "preferences.jsonl"]
        for n in BEST_OF:
            evaluate(best_of if n == BEST_OF[-1] else rest, f"best of {n} by {row}", needs, "--policies", "base",
                     "--best-of", n, "--critic", critic, n=min(150, n_test))
        ranked = ranking_of(home, row)
        if needs:  # a run that finds its critic trained ranks with it
            rollouts.append((ranked.with_name("critic"), needs, ["-c", COPY, critic, ranked.with_name("critic")]))
            needs = [ranked.with_name("critic")]
        rollouts.append((ranked, [held, *needs], [
            "train_critic.py", "--run", ranked.parent, "--trajectories", held, *flags, *s]))
    return main, ablations, rollouts, best_of, rest


def ranking_of(home: Path, row: str) -> Path:
    """Where one of RANKERS, or the rollouts, ranks the held-out states."""
    return home / f"held-out-{folder_name(row)}" / "preferences.jsonl"


def jobs_of_sweep(out: Path, n_test: int) -> list[tuple]:
    """Seed 0, every method with as many settings, judged on train-split tasks that nothing was trained on."""
    valid, data = out / "valid.jsonl", out / "data" / "trajectories.jsonl"
    jobs = [(data, [], ["collect.py", "--run", data.parent])]
    ranked = out / "critic" / "preferences.jsonl"
    jobs.append((ranked, [data], ["train_critic.py", "--run", ranked.parent, "--trajectories", data]))
    for algorithm, settings in SWEEP.items():
        for flags in settings:
            run = out / folder_name(f"{algorithm} {' '.join(flags)}")
            flag, path = ("--preferences", ranked) if algorithm == "sweet" else ("--trajectories", data)
            jobs += policy_jobs(run, path, [flag, path, "--algorithm", algorithm, *flags], valid, n_test)
    return jobs


def jobs_of_gate(out: Path, n_test: int) -> list[tuple]:
    """Oracle labels instead of a critic's: the policy stage alone, against rejection fine-tuning on the same data."""
    valid, data = out / "valid.jsonl", out / "data" / "trajectories.jsonl"
    jobs = [(data, [], ["collect.py", "--run", data.parent]),
            (out / "oracle" / "preferences.jsonl", [data],
             [ROOT / "tests" / "study.py", "--out", out, "--oracle-labels"])]
    jobs += policy_jobs(out / "oracle", out / "oracle" / "preferences.jsonl", [], valid, n_test)
    return jobs + policy_jobs(out / "rft", data, ["--trajectories", data, "--algorithm", "rft"], valid, n_test)


def policy_jobs(run: Path, needed: Path, flags: list, tasks: Path, n_test: int) -> list[tuple]:
    """Train a policy with these flags and play the tasks."""
    return [(run / "policy", [needed], ["train_policy.py", "--run", run, *flags]),
            (run / "metrics.json", [run / "policy"],
             ["evaluate.py", "--run", run, "--tasks", tasks, "--n-tasks", n_test, "--policies", run / "policy"])]


def run_jobs(jobs: list[tuple], workers: int) -> None:
    """Run what is not done yet, each job as soon as its files are there. A job that fails ends the study."""
    done = {end for end, *_ in jobs if end.exists() and Path(f"{end}.done").exists()}
    waiting, running, since = [job for job in jobs if job[0] not in done], {}, time.time()
    print(f"{len(done)} of {len(jobs)} jobs are done")
    with ThreadPoolExecutor(workers) as pool:
        while waiting or running:
            for job in [job for job in waiting if all(need in done for need in job[1])][:workers - len(running)]:
                waiting.remove(job)
                running[pool.submit(run_job, job)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, seconds = running.pop(future), future.result()
                done.add(job[0])
                print(f"[{(time.time() - since) / 60:5.1f} min] {len(done)}/{len(jobs)} {job[0]} ({seconds:.0f} s)",
                      flush=True)


def run_job(job: tuple) -> float:
    end, _, command = job
    since, env = time.time(), {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True)
    if result.returncode or not end.exists():
        raise SystemExit(f"{' '.join(map(str, command))}\nended with {result.returncode}:\n{result.stderr[-2000:]}")
    Path(f"{end}.done").write_text(f"{time.time() - since:.0f} s: {' '.join(map(str, command))}\n")
    return time.time() - since


# ---- what came out --------------------------------------------------------------------------------------------------


def success_of(path: Path) -> float | None:
    if not path.exists():
        return None
    [policy] = json.loads(path.read_text())["policies"].values()
    return policy["fixed"]["success"]


def half_width(values: list[float]) -> float:
    """Of the 95 % interval of the mean over seeds, by Student's t."""
    df = len(values) - 1
    t = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}.get(df, 1.96 + 2.372 / max(1, df) + 2.823 / max(1, df) ** 2)
    return t * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def interval(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:6.1%}" if values else ""
    return f"{statistics.mean(values):6.1%} ± {half_width(values):.1%}"


def label(task: dict, messages: list[dict], candidate: str) -> float:
    """The oracle of the mini benchmark: 1 for a question about a detail of the task that was not told yet and for the
    right answer once all are told, else 0."""
    details = dict(re.findall(r"# (\w+)()", task["ground_truth"]))
    told = {name for m in messages if m["role"] == "user" for name in re.findall(r"The (\w+) is \d+\.", m["content"])}
    if "I WANT TO ANSWER" in candidate:
        mine, wanted = ({line.split("#")[0].strip() for line in code.splitlines() if re.match(r"\s+total [-+]=", line)}
                        for code in (candidate, task["ground_truth"]))
        return float(mine == wanted and told >= set(details))
    asked = re.search(r"the (\w+)", candidate)
    return float(bool(asked) and asked[1] in details and asked[1] not in told)


def write_oracle_labels(out: Path) -> None:
    from colbench.env.data import load_trajectories
    from colbench.env.dialogue import states_with_candidates
    from colbench.env.hidden_info import without_hidden_info
    from colbench.run.files import append_jsonl, write_aside

    def write(temporary):
        for state in states_with_candidates(load_trajectories(out / "data" / "trajectories.jsonl"), ""):
            labels = [label(state["task"], state["messages"], c) for c in state["candidates"]]
            append_jsonl(temporary, without_hidden_info(state) | {"advantages": labels})
    write_aside(out / "oracle" / "preferences.jsonl", write)


def agreement(path: Path, truth_path: Path) -> tuple[float, float] | None:
    """(mean rank correlation within a state, share of the critic's top half that lies in the truth's top half), over
    held-out states at which the rollouts differ."""
    if not (path.exists() and truth_path.exists()):
        return None
    rows = [{(r["id"], r["sample"], r["turn"]): r for r in map(json.loads, open(p))} for p in (path, truth_path)]
    correlations, halves = [], []
    for key in [key for key in rows[0] if key in rows[1]]:  # the rollouts may still be going on
        a, b = rows[0][key]["advantages"], rows[1][key]["advantages"]
        if len(a) > 2 and len(set(b)) > 1 and len(set(a)) > 1:
            correlations.append(statistics.correlation(ranks(a), ranks(b)))
            middle, top = statistics.median(b), sorted(range(len(a)), key=lambda k: -a[k])[:len(a) // 2]
            halves.append(sum(1.0 if b[k] > middle else 0.5 if b[k] == middle else 0.0 for k in top) / len(top))
    return (statistics.mean(correlations), statistics.mean(halves)) if correlations else None


def against_oracle(path: Path, trajectories: Path) -> tuple[float, float] | None:
    """(share of the pairs of a useful and a useless candidate of a state that the critic ranks right, share of the
    states with both whose top candidate is a useful one), by the mini benchmark's own `label`."""
    if not (path.exists() and trajectories.exists()):
        return None
    tasks = {row["id"]: row["task"] for row in map(json.loads, open(trajectories))}
    pairs, tops = [], []
    for row in map(json.loads, open(path)):
        useful = [label(tasks[row["id"]], row["messages"], candidate) for candidate in row["candidates"]]
        if len(set(useful)) == 2:
            yes, no = ([a for a, u in zip(row["advantages"], useful) if u == kind] for kind in (1, 0))
            pairs.append(statistics.mean((a > b) + 0.5 * (a == b) for a in yes for b in no))
            tops.append(useful[max(range(len(useful)), key=row["advantages"].__getitem__)])
    return (statistics.mean(pairs), statistics.mean(tops)) if pairs else None


def ranks(values: list[float]) -> list[float]:
    """Ranks, ties at their mean."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def write_table(out: Path, seeds: list[int]) -> None:
    rows = ["single turn", "zero-shot", *BASELINES, *CRITICS, *POLICIES]
    rows += [f"best of {n} by {row}" for n in BEST_OF for row in RANKERS]
    text = ["| row | success on held-out mini tasks | difference to SWEET, paired over seeds | seeds |",
            "|---|---|---|---|"]
    found = {row: {s: success_of(out / f"seed{s}" / folder_name(row) / "metrics.json") for s in seeds} for row in rows}
    found = {row: {s: value for s, value in values.items() if value is not None} for row, values in found.items()}
    for row, values in found.items():
        if not values:
            continue
        compared = [s for s in values if s in found["SWEET"] and row != "SWEET" and "best of" not in row]
        differences = [values[s] - found["SWEET"][s] for s in compared]
        text.append(f"| {row} | {interval(list(values.values()))} | {interval(differences)} | "
                    f"{', '.join(f'{v:.1%}' for v in values.values())} |")
    text += ["", "| critic | rank correlation with Monte-Carlo rollouts | its top half in theirs |", "|---|---|---|"]
    for row in RANKERS:
        held = [agreement(ranking_of(out / f"seed{s}", row), ranking_of(out / f"seed{s}", "rollout")) for s in seeds]
        held = [value for value in held if value]
        text.append(f"| {row} | {interval([a for a, _ in held])} | {interval([b for _, b in held])} |")
    text += ["", "| critic | states | useful over useless candidate | top candidate useful |", "|---|---|---|---|"]
    ranked = [(row, "of training", "data", lambda home, row: home / folder_name(row) / "preferences.jsonl")
              for row in CRITICS]
    ranked += [(row, "held-out", "held-out", ranking_of) for row in (*RANKERS, "rollout")]
    for row, states, data, file in ranked:
        homes = [out / f"seed{s}" for s in seeds]
        found_by = [against_oracle(file(home, row), home / data / "trajectories.jsonl") for home in homes]
        if not (found_by := [value for value in found_by if value]):
            continue
        pairs, tops = (interval(list(values)) for values in zip(*found_by))
        text.append(f"| {row} | {states} | {pairs} | {tops} |")
    (out / "table.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(text))
    try:
        import matplotlib
    except ImportError:
        return print("no figures: pip install matplotlib, then --table")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    def line(axes, name, xs, columns):
        columns = [list(column.values()) for column in columns]
        means, widths = map(statistics.mean, columns), map(half_width, columns)
        axes.errorbar(xs, list(means), list(widths), marker="o", capsize=3, label=name)

    figure, axes = pyplot.subplots(figsize=(5, 3.5), layout="constrained")
    for row in RANKERS:
        columns = [found["zero-shot"], *(found[f"best of {n} by {row}"] for n in BEST_OF)]
        if all(columns):
            line(axes, row, [1, *BEST_OF], columns)
    axes.set(xscale="log", xticks=[1, *BEST_OF], xlabel="N messages sampled a turn", ylabel="success")
    axes.set_xticklabels([1, *BEST_OF])
    axes.legend(title="best of N by")
    figure.savefig(out / "best_of_n.png", dpi=120)
    figure, axes = pyplot.subplots(figsize=(5, 3.5), layout="constrained")
    columns = [found[row] for row in ("a quarter of the trajectories", "half of the trajectories", "SWEET")]
    if all(columns):
        line(axes, "SWEET", [TRAJECTORIES // 4, TRAJECTORIES // 2, TRAJECTORIES], columns)
    for i, row in enumerate(("zero-shot", "rejection fine-tuning", "multi-turn DPO"), 1):
        if found[row]:
            axes.axhline(statistics.mean(found[row].values()), linestyle=":", label=row, color=f"C{i}")
    axes.set(xlabel="trajectories", ylabel="success")
    axes.legend()
    figure.savefig(out / "scaling.png", dpi=120)
    figure, (accuracy, margin, above) = pyplot.subplots(1, 3, figsize=(9, 2.6), layout="constrained")
    for seed in seeds:
        for stage, panels in (("critic", ((accuracy, "rewards/accuracies"), (margin, "margin"))),
                              ("policy", ((above, "rewards/accuracies"),))):
            path = out / f"seed{seed}" / "sweet" / f"{stage}_log.jsonl"
            rows = [json.loads(line) for line in open(path)] if path.exists() else []
            for axes, name in panels:  # means over 20 steps
                means = [statistics.mean(row[name] for row in rows[i - 20:i]) for i in range(20, len(rows) + 1)]
                axes.plot(range(20, len(rows) + 1), means, color=f"C{seed}", label=f"seed {seed}")
    accuracy.set(title="critic: pairs ranked right", xlabel="step")
    margin.set(title="critic: margin", xlabel="step")
    above.set(title="policy: a+ above a−", xlabel="step")
    accuracy.legend(fontsize=7)
    figure.savefig(out / "curves.png", dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--n-test", type=int, default=300, help="held-out tasks an evaluation (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="scripts at once (default: all cores)")
    for flag in ("--table", "--more", "--gate", "--sweep", "--oracle-labels"):
        parser.add_argument(flag, action="store_true",
                            help=argparse.SUPPRESS if flag == "--oracle-labels" else "see above")
    args = parser.parse_args()
    args.out = args.out.resolve()
    if args.oracle_labels:
        return write_oracle_labels(args.out)
    if args.gate or args.sweep:
        args.out.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "colbench.env.backend.mini", "--split", "train", "--seed", "1", "--n",
                   args.n_test]
        made = subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True)
        (args.out / "valid.jsonl").write_bytes(made.stdout)
        run_jobs((jobs_of_gate if args.gate else jobs_of_sweep)(args.out, args.n_test), args.workers)
        for path in sorted(args.out.glob("*/metrics.json")):
            print(f"{path.parent.name:50} {success_of(path):6.1%}")
        return
    seeds = list(range(args.seeds))
    if not args.table:
        # the main rows of all seeds come first
        by_kind = zip(*(jobs_of_seed(args.out, seed, args.n_test, args.more) for seed in seeds))
        run_jobs([job for of_seeds in by_kind for jobs in of_seeds for job in jobs], args.workers)
    write_table(args.out, seeds)


if __name__ == "__main__":
    main()
