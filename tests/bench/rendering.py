"""Measure the renderer (pages per second, equal bytes in two launches) or test the pixel measure.

    python tests/bench/rendering.py                                    # the bundled pages
    python tests/bench/rendering.py --tasks frontend_tasks.jsonl --n 100
    python tests/bench/rendering.py --order --tasks frontend_tasks.jsonl

For --order each page has four candidates (tests/edited_pages.py): near, moderate and major edit,
unrelated page. Prints how many pages have all candidates in this order, and how many pairs of
candidates: for hand-written pages, and for random edits of these and of --tasks. Compares the
measure, its two parts and the similarity of 32 x 32 thumbnails.
"""
import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from colbench.env.frontend.browser import Renderer  # noqa: E402
from colbench.env.frontend.environment import Frontend  # noqa: E402
from colbench.env.frontend.score import Pixels  # noqa: E402
from colbench.run.errors import run_main  # noqa: E402
from edited_pages import edited, own  # noqa: E402


def thumbnails(one, other):
    """1 minus the mean difference of two pictures at 32 x 32 px."""
    a, b = (Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BOX)
            for path in (one, other))
    return 1 - abs(np.asarray(a, float) / 255 - np.asarray(b, float) / 255).mean()


def order(pages):
    """Print how each measure orders candidates of hand-written pages and of edited `pages`."""
    by_hand, pixels = own(), Pixels()
    measures = {"measure": lambda a, b: pixels.similarities([(a, b)])[0],
                "coarse": lambda a, b: pixels.parts(a, b)[0],
                "detail": lambda a, b: pixels.parts(a, b)[1], "thumbnails": thumbnails}
    sets = {"by hand": by_hand}
    for seed in range(3):
        sets[f"edits of these, {seed}"] = edited([page for page, _ in by_hand], seed)
        sets[f"edits of the tasks, {seed}"] = edited(pages, seed)
    for name, rows in sets.items():
        with tempfile.TemporaryDirectory() as folder, Renderer(folder) as renderer:
            shots = [[picture.path for picture in renderer.render([page, *others])]
                     for page, others in rows]
            shots = [row for row in shots if None not in row]
            results = []
            for label, measure in measures.items():
                right = []
                for page, *others in shots:
                    scores = [measure(path, page) for path in others]
                    right.append([a > b for a, b in itertools.combinations(scores, 2)])
                results.append(f"{label} {sum(map(all, right))} ({sum(map(sum, right))} pairs)")
        print(f"{name}, {len(shots)} pages ({6 * len(shots)} pairs): " + ", ".join(results),
              flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="pages:test",
                        help="pages:test, a .jsonl file or a hub data set (default: %(default)s)")
    parser.add_argument("--n", type=int, default=100, help="pages (default: %(default)s)")
    parser.add_argument("--tabs", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--repeat", type=int, default=3,
                        help="measurements per setting, after a warm-up (default: %(default)s)")
    parser.add_argument("--layout", action="store_true",
                        help="measure the layout too, as for the scripted reviewer")
    parser.add_argument("--order", action="store_true",
                        help="test the order of edited pages, not the speed")
    args = parser.parse_args()
    pages = [task["ground_truth"] for task in Frontend.tasks(args.tasks, args.n)]
    if args.order:
        return order(pages)
    expected = None
    for tabs in args.tabs:
        rates = []
        for turn in range(args.repeat + 1):
            with (tempfile.TemporaryDirectory() as folder,
                  Renderer(folder, tabs=tabs, layout=args.layout) as renderer):
                ready = time.perf_counter()
                pictures = renderer.render(pages)
                rates.append(len(set(pages)) / (time.perf_counter() - ready))
                refused = [picture.refusal for picture in pictures if picture.refusal]
                shots = [picture.path and picture.path.read_bytes() for picture in pictures]
                expected = expected or shots
                if shots != expected:
                    others = sum(a != b for a, b in zip(shots, expected))
                    print(f"different bytes than before: {others} of {len(pages)} pages")
                fingerprint = renderer.fingerprint
        print(f"{tabs} tab(s): {statistics.median(rates[1:]):.2f} pages/s "
              f"({min(rates[1:]):.2f} .. {max(rates[1:]):.2f}), "
              f"{len(refused)} of {len(pages)} refused {refused[:1] or ''}")
    print(fingerprint)


if __name__ == "__main__":
    run_main(main)
