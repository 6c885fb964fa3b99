"""Draw the README's picture: all candidates of one state, best to worst by the critic.

    python tests/picture.py RUN ID SAMPLE TURN > FILE.svg
    python tests/picture.py runs/tiny mini-train-0-138 2 3 > tests/pictures/state.svg

Green marks useful questions: about a detail of the hidden code that the human has not told yet. The
embedded model's remarks without content are shortened to "…". The axis leaves out far outliers,
such as answering too early; their bars end in a break mark.
"""
import json
import math
import re
import statistics
import sys
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from colbench.env.backend.make_tiny import REMARKS

GREEN, DARK_GREEN, GREY, BLACK, SOFT, BLUE = (
    "#2da44e", "#1a7f37", "#afb8c1", "#24292f", "#57606a", "#0550ae")
LEFT, RIGHT = 800, 990  # of the bars, in pixels
CUT = 26  # pixels for the end of a bar that is cut
shapes = []


def rows(file):
    """The lines of a file in the run folder."""
    return map(json.loads, (run / file).open(encoding="utf-8"))


def write(text, x, y, size=14, color=BLACK, weight="normal", family="sans-serif", anchor="start"):
    shapes.append(
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" font-weight="{weight}" '
        f'font-family="{family}" text-anchor="{anchor}" xml:space="preserve">{escape(text)}</text>')


def line(x1, y1, x2, y2, color=SOFT):
    shapes.append(
        f'<line x1="{x1:.1f}" y1="{y1}" x2="{x2:.1f}" y2="{y2}" stroke="{color}"/>')


def shorter(text):
    """`text` with the remarks before it shortened to "…"."""
    return re.sub(f"^(?:{'|'.join(REMARKS)})+", "… ", text)


def signed(number, digits=2):
    return f"{number:+.{digits}f}".replace("-", "−")


def axis_range(advantages, useful):
    """(low, high) of the axis: 0, the useful candidates and everything except far outliers.

    Far outliers are more than three interquartile ranges outside the quartiles (Tukey). They are
    left out only if they would at least double the axis.
    """
    lower, _, upper = statistics.quantiles(advantages, n=4, method="inclusive")
    reach = 3 * (upper - lower)
    shown = [a for a in advantages if a in useful or lower - reach <= a <= upper + reach]
    low, high = min(0.0, *shown), max(0.0, *shown)
    whole = min(0.0, *advantages), max(0.0, *advantages)
    return (low, high) if whole[1] - whole[0] >= 2 * (high - low) else whole


def break_mark(x, y):
    """A slanted gap in a bar at x: the bar is longer than drawn."""
    shapes.append(f'<polygon points="{x:.1f},{y - 2} {x + 6:.1f},{y - 2} {x:.1f},{y + 19} '
                  f'{x - 6:.1f},{y + 19}" fill="white"/>')
    for left in (x, x + 6):
        line(left, y - 2, left - 6, y + 19, BLACK)


run, name, sample, turn = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
task = next(row["task"] for row in rows("trajectories.jsonl")
            if (row["id"], row["sample"]) == (name, sample))
state = next(row for row in rows("preferences.jsonl")
             if (row["id"], row["sample"], row["turn"]) == (name, sample, turn))
ranked = sorted(zip(state["advantages"], state["candidates"]), reverse=True)
told = " ".join(m["content"] for m in state["messages"][2:] if m["role"] == "user")
missing = [detail for detail in re.findall(r"# (\w+)", task["ground_truth"]) if detail not in told]


def is_useful(text):
    return any(detail in text for detail in missing) and "ANSWER" not in text


# ---- left: the dialogue, the hidden code

y = 30
write("The dialogue so far: all the agent sees", 20, y, weight="bold")
for message in state["messages"][1:]:
    who = "agent" if message["role"] == "assistant" else "human"
    words = (who + "  " + shorter(message["content"].split(" The signature")[0])).split(" ")
    text = ""
    for word in [*words, None]:
        if word is None or len(text) + len(word) > 62:
            y += 20
            write(text, 20, y, size=13, color=SOFT if who == "human" else BLUE)
            text = "       "
        text += f" {word}" if text.strip() and word else word or ""
y += 34
write("The hidden code: the critic sees it too", 20, y, weight="bold")
for code_line in task["ground_truth"].split("\n"):
    y += 18
    is_missing = any(f"# {detail}" in code_line for detail in missing)
    write(code_line, 20, y, size=12, color=DARK_GREEN if is_missing else SOFT, family="monospace")
left_height = y

# ---- right: the candidates and their advantages

write("What the agent might say next, best to worst by the critic", 470, 30, weight="bold")
low, high = axis_range([advantage for advantage, _ in ranked],
                       {advantage for advantage, text in ranked if is_useful(text)})
axis_left = LEFT + (CUT if ranked[-1][0] < low else 0)
axis_right = RIGHT - (CUT if ranked[0][0] > high else 0)
scale = (axis_right - axis_left) / (high - low or 1)
zero = axis_left - low * scale
bottom = 52 + 24 * len(ranked)
step = 10 ** math.floor(math.log10((high - low or 1) / 2))  # of the ticks: at most five intervals
step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= 5)
digits = max(0, -math.floor(math.log10(step) + 1e-9))
for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
    x = zero + k * step * scale
    line(x, 46, x, bottom + 4, SOFT if k == 0 else "#d8dee4")
    write(signed(k * step, digits) if k else "0", f"{x:.1f}", bottom + 18, size=11, color=SOFT,
          anchor="middle")
for i, (advantage, text) in enumerate(ranked):
    y = 52 + 24 * i
    useful = is_useful(text)
    text = "(answers at once, asks no more)" if "I WANT TO ANSWER" in text else shorter(text)
    write(text, 470, y + 13, size=13, color=DARK_GREEN if useful else BLACK,
          weight="bold" if useful else "normal")
    is_cut = not low <= advantage <= high
    end = zero + advantage * scale
    if is_cut:
        end = LEFT if advantage < low else RIGHT
    shapes.append(f'<rect x="{min(zero, end):.1f}" y="{y}" width="{abs(end - zero):.1f}" '
                  f'height="17" fill="{GREEN if useful else GREY}"/>')
    if is_cut:
        break_mark(LEFT + CUT / 2 if advantage < low else RIGHT - CUT / 2, y)
    write(signed(advantage), 780, y + 13, size=12, color=BLACK if is_cut else SOFT,
          weight="bold" if is_cut else "normal", anchor="end")
line(zero, 46, zero, bottom)
write("advantage A(o, a, c)", RIGHT, bottom + 36, size=12, color=SOFT, anchor="end")
height = max(left_height, bottom + 36) + 20
print(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1010 {height}" width="1010" '
      f'height="{height}">\n<rect width="1010" height="{height}" fill="white"/>\n'
      + "\n".join(shapes) + "\n</svg>")
