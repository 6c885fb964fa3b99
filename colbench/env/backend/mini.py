"""The bundled mini benchmark: Backend Programming tasks made from a seed, small enough for a two-million-weight model.

A shop wants the price of n items for d days. The request names three or four things the shop deals in; each of these
*hints* points to one of twenty *details* (porcelain -> insurance), and each detail of a task is one line of its hidden
reference:

    request    Please write quote(n, d), the price of n items for d days. We deal in porcelain, ferries, ... .
    reference  def quote(n, d):
                   total = 0
                   total += 6 * n  # insurance
                   total += 3 * (d > 2)  # toll
                   return total

Only the human knows the numbers (2 to 9). Asking about a detail that the task does not have costs a turn ("I don't
know."), and with twenty details and ten turns one cannot ask about all of them; an answer that lacks a detail or has a
wrong number fails at least one of the ten test calls. The lines commute, so any order of them is right.

    python -m colbench.env.backend.mini --split test --n 3          # look at some tasks
    python -m colbench.env.backend.mini --split train --n 1000 > tasks.jsonl
"""
import argparse
import hashlib
import itertools
import json
import random
import re

# detail -> (its line, V is the number that only the human knows; six hints, any of which may stand for it in a request)
DETAILS = {
    "insurance": ("+= V * n", "porcelain crystal antiques paintings violins jewellery"),
    "customs": ("+= V", "imports borders embassies overseas tariffs passports"),
    "storage": ("+= V * d", "warehouses attics cellars pallets lockers archives"),
    "rebate": ("-= V * (n // 5)", "dozens crates wholesale multipacks bundles batches"),
    "deposit": ("+= V * (n > 3)", "rentals keys bicycles costumes kayaks projectors"),
    "cooling": ("+= V * n * d", "vaccines icecream flowers seafood cheese yoghurt"),
    "overtime": ("+= V * (d // 5)", "sundays holidays nights deadlines shifts emergencies"),
    "packing": ("+= V * max(0, n - 4)", "boxes bubblewrap cartons envelopes parcels ribbons"),
    "toll": ("+= V * (d > 2)", "bridges tunnels motorways ferries canals turnpikes"),
    "credit": ("-= V * (d // 7)", "vouchers returns refunds coupons giftcards apologies"),
    "cleaning": ("+= V * (d % 3)", "carpets stables kitchens aquariums kennels saunas"),
    "parking": ("+= V * min(d, 4)", "vans trucks coaches trailers limousines tractors"),
    "assembly": ("+= V * min(n, 6)", "wardrobes desks shelves bunkbeds cabinets trampolines"),
    "licence": ("+= V * (n // 3)", "software fonts fireworks drones alcohol music"),
    "disposal": ("+= V * (n % 2)", "batteries asbestos rubble paint mattresses scrap"),
    "loyalty": ("-= V * (n > 8)", "members regulars subscribers alumni veterans patrons"),
    "escort": ("+= V * abs(n - d)", "cash turbines yachts cranes racehorses celebrities"),
    "fuel": ("+= V * (n + d)", "flights cruises safaris convoys generators snowmobiles"),
    "training": ("+= V * max(n, d)", "apprentices interns pilots surgeons divers welders"),
    "surcharge": ("+= V * (d > 9)", "festivals weddings carnivals elections concerts marathons"),
}
FUNCTIONS = ("quote", "price", "charge", "bill")


def request(function: str, hints: list[str]) -> str:
    """The vague request that the agent sees."""
    deals = ", ".join(hints[:-1]) + " and " + hints[-1]
    return (f"Please write {function}(n, d), the price of n items for d days. We deal in {deals}. "
            f"The signature of the function is: def {function}(n, d)")


def code(function: str, numbers: dict[str, int], comments: bool = True) -> str:
    """The function that adds up `numbers` (detail -> V); comments name the details, as in a reference."""
    lines = [f"def {function}(n, d):", "    total = 0"]
    for name, number in numbers.items():
        lines.append("    total " + DETAILS[name][0].replace("V", str(number)) + (f"  # {name}" if comments else ""))
    return "\n".join(lines + ["    return total"])


def details_of(reference: str) -> dict[str, int] | None:
    """The numbers behind a reference of this benchmark, detail -> V; None for any other reference."""
    head = re.match(r"def (\w+)\(n, d\):\n", reference)
    lines = re.findall(r"^    total ([-+]= .*)  # (\w+)$", reference, re.MULTILINE)
    found = {}
    for line, name in lines if head else ():
        pattern = re.escape(DETAILS[name][0]).replace("V", r"(\d+)") if name in DETAILS else "(?!)"
        if value := re.fullmatch(pattern, line):
            found[name] = int(value[1])
    return found if found and code(head[1], found) == reference else None


def _total(numbers: dict[str, int], n: int, d: int) -> int:
    total = 0
    for name, number in numbers.items():
        sign, term = DETAILS[name][0].split("= ")
        values = {"V": number, "n": n, "d": d, "max": max, "min": min, "abs": abs}
        total += (1 if sign == "+" else -1) * eval(term, values)
    return total


def mini_task(split: str, index: int, seed: int = 0, details: tuple = (3, 4)) -> dict:
    """Task number `index` of a split; a pure function of its arguments.

    A task is never in both splits: its content decides. details: how many of them a task may have.
    """
    rng = random.Random(f"{split} {seed} {index}")
    while True:
        names = rng.sample(list(DETAILS), rng.choice(details))
        numbers = {name: rng.randint(2, 9) for name in names}
        hints = [rng.choice(DETAILS[name][1].split()) for name in names]
        content = json.dumps([sorted(numbers.items()), sorted(hints)])
        if ("test" if hashlib.sha256(content.encode()).digest()[0] < 64 else "train") != split:
            continue
        calls = rng.sample([(n, d) for n in range(1, 21) for d in range(1, 21)], 10)
        # every line must matter: no answer that lacks some of them passes all ten calls
        whole = [_total(numbers, *call) for call in calls]
        parts = (part for size in range(len(names)) for part in itertools.combinations(names, size))
        if all([_total({name: numbers[name] for name in part}, *call) for call in calls] != whole for part in parts):
            break
    rng.shuffle(hints)
    function = rng.choice(FUNCTIONS)
    return {
        "id": f"mini-{split}-{seed}-{index}",
        "problem_description": request(function, hints),
        "ground_truth": code(function, numbers),
        "test_cases": {f"test{i + 1}": f"{function}({n}, {d})" for i, (n, d) in enumerate(calls)},
    }


def mini_tasks(split: str, n: int, seed: int = 0) -> list[dict]:
    """The first n tasks of a split ("train" or "test") in the published ColBench format."""
    if split not in ("train", "test"):
        raise ValueError(f"split is 'train' or 'test', not {split!r}")
    return [mini_task(split, index, seed) for index in range(n)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--n", type=int, default=3, help="number of tasks (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other tasks (default: 0)")
    args = parser.parse_args()
    for task in mini_tasks(args.split, args.n, args.seed):
        print(json.dumps(task))
