"""Draws the README's picture: all candidates of one state, best to worst by the critic.

    python tests/picture.py runs/tiny mini-train-0-53 0 3 > tests/pictures/state.svg    # id, sample, turn

Green are the questions that help: about a detail that the hidden reference has and the human has not told yet. The
embedded model's remarks without content are shortened to "…".
"""
import json
import re
import sys
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from colbench.env.backend.make_tiny import REMARKS

run, name, sample, turn = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
rows = lambda file: map(json.loads, (run / file).open(encoding="utf-8"))  # noqa: E731
task = next(line["task"] for line in rows("trajectories.jsonl") if (line["id"], line["sample"]) == (name, sample))
place = name, sample, turn
state = next(line for line in rows("preferences.jsonl") if (line["id"], line["sample"], line["turn"]) == place)
ranked = sorted(zip(state["advantages"], state["candidates"]), reverse=True)
told = " ".join(m["content"] for m in state["messages"][2:] if m["role"] == "user")
wanted = [detail for detail in re.findall(r"# (\w+)", task["ground_truth"]) if detail not in told]

shapes, y = [], 30
shorter = lambda text: re.sub(f"^(?:{'|'.join(REMARKS)})+", "… ", text)  # noqa: E731


def write(text, x, y, size=14, color="#24292f", weight="normal", family="sans-serif", anchor="start"):
    shapes.append(f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" font-weight="{weight}" '
                  f'font-family="{family}" text-anchor="{anchor}" xml:space="preserve">{escape(text)}</text>')


write("The dialogue so far: all that the agent sees", 20, y, weight="bold")
for message in state["messages"][1:]:
    who = "agent" if message["role"] == "assistant" else "human"
    words = (who + "  " + shorter(message["content"].split(" The signature")[0])).split(" ")
    line = ""
    for word in [*words, None]:
        if word is None or len(line) + len(word) > 62:
            y += 20
            write(line, 20, y, size=13, color="#57606a" if who == "human" else "#0550ae")
            line = "       "
        line += f" {word}" if line.strip() and word else word or ""
y += 34
write("The hidden reference: the critic sees it too", 20, y, weight="bold")
for line in task["ground_truth"].split("\n"):
    y += 18
    color = "#1a7f37" if any(f"# {detail}" in line for detail in wanted) else "#57606a"
    write(line, 20, y, size=12, color=color, family="monospace")
left_height = y

write("What the agent might say next, best to worst by the critic", 470, 30, weight="bold")
low, high = min(0.0, ranked[-1][0]), max(0.0, ranked[0][0])
scale, zero = 190 / (high - low), 800 + 190 * -low / (high - low)
for i, (advantage, text) in enumerate(ranked):
    y = 52 + 24 * i
    good = any(detail in text for detail in wanted) and "ANSWER" not in text
    text = "(answers at once, without asking on)" if "I WANT TO ANSWER" in text else shorter(text)
    write(text, 470, y + 13, size=13, color="#1a7f37" if good else "#24292f", weight="bold" if good else "normal")
    x, width = (zero, advantage * scale) if advantage > 0 else (zero + advantage * scale, -advantage * scale)
    fill = "#2da44e" if good else "#afb8c1"
    shapes.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="17" fill="{fill}"/>')
    write(f"{advantage:+.2f}", 762, y + 13, size=12, color="#57606a", anchor="end")
shapes.append(f'<line x1="{zero:.1f}" y1="46" x2="{zero:.1f}" y2="{52 + 24 * len(ranked)}" stroke="#57606a"/>')
write("advantage A(o, a, c)", 995, 70 + 24 * len(ranked), size=12, color="#57606a", anchor="end")
height = max(left_height, 70 + 24 * len(ranked)) + 20
print(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1010 {height}" width="1010" height="{height}">\n'
      f'<rect width="1010" height="{height}" fill="white"/>\n' + "\n".join(shapes) + "\n</svg>")
