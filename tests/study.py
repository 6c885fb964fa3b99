"""Every comparison of the paper on the embedded default, over seeds: tables and figures.

    python tests/study.py --out runs/study            # 5 seeds, hours on two cores; after an interrupt it goes on
    python tests/study.py --out runs/study --table    # only the tables and figures of what is there
    python tests/study.py --out runs/sweep --sweep    # as many settings for every method, judged on train-split tasks

It calls the four scripts as a user would, one thread each, as many at once as there are cores: the main rows of all
seeds first. A job is done when its last file is there. OUT/table.md has mean and 95 % interval over seeds (Student's
t), and the paired difference to SWEET over the same seeds; OUT/best_of_n.png and OUT/scaling.png are like the paper's
Figures 3a and 3b, OUT/curves.png has SWEET's learning curves (they need `pip install matplotlib`).
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
CRITICS = {  # row -> flags of train_critic.py, the best of SWEEP; each also trains a policy
    "SWEET": "",
    "regression head": f"{REGRESSION} --beta 1 --learning-rate 1e-3",
    "without hidden information": "--no-hidden-info",
    "without length norm": "--no-length-norm",
    "untrained critic": "--critic untrained",
    "a+ drawn at random": "--critic random",
    "a quarter of the trajectories": f"--max-trajectories {TRAJECTORIES // 4}",
    "half of the trajectories": f"--max-trajectories {TRAJECTORIES // 2}",
}
RANKERS = {"SWEET": "", "without hidden information": "--no-hidden-info", "value": "--critic value",
           "untrained": "--critic untrained"}
BASELINES = {"rejection fine-tuning": "rft", "multi-turn DPO": "multi-turn-dpo"}
IMITATED, SECOND = "a+ imitated only", "a second round"
LABELS = "labels instead of a critic"
BEST_OF = (4, 16)
PAGES = {"SWEET": "", "a+ drawn at random": "--critic random", "multi-turn DPO": None}  # Frontend Design
# train_critic.py --critic rollout with twice as many dialogues a candidate as it plays: here they are the truth
ROLLOUT = "import train_critic; from colbench.train import judges; judges.ROLLOUTS = 8; train_critic.main()"
RANK_BY_LABEL = "import sys; sys.path.insert(0, 'tests'); import study; study.rank_by_label(*sys.argv[1:])"
COPY = "import shutil, sys; shutil.copytree(*sys.argv[1:], dirs_exist_ok=True)"
SWEEP = {  # method -> six settings: flags of train_critic.py | flags of train_policy.py, or of the latter alone
    "SWEET": ["--nll-weight 3|--beta 3 --nll-weight 0.3", "--nll-weight 1|--beta 1 --nll-weight 0.1 "
              "--learning-rate 5e-4 --epochs 1 --batch-size 8", "|--beta 3 --nll-weight 0.1 "
              "--learning-rate 5e-4 --epochs 1 --batch-size 8", "|--beta 3 --nll-weight 0.01",
              "|--beta 3 --nll-weight 0.3", "|"],
    "regression head": [f"{REGRESSION} --beta {beta} --learning-rate {lr}|" for beta in ("0.1", "1", "3")
                        for lr in ("3e-4", "1e-3")],
    "without length norm": [f"--no-length-norm --beta {beta} --nll-weight {w}|" for beta, w in (
        ("0.1", "0.01"), ("0.3", "0.03"), ("0.3", "0.3"), ("1", "0.1"), ("1", "1"), ("3", "0.3"))],
    "rejection fine-tuning": [f"--algorithm rft --learning-rate {lr} --epochs {epochs}" for lr, epochs in (
        ("3e-4", 6), ("5e-4", 3), ("1e-3", 3), ("1e-3", 6), ("1e-3", 10), ("2e-3", 3))],
    "multi-turn DPO": [f"--algorithm multi-turn-dpo --beta {beta} --nll-weight {w} --learning-rate {lr} --epochs {n}"
                       for beta, w, lr, n in (("0.3", "0.3", "5e-4", 2), ("0.1", "0.3", "5e-4", 2),
                                              ("0.1", "1", "1e-3", 2), ("0.1", "1", "1e-3", 4),
                                              ("0.3", "1", "1e-3", 4), ("1", "1", "1e-3", 4))],
}


def folder_name(row: str) -> str:
    return re.sub(r"\W+", "-", row.lower().replace("a+", "a plus")).strip("-")


def train_and_rank(run: Path, data: Path, flags: str, *more) -> tuple:
    """The job of a critic: (file that ends it, files it needs, command)."""
    command = ["train_critic.py", "--run", run, "--trajectories", data, *flags.split(), *more]
    return run / "preferences.jsonl", [data], command


def policy(run: Path, needed: Path, flags: str, *more) -> tuple:
    """The job of a policy that learns from `needed`, trajectories or preferences."""
    command = ["train_policy.py", "--run", run, f"--{needed.stem}", needed, *flags.split(), *more]
    return run / "policy", [needed], command


def jobs_of_seed(out: Path, seed: int, n_test: int) -> tuple[list, ...]:
    """Jobs of one seed: the main rows, the ablations of Table 3 and the controls, the critics on held-out states,
    best-of-N, the rest: the data scaling of Figure 3b and the rollouts that critics are held against."""
    home, s = out / f"seed{seed}", ["--seed", seed]
    data, held = home / "data" / "trajectories.jsonl", home / "held-out" / "trajectories.jsonl"
    main, ablations, critics, best, rest = [(data, [], ["collect.py", "--run", data.parent, *s])], [], [], [], []

    def evaluate(jobs, row, needs, *flags, n=n_test):
        run = home / folder_name(row)
        command = ["evaluate.py", "--run", run, "--n-tasks", n, "--seed", 1000 + seed, *flags]
        jobs.append((run / "metrics.json", needs, command))

    for row, flags in CRITICS.items():
        run = home / folder_name(row)
        jobs = main if row == "SWEET" else rest if "--max-trajectories" in flags else ablations
        jobs += [train_and_rank(run, data, flags, *s), policy(run, run / "preferences.jsonl", "", *s)]
        evaluate(jobs, row, [run / "policy"], "--policies", run / "policy")
    for row, algorithm in BASELINES.items():
        run = home / folder_name(row)
        main.append(policy(run, data, f"--algorithm {algorithm}", *s))
        evaluate(main, row, [run / "policy"], "--policies", run / "policy")
    evaluate(main, "zero-shot", [], "--policies", "base")
    evaluate(main, "single turn", [], "--policies", "base", "--max-turns", 1)
    run = home / folder_name(IMITATED)
    ablations.append(policy(run, home / "sweet" / "preferences.jsonl", "--beta 0", *s))
    evaluate(ablations, IMITATED, [run / "policy"], "--policies", run / "policy")

    run = home / folder_name(LABELS)
    ablations += [(run / "preferences.jsonl", [data], ["-c", RANK_BY_LABEL, data, run / "preferences.jsonl"]),
                  policy(run, run / "preferences.jsonl", "", *s)]
    evaluate(ablations, LABELS, [run / "policy"], "--policies", run / "policy")

    run, first = home / folder_name(SECOND), home / "sweet" / "policy"
    model, again = run / "model", ["--model", run / "model", *s]
    ablations += [(model, [first], ["-m", "colbench.lm.merge", first, model]),
                  (run / "trajectories.jsonl", [model], ["collect.py", "--run", run, *again]),
                  train_and_rank(run, run / "trajectories.jsonl", "", *again),
                  policy(run, run / "preferences.jsonl", "", *again)]
    evaluate(ablations, SECOND, [run / "policy"], "--model", model, "--policies", run / "policy")

    value, truth = home / "value", ranking_of(home, "rollout")
    critics += [train_and_rank(value, data, RANKERS["value"], *s),
                (held, [], ["collect.py", "--run", held.parent, "--tasks", "mini:test", "--n-tasks", 150, "--k", 2,
                            "--seed", 500 + seed])]
    rest.append((truth, [held], ["-c", ROLLOUT, "--run", truth.parent, "--trajectories", held, "--critic", "rollout",
                                 "--max-trajectories", 24, *s]))
    for row, flags in RANKERS.items():
        run = home / folder_name(row)
        ranked, needs = ranking_of(home, row), [] if row == "untrained" else [run / "preferences.jsonl"]
        if needs:  # a run that finds its critic trained ranks with it
            critics.append((ranked.parent / "critic", needs, ["-c", COPY, run / "critic", ranked.parent / "critic"]))
        command = ["train_critic.py", "--run", ranked.parent, "--trajectories", held, *flags.split(), *s]
        critics.append((ranked, [held, *(ranked.parent / "critic" for _ in needs)], command))
        critic = run / "critic" if needs else "untrained"
        for n in BEST_OF:
            evaluate(best, f"best of {n} by {row}", needs, "--policies", "base", "--best-of", n, "--critic", critic,
                     n=min(60, n_test))
    return main, ablations, critics, best, rest


def jobs_of_pages(out: Path, seed: int) -> list[tuple]:
    """Frontend Design: SWEET, the control and the baseline that it has, and all of them on held-out pages."""
    home, s = out / f"pages{seed}", ["--env", "frontend", "--seed", seed]
    data, policies = home / "data" / "trajectories.jsonl", [home / folder_name(row) / "policy" for row in PAGES]
    jobs = [(data, [], ["collect.py", "--run", data.parent, *s])]
    for flags, run in zip(PAGES.values(), (path.parent for path in policies)):
        if flags is None:
            jobs.append(policy(run, data, "--algorithm multi-turn-dpo", *s))
        else:
            jobs += [train_and_rank(run, data, flags, *s), policy(run, run / "preferences.jsonl", "", *s)]
    command = ["evaluate.py", "--env", "frontend", "--run", home / "test", "--seed", 1000 + seed]
    return [*jobs, (home / "test" / "metrics.json", policies, [*command, "--policies", "base", *policies])]


def ranking_of(home: Path, row: str) -> Path:
    """Where the held-out states stand with a critic's advantages."""
    return home / "held-out" / folder_name(row) / "preferences.jsonl"


def jobs_of_sweep(out: Path, n_test: int) -> list[tuple]:
    """Seed 0, every method with as many settings, judged on train-split tasks that nothing was trained on."""
    valid, data = out / "valid.jsonl", out / "data" / "trajectories.jsonl"
    jobs, trained = [(data, [], ["collect.py", "--run", data.parent])], set()
    for method, settings in SWEEP.items():
        for flags in settings:
            run, learned_from = out / folder_name(f"{method} {flags}"), data
            if "|" in flags:
                critic, flags = flags.split("|")
                learned_from = out / folder_name(f"critic {critic}") / "preferences.jsonl"
                if learned_from not in trained:
                    jobs.append(train_and_rank(learned_from.parent, data, critic))
                trained.add(learned_from)
            jobs += [policy(run, learned_from, flags),
                     (run / "metrics.json", [run / "policy"], ["evaluate.py", "--run", run, "--tasks", valid,
                                                               "--n-tasks", n_test, "--policies", run / "policy"])]
    return jobs


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
    [metrics] = json.loads(path.read_text())["policies"].values()
    return metrics["fixed"]["success"]


def half_width(values: list[float]) -> float:
    """Of the 95 % interval of the mean over seeds, by Student's t."""
    df = len(values) - 1
    t = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}.get(df, 1.96 + 2.372 / max(1, df) + 2.823 / max(1, df) ** 2)
    return t * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def interval(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:6.1%}" if values else ""
    return f"{statistics.mean(values):6.1%} ± {half_width(values):.1%}"


def kind(task: dict, messages: list[dict], candidate: str) -> str:
    """What the mini benchmark knows of a message: a "useful" question is about a detail of the task that was not told
    yet, another one is "useless"; an answer is "early" before all details are told, then "right" or "wrong"."""
    from colbench.env.backend.mini import details_of
    details = set(details_of(task["ground_truth"]))
    told = {name for m in messages if m["role"] == "user" for name in re.findall(r"The (\w+) is \d+\.", m["content"])}
    if "I WANT TO ANSWER" in candidate:
        mine, wanted = ({line.split("#")[0].strip() for line in code.splitlines() if re.match(r"\s+total [-+]=", line)}
                        for code in (candidate, task["ground_truth"]))
        return "early" if not told >= details else "right" if mine == wanted else "wrong"
    asked = re.search(r"the (\w+)", candidate)
    return "useful" if asked and asked[1] in details - told else "useless"


CLASSES = {  # which pairs of candidates of a state: (better, worse, by length in tokens)
    "useful over useless question, the useful one shorter": ("useful", "useless", lambda a, b: a < b),
    "equally long": ("useful", "useless", lambda a, b: a == b),
    "longer": ("useful", "useless", lambda a, b: a > b),
    "any question over an early answer": ("useful useless", "early", None),
    "all told: right over wrong answer": ("right", "wrong", None),
    "all told: right answer over a question": ("right", "useless", None),
}


def ranked_right(path: Path, trajectories: Path) -> dict[str, tuple[float, int]]:
    """{class of pairs: (share that the critic ranks right, how many)}, and "top": of the states that have both, the
    share whose best candidate is a useful question or a right answer."""
    if not (path.exists() and trajectories.exists()):
        return {}
    from colbench.lm.load import load_tokenizer
    tokenizer = load_tokenizer("tiny")
    tasks = {row["id"]: row["task"] for row in map(json.loads, open(trajectories))}
    found = {name: [] for name in (*CLASSES, "top")}
    for row in map(json.loads, open(path)):
        kinds = [kind(tasks[row["id"]], row["messages"], candidate) for candidate in row["candidates"]]
        lengths = [len(tokenizer.tokenize(candidate)) for candidate in row["candidates"]]
        of_state = list(zip(row["advantages"], kinds, lengths))
        for name, (better, worse, which) in CLASSES.items():
            found[name] += [(a > b) + 0.5 * (a == b) for a, one, m in of_state if one in better.split()
                            for b, other, n in of_state if other == worse and (not which or which(m, n))]
        if 0 < sum(one in ("useful", "right") for one in kinds) < len(kinds):
            found["top"].append(max(of_state)[1] in ("useful", "right"))
    return {name: (statistics.mean(values), len(values)) for name, values in found.items() if values}


def rank_by_label(trajectories: str, preferences: str) -> None:
    """Write what a critic without a fault would: ranks by `kind`, ties by chance."""
    from colbench.env.data import load_trajectories
    from colbench.env.dialogue import states_with_candidates
    from colbench.env.hidden_info import without_hidden_info
    Path(preferences).parent.mkdir(parents=True, exist_ok=True)
    worth, rng = {"useful": 2, "right": 2, "useless": 1, "wrong": 0, "early": 0}, random.Random(0)
    with open(preferences, "w", encoding="utf-8") as output:
        for state in states_with_candidates(load_trajectories(trajectories), ""):
            labels = [kind(state["task"], state["messages"], candidate) for candidate in state["candidates"]]
            row = without_hidden_info(state) | {"advantages": [worth[one] + rng.random() for one in labels]}
            output.write(json.dumps(row) + "\n")


def rank_correlation(path: Path, truth_path: Path) -> float | None:
    """Mean rank correlation with rollouts within a held-out state, over those at which the rollouts differ."""
    if not (path.exists() and truth_path.exists()):
        return None
    rows = [{(r["id"], r["sample"], r["turn"]): r for r in map(json.loads, open(p))} for p in (path, truth_path)]
    found = []
    for key in [key for key in rows[0] if key in rows[1]]:
        a, b = rows[0][key]["advantages"], rows[1][key]["advantages"]
        if len(a) > 2 and len(set(b)) > 1 and len(set(a)) > 1:
            found.append(statistics.correlation(ranks(a), ranks(b)))
    return statistics.mean(found) if found else None


def ranks(values: list[float]) -> list[float]:
    """Ranks, ties at their mean."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def write_table(out: Path, seeds: list[int]) -> None:
    rows = ["single turn", "zero-shot", *BASELINES, *CRITICS, IMITATED, LABELS, SECOND]
    rows += [f"best of {n} by {row}" for n in BEST_OF for row in RANKERS]
    text = ["| row | success on held-out mini tasks | difference to SWEET, paired over seeds | seeds |",
            "|---|---|---|---|"]
    found = {row: {s: success_of(out / f"seed{s}" / folder_name(row) / "metrics.json") for s in seeds} for row in rows}
    found = {row: {s: value for s, value in values.items() if value is not None} for row, values in found.items()}
    for row, values in found.items():
        if values:
            compared = [s for s in values if s in found["SWEET"] and row != "SWEET" and "best of" not in row]
            differences = [values[s] - found["SWEET"][s] for s in compared]
            text.append(f"| {row} | {interval(list(values.values()))} | {interval(differences)} | "
                        f"{', '.join(f'{v:.1%}' for v in values.values())} |")
    text += ["", f"| held-out states, pairs ranked right | {' | '.join((*RANKERS, 'rollout'))} |",
             "|---" * (len(RANKERS) + 2) + "|"]
    homes = [out / f"seed{s}" for s in seeds]
    judged = {row: [ranked_right(ranking_of(home, row), home / "held-out" / "trajectories.jsonl") for home in homes]
              for row in (*RANKERS, "rollout")}
    for name in (*CLASSES, "top"):
        cells = [interval([of_seed[name][0] for of_seed in by_seed if name in of_seed]) for by_seed in judged.values()]
        text.append(f"| {name} | {' | '.join(cells)} |")
    held = {row: [rank_correlation(ranking_of(home, row), ranking_of(home, "rollout")) for home in homes]
            for row in RANKERS}
    cells = [interval([value for value in values if value is not None]) for values in held.values()]
    text.append(f"| rank correlation with rollouts | {' | '.join(cells)} | |")
    text += ["", "| states of training, pairs ranked right | useful over useless question | top |", "|---|---|---|"]
    for row in CRITICS:
        by_seed = [ranked_right(home / folder_name(row) / "preferences.jsonl", home / "data" / "trajectories.jsonl")
                   for home in homes]
        if any(by_seed):
            sums = [[of_seed[name] for name in list(CLASSES)[:3]] for of_seed in by_seed if of_seed]
            pairs = [sum(share * n for share, n in three) / sum(n for _, n in three) for three in sums]
            tops = [of_seed["top"][0] for of_seed in by_seed if of_seed]
            text.append(f"| {row} | {interval(pairs)} | {interval(tops)} |")
    text += ["", "| Frontend Design | pixel similarity | win rate against base | seeds |", "|---|---|---|---|"]
    by_seed = [list(json.loads(path.read_text())["policies"].values())
               for path in sorted(out.glob("pages*/test/metrics.json"))]
    for row, metrics in zip(["base", *PAGES], zip(*by_seed)):
        alike, wins = [m["similarity"] for m in metrics], [m["against"]["win_rate"] for m in metrics if "against" in m]
        text.append(f"| {row} | {statistics.mean(alike):.3f} ± {half_width(alike):.3f} | {interval(wins)} | "
                    f"{', '.join(f'{value:.3f}' for value in alike)} |")
    (out / "table.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(text))
    try:
        import matplotlib
    except ImportError:
        return print("no figures: pip install matplotlib, then --table")
    matplotlib.use("Agg")
    draw(out, seeds, found)


def draw(out: Path, seeds: list[int], found: dict) -> None:
    """OUT/best_of_n.png, scaling.png and curves.png from success by row and seed, and from SWEET's logs."""
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
    names = {"rewards/accuracies": "pairs ranked right", "margin/nats": "margin / nats",
             "log_ratio/chosen": "log-ratio of chosen, nats a message"}
    figure, panels = pyplot.subplots(2, len(names), figsize=(9, 5), layout="constrained")
    for of_stage, stage in zip(panels, ("critic", "policy")):
        for axes, (name, title) in zip(of_stage, names.items()):
            axes.set(title=f"{stage}: {title}", xlabel="step")
            for seed in seeds:
                path = out / f"seed{seed}" / "sweet" / f"{stage}_log.jsonl"
                rows = [json.loads(line)[name] for line in open(path)] if path.exists() else []
                means = [statistics.mean(rows[i - 20:i]) for i in range(20, len(rows) + 1)]  # over 20 steps
                axes.plot(range(20, len(rows) + 1), means, color=f"C{seed}", label=f"seed {seed}")
    panels[0][0].legend(fontsize=7)
    figure.savefig(out / "curves.png", dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--n-test", type=int, default=300, help="held-out tasks an evaluation (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="scripts at once (default: all cores)")
    for flag in ("--table", "--sweep"):
        parser.add_argument(flag, action="store_true", help="see above")
    args = parser.parse_args()
    args.out = args.out.resolve()
    if args.sweep:
        args.out.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "colbench.env.backend.mini", "--split", "train", "--seed", "1", "--n",
                   args.n_test]
        made = subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True)
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
        run_jobs([job for of_seeds in (*by_kind, pages, rest) for jobs in of_seeds for job in jobs], args.workers)
    write_table(args.out, seeds)


if __name__ == "__main__":
    main()
