"""Rates with intervals, and the metrics of dialogues in every environment."""
import math

import numpy as np


def wilson(hits: float, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson's score interval): `hits` of n independent episodes."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959964, hits / n
    middle = p + z * z / (2 * n)
    width = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - width) / scale), min(1.0, (middle + width) / scale)


def bootstrap(values, tasks) -> tuple[float, float]:
    """95 % interval of a mean over episodes: percentiles of 10,000 means over resampled tasks.

    Tasks are resampled because episodes of one task are not independent.
    tasks: the task id of each value. (0, 1) without values.
    """
    if not len(values):
        return 0.0, 1.0
    by_task = {}
    for value, task in zip(values, tasks):
        by_task.setdefault(task, []).append(float(value))
    sums, counts = np.array([(sum(of_task), len(of_task)) for of_task in by_task.values()]).T
    rows = np.random.default_rng(0).integers(len(sums), size=(10_000, len(sums)))
    low, high = np.percentile(sums[rows].sum(1) / counts[rows].sum(1), [2.5, 97.5])
    return float(low), float(high)


def mean_95(values, tasks) -> tuple[float, float]:
    """95 % interval of a mean of values from 0 to 1.

    By `bootstrap`; if all values are equal, where that has no width, Wilson's for as many tasks.
    """
    if len({*values}) > 1 or not len(values):
        return bootstrap(values, tasks)
    n = len({*tasks})
    return wilson(values[0] * n, n)


def paired(pairs: list[tuple[float, float]], tasks: list[str]) -> tuple[float, tuple[float, float]]:
    """(mean difference, its 95 % interval) of pairs of values, one pair per episode."""
    differences = [float(a) - float(b) for a, b in pairs]
    return float(np.mean(differences)), bootstrap(differences, tasks)


def pass_hat(c: int, n: int, k: int) -> float:
    """pass^k of a task with c of n episodes right: the chance that k drawn of them are all right.

    Drawn without replacement, which makes it unbiased for p^k.
    """
    return math.comb(c, k) / math.comb(n, k)


def pass_at(c: int, n: int, k: int) -> float:
    """pass@k, likewise: the chance that at least one of k is right. Unbiased for 1 - (1 - p)^k."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def smallest_difference(values: list[float], tasks: list[str], samples: int = 1) -> float | None:
    """The smallest true difference that a two-sided test at 5 % detects with 80 % power.

    That is (1.960 + 0.842) standard errors of the mean, clustered by task because episodes of one
    task are not independent. None if the values do not vary.
    values: paired differences; with samples=2, outcomes of one of two equally large evaluations.
    """
    by_task = {}
    for value, task in zip(values, tasks):
        by_task.setdefault(task, []).append(value)
    n = len(by_task)
    mean = sum(values) / max(1, len(values))
    spread = sum(sum(value - mean for value in of_task) ** 2 for of_task in by_task.values())
    if n < 2 or spread < 1e-12:
        return None
    error = math.sqrt(spread * n / (n - 1)) / len(values)  # of a mean over clusters
    return (1.959964 + 0.841621) * error * math.sqrt(samples)


def success_rate(wins: list[bool], tasks: list[str]) -> dict:
    """{"success", "success_95"}. The interval is over tasks.

    Wilson's if each task was played once, else a bootstrap.
    """
    rate = sum(wins) / max(1, len(wins))
    n = len({*tasks})
    resampled = n < len(tasks) and 0 < rate < 1  # a bootstrap of equal outcomes has no width
    if resampled:
        interval = bootstrap(wins, tasks)
    else:
        interval = wilson(sum(wins) * n / max(1, len(tasks)), n)
    return {"success": rate, "success_95": interval}


def dialogue_metrics(sound: list[dict]) -> dict:
    """Metrics of the episodes without an error.

    turns: agent messages per episode
    tokens_per_message: as the agent's model counts them
    answered_at_limit: share of episodes whose last turn came without an answer
    """
    n = max(1, len(sound))
    said = [m for line in sound for m in line["dialogue_history"] if m["role"] == "assistant"]
    tokens = [m["tokens"] for m in said if m.get("tokens") is not None]
    return {"turns": len(said) / n, "tokens_per_message": sum(tokens) / max(1, len(tokens)),
            "answered_at_limit": sum(line["outcome"] == "limit" for line in sound) / n}


def leak_rate(sound: list[dict]) -> float:
    """Share of human replies whose first draft contained hidden code."""
    replies = [m for line in sound for m in line["dialogue_history"][1:] if m["role"] == "user"]
    return sum(m.get("leaked", False) for m in replies) / max(1, len(replies))
