"""Pages a second of the renderer, and whether two launches give the same bytes.

    python tests/bench/rendering.py                                    # the bundled pages
    python tests/bench/rendering.py --tasks frontend_tasks.jsonl --n 100
"""
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from colbench.env.frontend.browser import Renderer  # noqa: E402
from colbench.env.frontend.environment import Frontend  # noqa: E402
from colbench.run.errors import run_main  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="pages:test",
                        help="pages:test, a .jsonl file or a hub data set (default: %(default)s)")
    parser.add_argument("--n", type=int, default=100, help="pages (default: %(default)s)")
    parser.add_argument("--tabs", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--repeat", type=int, default=3,
                        help="measurements of each, after one to warm up (default: %(default)s)")
    parser.add_argument("--layout", action="store_true", help="measure the layout too, as for the scripted reviewer")
    args = parser.parse_args()
    pages = [task["ground_truth"] for task in Frontend.tasks(args.tasks, args.n)]
    expected = None
    for tabs in args.tabs:
        rates = []
        for turn in range(args.repeat + 1):
            with tempfile.TemporaryDirectory() as folder, Renderer(folder, tabs=tabs, layout=args.layout) as renderer:
                ready = time.perf_counter()
                pictures = renderer.render(pages)
                rates.append(len(set(pages)) / (time.perf_counter() - ready))
                refused = [picture.refusal for picture in pictures if picture.refusal]
                shots = [picture.path and picture.path.read_bytes() for picture in pictures]
                expected = expected or shots
                if shots != expected:
                    others = sum(a != b for a, b in zip(shots, expected))
                    print(f"not the same bytes as before: {others} of {len(pages)} pages")
                fingerprint = renderer.fingerprint
        print(f"{tabs} tab(s): {statistics.median(rates[1:]):.2f} pages/s "
              f"({min(rates[1:]):.2f} .. {max(rates[1:]):.2f}), "
              f"{len(refused)} of {len(pages)} refused {refused[:1] or ''}")
    print(fingerprint)


if __name__ == "__main__":
    run_main(main)
