"""Every comparison of the paper on the embedded default, over seeds: tables and figures.

    python tests/study.py --out runs/study            # 5 seeds, hours on two cores; can be resumed
    python tests/study.py --out runs/study --table    # only tables and figures of finished jobs
    python tests/study.py --out runs/sweep --sweep    # six settings per method, on train tasks

It calls the four scripts as a user would, with one thread each and one script per core, the main
rows of all seeds first. A job is done when its last file exists. OUT/table.md has the mean and 95 %
interval over seeds (Student's t) and the paired difference to SWEET over the same seeds.
OUT/best_of_n.png and OUT/scaling.png correspond to the paper's Figures 3a and 3b; OUT/curves.png
has SWEET's learning curves. Figures need `pip install matplotlib`.
"""
import argparse
import json
import math
import os
import random
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
REGRESSION = "--critic regression"
CRITICS = {  # row -> flags of train_critic.py (the best of SWEEP); each critic also trains a policy
    "SWEET": "",
    "regression head": f"{REGRESSION} --beta 1 --learning-rate 1e-3",
    "without hidden information": "--no-hidden-info",
    "without length norm": "--no-length-norm",
    "untrained critic": "--critic untrained",
    "a+ drawn at random": "--critic random",
    "a quarter of the trajectories": f"--max-trajectories {TRAJECTORIES // 4}",
    "half of the trajectories": f"--max-trajectories {TRAJECTORIES // 2}",
}
RANKERS = {"SWEET": "", "without hidden information": "--no-hidden-info",
           "value": "--critic value", "untrained": "--critic untrained"}
BASELINES = {"rejection fine-tuning": "rft", "multi-turn DPO": "multi-turn-dpo"}
IMITATED, SECOND = "a+ imitated only", "a second round"
LABELS = "labels instead of a critic"
BEST_OF = (4, 16)
# Frontend Design
PAGES = {"SWEET": "", "a+ drawn at random": "--critic random", "multi-turn DPO": None}
# --critic rollout with twice as many dialogues per candidate as usual: here they serve as the truth
ROLLOUT = ("import train_critic; from colbench.train import judges; judges.ROLLOUTS = 8; "
           "train_critic.main()")
RANK_BY_LABEL = ("import sys; sys.path.insert(0, 'tests'); import study; "
                 "study.rank_by_label(*sys.argv[1:])")
COPY = "import shutil, sys; shutil.copytree(*sys.argv[1:], dirs_exist_ok=True)"
SMALL_STEPS = "--learning-rate 5e-4 --epochs 1 --batch-size 8"
# method -> six settings: flags of train_critic.py | flags of train_policy.py, or only the latter
SWEEP = {
    "SWEET": [
        "--nll-weight 3|--beta 3 --nll-weight 0.3",
        f"--nll-weight 1|--beta 1 --nll-weight 0.1 {SMALL_STEPS}",
        f"|--beta 3 --nll-weight 0.1 {SMALL_STEPS}",
        "|--beta 3 --nll-weight 0.01",
        "|--beta 3 --nll-weight 0.3",
        "|",
    ],
    "regression head": [
        f"{REGRESSION} --beta {beta} --learning-rate {lr}|"
        for beta in ("0.1", "1", "3") for lr in ("3e-4", "1e-3")
    ],
    "without length norm": [
        f"--no-length-norm --beta {beta} --nll-weight {w}|"
        for beta, w in (("0.1", "0.01"), ("0.3", "0.03"), ("0.3", "0.3"),
                        ("1", "0.1"), ("1", "1"), ("3", "0.3"))
    ],
    "rejection fine-tuning": [
        f"--algorithm rft --learning-rate {lr} --epochs {epochs}"
        for lr, epochs in (("3e-4", 6), ("5e-4", 3), ("1e-3", 3),
                           ("1e-3", 6), ("1e-3", 10), ("2e-3", 3))
    ],
    "multi-turn DPO": [
        f"--algorithm multi-turn-dpo --beta {beta} --nll-weight {w} --learning-rate {lr} "
        f"--epochs {n}"
        for beta, w, lr, n in (("0.3", "0.3", "5e-4", 2), ("0.1", "0.3", "5e-4", 2),
                               ("0.1", "1", "1e-3", 2), ("0.1", "1", "1e-3", 4),
                               ("0.3", "1", "1e-3", 4), ("1", "1", "1e-3", 4))
    ],
}


def folder_name(row: str) -> str:
    return re.sub(r"\W+", "-", row.lower().replace("a+", "a plus")).strip("-")


def train_and_rank(run: Path, data: Path, flags: str, *more) -> tuple:
    """The job of a critic: (its last file, files it needs, command)."""
    command = ["train_critic.py", "--run", run, "--trajectories", data, *flags.split(), *more]
    return run / "preferences.jsonl", [data], command


def policy(run: Path, needed: Path, flags: str, *more) -> tuple:
    """The job of a policy that learns from `needed`, trajectories or preferences."""
    command = ["train_policy.py", "--run", run, f"--{needed.stem}", needed, *flags.split(), *more]
    return run / "policy", [needed], command


def jobs_of_seed(out: Path, seed: int, n_test: int) -> tuple[list, ...]:
    """The jobs of one seed, in five lists.

    Main rows; ablations of Table 3 and controls; critics on held-out states; best-of-N; and the
    rest: data scaling (Figure 3b) and the rollouts that critics are compared with.
    """
    home, seed_flags = out / f"seed{seed}", ["--seed", seed]
    data = home / "data" / "trajectories.jsonl"
    held_out = home / "held-out" / "trajectories.jsonl"
    main = [(data, [], ["collect.py", "--run", data.parent, *seed_flags])]
    ablations, critics, best, rest = [], [], [], []

    def evaluate(jobs, row, needs, *flags, n=n_test):
        run = home / folder_name(row)
        command = ["evaluate.py", "--run", run, "--n-tasks", n, "--seed", 1000 + seed, *flags]
        jobs.append((run / "metrics.json", needs, command))

    def evaluate_policy(jobs, row, *flags):
        trained = home / folder_name(row) / "policy"
        evaluate(jobs, row, [trained], *flags, "--policies", trained)

    for row, flags in CRITICS.items():
        run = home / folder_name(row)
        if row == "SWEET":
            jobs = main
        else:
            jobs = rest if "--max-trajectories" in flags else ablations
        jobs += [train_and_rank(run, data, flags, *seed_flags),
                 policy(run, run / "preferences.jsonl", "", *seed_flags)]
        evaluate_policy(jobs, row)
    for row, algorithm in BASELINES.items():
        main.append(policy(home / folder_name(row), data, f"--algorithm {algorithm}", *seed_flags))
        evaluate_policy(main, row)
    evaluate(main, "zero-shot", [], "--policies", "base")
    evaluate(main, "single turn", [], "--policies", "base", "--max-turns", 1)

    sweet = home / "sweet"
    ablations.append(policy(home / folder_name(IMITATED), sweet / "preferences.jsonl", "--beta 0",
                            *seed_flags))
    evaluate_policy(ablations, IMITATED)

    preferences = home / folder_name(LABELS) / "preferences.jsonl"
    ablations += [(preferences, [data], ["-c", RANK_BY_LABEL, data, preferences]),
                  policy(preferences.parent, preferences, "", *seed_flags)]
    evaluate_policy(ablations, LABELS)

    run, first = home / folder_name(SECOND), sweet / "policy"
    model = run / "model"
    again = ["--model", model, *seed_flags]
    ablations += [(model, [first], ["-m", "colbench.lm.merge", first, model]),
                  (run / "trajectories.jsonl", [model], ["collect.py", "--run", run, *again]),
                  train_and_rank(run, run / "trajectories.jsonl", "", *again),
                  policy(run, run / "preferences.jsonl", "", *again)]
    evaluate_policy(ablations, SECOND, "--model", model)

    rollouts = ranking_of(home, "rollout")
    critics += [train_and_rank(home / "value", data, RANKERS["value"], *seed_flags),
                (held_out, [], ["collect.py", "--run", held_out.parent, "--tasks", "mini:test",
                                "--n-tasks", 150, "--k", 2, "--seed", 500 + seed])]
    rest.append((rollouts, [held_out], ["-c", ROLLOUT, "--run", rollouts.parent,
                                        "--trajectories", held_out, "--critic", "rollout",
                                        "--max-trajectories", 24, *seed_flags]))
    for row, flags in RANKERS.items():
        run, ranked = home / folder_name(row), ranking_of(home, row)
        command = ["train_critic.py", "--run", ranked.parent, "--trajectories", held_out,
                   *flags.split(), *seed_flags]
        if row == "untrained":
            critic, needs = "untrained", []
            critics.append((ranked, [held_out], command))
        else:
            critic, needs = run / "critic", [run / "preferences.jsonl"]
            copied = ranked.parent / "critic"  # train_critic.py ranks with a critic that it finds
            critics += [(copied, needs, ["-c", COPY, critic, copied]),
                        (ranked, [held_out, copied], command)]
        for n in BEST_OF:
            evaluate(best, f"best of {n} by {row}", needs, "--policies", "base", "--best-of", n,
                     "--critic", critic, n=min(60, n_test))
    return main, ablations, critics, best, rest


def jobs_of_pages(out: Path, seed: int) -> list[tuple]:
    """Frontend Design: SWEET, its control and its baseline, all evaluated on held-out pages."""
    home, flags_of_all = out / f"pages{seed}", ["--env", "frontend", "--seed", seed]
    data = home / "data" / "trajectories.jsonl"
    jobs, policies = [(data, [], ["collect.py", "--run", data.parent, *flags_of_all])], []
    for row, flags in PAGES.items():
        run = home / folder_name(row)
        policies.append(run / "policy")
        if flags is None:
            jobs.append(policy(run, data, "--algorithm multi-turn-dpo", *flags_of_all))
        else:
            jobs += [train_and_rank(run, data, flags, *flags_of_all),
                     policy(run, run / "preferences.jsonl", "", *flags_of_all)]
    command = ["evaluate.py", "--env", "frontend", "--run", home / "test", "--seed", 1000 + seed,
               "--policies", "base", *policies]
    return [*jobs, (home / "test" / "metrics.json", policies, command)]


def ranking_of(home: Path, row: str) -> Path:
    """The file of held-out states with a critic's advantages."""
    return home / "held-out" / folder_name(row) / "preferences.jsonl"


def jobs_of_sweep(out: Path, n_test: int) -> list[tuple]:
    """Seed 0, six settings per method, evaluated on unused tasks of the training split."""
    valid, data = out / "valid.jsonl", out / "data" / "trajectories.jsonl"
    jobs = [(data, [], ["collect.py", "--run", data.parent])]
    ranked = set()
    for method, settings in SWEEP.items():
        for flags in settings:
            run, learned_from = out / folder_name(f"{method} {flags}"), data
            if "|" in flags:
                critic, flags = flags.split("|")
                learned_from = out / folder_name(f"critic {critic}") / "preferences.jsonl"
                if learned_from not in ranked:
                    jobs.append(train_and_rank(learned_from.parent, data, critic))
                ranked.add(learned_from)
            command = ["evaluate.py", "--run", run, "--tasks", valid, "--n-tasks", n_test,
                       "--policies", run / "policy"]
            jobs += [policy(run, learned_from, flags),
                     (run / "metrics.json", [run / "policy"], command)]
    return jobs


def run_jobs(jobs: list[tuple], workers: int) -> None:
    """Run what is not done yet, each job once its files exist. A job that fails ends the study."""
    done = {end for end, *_ in jobs if end.exists() and Path(f"{end}.done").exists()}
    waiting, running = [job for job in jobs if job[0] not in done], {}
    start = time.time()
    print(f"{len(done)} of {len(jobs)} jobs are done")
    with ThreadPoolExecutor(workers) as pool:
        while waiting or running:
            ready = [job for job in waiting if all(need in done for need in job[1])]
            for job in ready[:workers - len(running)]:
                waiting.remove(job)
                running[pool.submit(run_job, job)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, seconds = running.pop(future), future.result()
                done.add(job[0])
                minutes = (time.time() - start) / 60
                print(f"[{minutes:5.1f} min] {len(done)}/{len(jobs)} {job[0]} ({seconds:.0f} s)",
                      flush=True)


def run_job(job: tuple) -> float:
    """Run a job; returns its seconds."""
    end, _, command = job
    command = [str(part) for part in command]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    start = time.time()
    result = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True,
                            text=True)
    if result.returncode or not end.exists():
        raise SystemExit(f"{' '.join(command)}\nended with {result.returncode}:\n"
                         f"{result.stderr[-2000:]}")
    seconds = time.time() - start
    Path(f"{end}.done").write_text(f"{seconds:.0f} s: {' '.join(command)}\n")
    return seconds


# ---- results


def success_of(path: Path) -> float | None:
    if not path.exists():
        return None
    [metrics] = json.loads(path.read_text())["policies"].values()
    return metrics["fixed"]["success"]


def half_width(values: list[float]) -> float:
    """Half the 95 % interval of the mean over seeds (Student's t)."""
    if len(values) < 2:
        return math.nan
    df = len(values) - 1
    approximate = 1.96 + 2.372 / df + 2.823 / df ** 2
    t = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}.get(df, approximate)
    return t * statistics.stdev(values) / math.sqrt(len(values))


def interval(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:6.1%}" if values else ""
    return f"{statistics.mean(values):6.1%} ± {half_width(values):.1%}"


def kind(task: dict, messages: list[dict], candidate: str) -> str:
    """The label of a message on the mini benchmark.

    A question is "useful" if it asks for a detail of the task not told yet, else "useless".
    An answer is "early" before all details are told, then "right" or "wrong".
    """
    from colbench.env.backend.mini import details_of
    details = set(details_of(task["ground_truth"]))
    replies = [message["content"] for message in messages if message["role"] == "user"]
    told = {name for reply in replies for name in re.findall(r"The (\w+) is \d+\.", reply)}
    if "I WANT TO ANSWER" in candidate:
        if not told >= details:
            return "early"
        return "right" if total_lines(candidate) == total_lines(task["ground_truth"]) else "wrong"
    asked = re.search(r"the (\w+)", candidate)
    return "useful" if asked and asked[1] in details - told else "useless"


def total_lines(code: str) -> set[str]:
    """The lines of a mini-benchmark function that change the total, without comments."""
    return {line.split("#")[0].strip() for line in code.splitlines()
            if re.match(r"\s+total [-+]=", line)}


CLASSES = {  # class of pairs of candidates -> (better, worse, condition on their lengths in tokens)
    "useful over useless question, the useful one shorter": (
        "useful", "useless", lambda a, b: a < b),
    "equally long": ("useful", "useless", lambda a, b: a == b),
    "longer": ("useful", "useless", lambda a, b: a > b),
    "any question over an early answer": ("useful useless", "early", None),
    "all told: right over wrong answer": ("right", "wrong", None),
    "all told: right answer over a question": ("right", "useless", None),
}


def ranked_right(path: Path, trajectories: Path) -> dict[str, tuple[float, int]]:
    """{class of pairs: (share that the critic ranks right, number of pairs)}.

    "top": the share of states whose best candidate is a useful question or a right answer, among
    those with both such candidates and others.
    """
    if not (path.exists() and trajectories.exists()):
        return {}
    from colbench.lm.load import load_tokenizer
    tokenizer = load_tokenizer("tiny")
    tasks = {row["id"]: row["task"] for row in map(json.loads, open(trajectories))}
    found = {name: [] for name in (*CLASSES, "top")}
    for row in map(json.loads, open(path)):
        candidates = row["candidates"]
        kinds = [kind(tasks[row["id"]], row["messages"], candidate) for candidate in candidates]
        lengths = [len(tokenizer.tokenize(candidate)) for candidate in candidates]
        of_state = list(zip(row["advantages"], kinds, lengths))
        for name, (better, worse, fits) in CLASSES.items():
            found[name] += [(a > b) + 0.5 * (a == b)
                            for a, kind_a, m in of_state if kind_a in better.split()
                            for b, kind_b, n in of_state if kind_b == worse
                            and (not fits or fits(m, n))]
        if 0 < sum(one in ("useful", "right") for one in kinds) < len(kinds):
            found["top"].append(max(of_state)[1] in ("useful", "right"))
    return {name: (statistics.mean(values), len(values))
            for name, values in found.items() if values}


def rank_by_label(trajectories: str, preferences: str) -> None:
    """Write the rankings of a perfect critic: by `kind`, ties by chance."""
    from colbench.env.data import load_trajectories
    from colbench.env.dialogue import states_with_candidates
    from colbench.env.hidden_info import without_hidden_info
    Path(preferences).parent.mkdir(parents=True, exist_ok=True)
    worth = {"useful": 2, "right": 2, "useless": 1, "wrong": 0, "early": 0}
    rng = random.Random(0)
    with open(preferences, "w", encoding="utf-8") as output:
        for state in states_with_candidates(load_trajectories(trajectories), ""):
            labels = [kind(state["task"], state["messages"], candidate)
                      for candidate in state["candidates"]]
            advantages = [worth[label] + rng.random() for label in labels]
            row = without_hidden_info(state) | {"advantages": advantages}
            output.write(json.dumps(row) + "\n")


def rank_correlation(path: Path, rollouts: Path) -> float | None:
    """Mean rank correlation with rollouts within a held-out state, if the rollouts differ there."""
    if not (path.exists() and rollouts.exists()):
        return None
    by_critic, by_rollout = (
        {(row["id"], row["sample"], row["turn"]): row["advantages"]
         for row in map(json.loads, open(p))} for p in (path, rollouts))
    correlations = []
    for state in [state for state in by_critic if state in by_rollout]:
        a, b = by_critic[state], by_rollout[state]
        if len(a) > 2 and len(set(b)) > 1 and len(set(a)) > 1:
            correlations.append(statistics.correlation(ranks(a), ranks(b)))
    return statistics.mean(correlations) if correlations else None


def ranks(values: list[float]) -> list[float]:
    """Ranks, ties at their mean."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def table_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def write_table(out: Path, seeds: list[int]) -> None:
    """Write and print OUT/table.md, then draw the figures."""
    homes = [out / f"seed{s}" for s in seeds]
    rows = ["single turn", "zero-shot", *BASELINES, *CRITICS, IMITATED, LABELS, SECOND]
    rows += [f"best of {n} by {row}" for n in BEST_OF for row in RANKERS]
    success = {}  # row -> {seed: success}
    for row in rows:
        values = [success_of(home / folder_name(row) / "metrics.json") for home in homes]
        success[row] = {s: value for s, value in zip(seeds, values) if value is not None}

    lines = [table_row("row", "success on held-out mini tasks",
                       "difference to SWEET, paired over seeds", "seeds"), "|---|---|---|---|"]
    sweet = success["SWEET"]
    for row, values in success.items():
        if values:
            compared = row != "SWEET" and "best of" not in row
            differences = [values[s] - sweet[s] for s in values if s in sweet and compared]
            lines.append(table_row(row, interval(list(values.values())), interval(differences),
                                   ", ".join(f"{value:.1%}" for value in values.values())))

    rankers = (*RANKERS, "rollout")
    lines += ["", table_row("held-out states, pairs ranked right", *rankers),
              "|---" * (len(RANKERS) + 2) + "|"]
    judged = [[ranked_right(ranking_of(home, row), home / "held-out" / "trajectories.jsonl")
               for home in homes] for row in rankers]
    for name in (*CLASSES, "top"):
        cells = [interval([shares[name][0] for shares in by_seed if name in shares])
                 for by_seed in judged]
        lines.append(table_row(name, *cells))
    cells = []
    for row in RANKERS:
        values = [rank_correlation(ranking_of(home, row), ranking_of(home, "rollout"))
                  for home in homes]
        cells.append(interval([value for value in values if value is not None]))
    lines.append(table_row("rank correlation with rollouts", *cells) + " |")

    lines += ["", "| states of training, pairs ranked right | useful over useless question | top |",
              "|---|---|---|"]
    for row in CRITICS:
        by_seed = [ranked_right(home / folder_name(row) / "preferences.jsonl",
                                home / "data" / "trajectories.jsonl") for home in homes]
        by_seed = [shares for shares in by_seed if shares]
        if by_seed:
            pairs = []  # per seed, over the three classes of pairs of questions
            for shares in by_seed:
                three = [shares[name] for name in list(CLASSES)[:3]]
                pairs.append(sum(share * n for share, n in three) / sum(n for _, n in three))
            tops = [shares["top"][0] for shares in by_seed]
            lines.append(table_row(row, interval(pairs), interval(tops)))

    lines += ["", "| Frontend Design | pixel similarity | win rate against base | seeds |",
              "|---|---|---|---|"]
    by_seed = [list(json.loads(path.read_text())["policies"].values())
               for path in sorted(out.glob("pages*/test/metrics.json"))]
    for row, metrics in zip(["base", *PAGES], zip(*by_seed)):
        alike = [m["similarity"] for m in metrics]
        wins = [m["against"]["win_rate"] for m in metrics if "against" in m]
        lines.append(table_row(row, f"{statistics.mean(alike):.3f} ± {half_width(alike):.3f}",
                               interval(wins), ", ".join(f"{value:.3f}" for value in alike)))

    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    try:
        import matplotlib
    except ImportError:
        return print("no figures: pip install matplotlib, then --table")
    matplotlib.use("Agg")
    draw(out, seeds, success)


def draw(out: Path, seeds: list[int], success: dict) -> None:
    """Draw OUT/best_of_n.png, scaling.png and curves.png.

    success: {row: {seed: share}}; the curves come from SWEET's logs.
    """
    from matplotlib import pyplot

    def line(axes, name, xs, columns):
        columns = [list(column.values()) for column in columns]
        means = [statistics.mean(column) for column in columns]
        widths = [half_width(column) for column in columns]
        axes.errorbar(xs, means, widths, marker="o", capsize=3, label=name)

    figure, axes = pyplot.subplots(figsize=(5, 3.5), layout="constrained")
    for row in RANKERS:
        columns = [success["zero-shot"], *(success[f"best of {n} by {row}"] for n in BEST_OF)]
        if all(columns):
            line(axes, row, [1, *BEST_OF], columns)
    axes.set(xscale="log", xticks=[1, *BEST_OF], xlabel="N messages sampled per turn",
             ylabel="success")
    axes.set_xticklabels([1, *BEST_OF])
    axes.legend(title="best of N by")
    figure.savefig(out / "best_of_n.png", dpi=120)

    figure, axes = pyplot.subplots(figsize=(5, 3.5), layout="constrained")
    scaled = ("a quarter of the trajectories", "half of the trajectories", "SWEET")
    columns = [success[row] for row in scaled]
    if all(columns):
        line(axes, "SWEET", [TRAJECTORIES // 4, TRAJECTORIES // 2, TRAJECTORIES], columns)
    for i, row in enumerate(("zero-shot", "rejection fine-tuning", "multi-turn DPO"), 1):
        if success[row]:
            mean = statistics.mean(success[row].values())
            axes.axhline(mean, linestyle=":", label=row, color=f"C{i}")
    axes.set(xlabel="trajectories", ylabel="success")
    axes.legend()
    figure.savefig(out / "scaling.png", dpi=120)

    names = {"rewards/accuracies": "pairs ranked right", "margin/nats": "margin / nats",
             "log_ratio/chosen": "log-ratio of chosen, nats per message"}
    figure, panels = pyplot.subplots(2, len(names), figsize=(9, 5), layout="constrained")
    for of_stage, stage in zip(panels, ("critic", "policy")):
        for axes, (name, title) in zip(of_stage, names.items()):
            axes.set(title=f"{stage}: {title}", xlabel="step")
            for seed in seeds:
                path = out / f"seed{seed}" / "sweet" / f"{stage}_log.jsonl"
                values = [json.loads(row)[name] for row in open(path)] if path.exists() else []
                steps = range(20, len(values) + 1)
                means = [statistics.mean(values[i - 20:i]) for i in steps]  # over 20 steps
                axes.plot(steps, means, color=f"C{seed}", label=f"seed {seed}")
    panels[0][0].legend(fontsize=7)
    figure.savefig(out / "curves.png", dpi=100)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--n-test", type=int, default=300,
                        help="held-out tasks per evaluation (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(),
                        help="scripts at once (default: all cores)")
    for flag in ("--table", "--sweep"):
        parser.add_argument(flag, action="store_true", help="see above")
    args = parser.parse_args()
    args.out = args.out.resolve()
    if args.sweep:
        args.out.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "colbench.env.backend.mini", "--split", "train",
                   "--seed", "1", "--n", str(args.n_test)]
        made = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        (args.out / "valid.jsonl").write_bytes(made.stdout)
        run_jobs(jobs_of_sweep(args.out, args.n_test), args.workers)
        for path in sorted(args.out.glob("*/metrics.json")):
            print(f"{path.parent.name:70} {success_of(path):6.1%}")
        return
    seeds = list(range(args.seeds))
    if not args.table:
        # the main rows of all seeds come first
        *by_kind, rest = zip(*(jobs_of_seed(args.out, seed, args.n_test) for seed in seeds))
        pages = [jobs_of_pages(args.out, seed) for seed in seeds[:3]]
        run_jobs([job for of_seeds in (*by_kind, pages, rest) for jobs in of_seeds for job in jobs],
                 args.workers)
    write_table(args.out, seeds)


if __name__ == "__main__":
    main()
