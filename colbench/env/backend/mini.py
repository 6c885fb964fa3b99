"""The bundled mini benchmark: Backend Programming tasks for a model of two million parameters.

A shop wants the price of n items for d days. The request names three or four things that the shop
deals in. Each of these *hints* points to one of twenty *details* (porcelain -> insurance), and each
detail of a task is one line of its hidden code:

    request      Please write quote(n, d), the price of n items for d days. We deal in porcelain, …
    hidden code  def quote(n, d):
                     total = 0
                     total += 6 * n  # insurance
                     total += 3 * (d > 2)  # toll
                     return total

Only the human knows the numbers (2 to 9). Asking about a detail that the task does not have wastes
a turn ("I don't know."), and ten turns are too few to ask about all twenty. An answer with a
missing detail or a wrong number fails at least one of the ten test calls. The order of the lines
does not matter.

    python -m colbench.env.backend.mini --split test --n 3          # look at some tasks
    python -m colbench.env.backend.mini --split train --n 1000 > tasks.jsonl
"""
import argparse
import hashlib
import itertools
import json
import random
import re

# detail -> (its line, with V for the hidden number; its six hints, of which a request uses one)
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
    """The vague request that the agent gets."""
    deals = ", ".join(hints[:-1]) + " and " + hints[-1]
    return (f"Please write {function}(n, d), the price of n items for d days. We deal in {deals}. "
            f"The signature of the function is: def {function}(n, d)")


def code(function: str, numbers: dict[str, int], comments: bool = True) -> str:
    """The function that adds up `numbers` (detail -> V). comments: name the details."""
    lines = [f"def {function}(n, d):", "    total = 0"]
    for name, number in numbers.items():
        comment = f"  # {name}" if comments else ""
        lines.append("    total " + DETAILS[name][0].replace("V", str(number)) + comment)
    return "\n".join(lines + ["    return total"])


def details_of(hidden_code: str) -> dict[str, int] | None:
    """The numbers in this benchmark's hidden code, detail -> V; None for any other code."""
    head = re.match(r"def (\w+)\(n, d\):\n", hidden_code)
    lines = re.findall(r"^    total ([-+]= .*)  # (\w+)$", hidden_code, re.MULTILINE)
    if not head:
        return None
    numbers = {}
    for line, name in lines:
        if name not in DETAILS:
            continue
        pattern = re.escape(DETAILS[name][0]).replace("V", r"(\d+)")
        if match := re.fullmatch(pattern, line):
            numbers[name] = int(match[1])
    return numbers if numbers and code(head[1], numbers) == hidden_code else None


def _total(numbers: dict[str, int], n: int, d: int) -> int:
    total = 0
    for name, number in numbers.items():
        sign, term = DETAILS[name][0].split("= ")
        values = {"V": number, "n": n, "d": d, "max": max, "min": min, "abs": abs}
        total += (1 if sign == "+" else -1) * eval(term, values)
    return total


def mini_task(split: str, index: int, seed: int = 0, details: tuple = (3, 4)) -> dict:
    """Task number `index` of a split; a pure function of its arguments.

    The content decides the split, so no task is in both. details: how many of them a task may have.
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
        # every line matters: an answer without some of them fails at least one call
        whole = [_total(numbers, *call) for call in calls]
        parts = (part for size in range(len(names)) for part in itertools.combinations(names, size))
        if all([_total({name: numbers[name] for name in part}, *call) for call in calls] != whole
               for part in parts):
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
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    return [mini_task(split, index, seed) for index in range(n)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--n", type=int, default=3, help="number of tasks (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the tasks (default: 0)")
    args = parser.parse_args()
    for task in mini_tasks(args.split, args.n, args.seed):
        print(json.dumps(task))
