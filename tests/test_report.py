"""The report in a real browser, the credit against a slow computation, talk in a real terminal."""
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time

import pytest
import torch

from colbench.env.backend.environment import Backend
from colbench.env.backend.mini import code
from colbench.env.backend.score import Scorer
from colbench.env.backend.tasks import load_tasks
from colbench.env.dialogue import prompt_messages
from colbench.env.evidence import evidence
from colbench.env.hidden_info import HIDDEN_INFO
from colbench.lm.adapters import add_lora
from colbench.lm.load import load_model, load_tokenizer
from colbench.lm.logps import Tree, message_logps
from colbench.lm.tokens import encode_dialogue, end_of_turn, message_ids
from colbench.look.credit import add_credit, token_ends
from colbench.look.report import address, write_report
from colbench.run.errors import UserError
from conftest import browser_program, needs_browser
from stages import ROOT, refused
from stages import run as run_script

HOSTILE = ("<script>window.pwned = 1</script></script><img src=x onerror='window.pwned = 2'>"
           "</textarea><!-- </title>\u2028<svg onload=alert(1)> \u202eevil\u202c \ud800 \x00 "
           "[x](javascript:alert(1)) http://example.com/leak ${window.pwned=3} ]]>")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=browser_program() or None,
                                    args=["--no-sandbox"])
        yield browser
        browser.close()


class Watched:
    """A page that must not write console errors, open dialogs, or request anything else."""

    def __init__(self, browser, path, **settings):
        self.wrong, self.requests = [], []
        self.page = browser.new_page(**settings)
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.wrong.append("dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(f"file://{path}")

    def items(self):
        return self.page.locator("#list .item").count()

    def search(self, words, expected):
        self.page.fill("#search", words)
        self.page.wait_for_function("n => document.querySelectorAll('#list .item').length === n",
                                    arg=expected,
                                    timeout=10_000)

    def close(self, requests=1):
        assert not self.wrong and len(self.requests) == requests, (self.wrong, self.requests)
        assert all(url.startswith("file://") for url in self.requests)
        assert self.page.evaluate("window.pwned === undefined && document.scripts.length === 2")
        self.page.close()


def rows_of(page):
    """{label: texts of its cells} of the table."""
    rows = [row for row in page.locator("#table tbody tr").all() if row.locator("td").count()]
    texts = [[text.replace("\u00a0", " ") for text in row.locator("td").all_inner_texts()]
             for row in rows]
    return {row.locator("th").inner_text(): cells for row, cells in zip(rows, texts)}


def task(name, hidden_code="def f(x):\n    y = x + 1  # one more\n    return y"):
    return {"id": name, "problem_description": f"Please write f for {name}.",
            "ground_truth": hidden_code, "test_cases": {"t1": "f(1)", "t2": "f('<b>')"}}


ANSWER = "def f(x):\n    y = x + 2\n    return y"


def episode(name, policy, passed, texts=("What is added?",), answer=ANSWER, **more):
    """An episode in which `passed` of two test calls passed."""
    history = [{"role": "user", "content": f"Please write f for {name}."}]
    for text in texts:
        history += [{"role": "assistant", "content": text, "output": text, "tokens": 4},
                    {"role": "user", "content": "One."}]
    last = "I WANT TO ANSWER:\n" + answer
    history.append({"role": "assistant", "content": last, "output": last, "tokens": 9})
    fixed = {"passed": passed, "total": 2,
             "calls": ["passed"] * passed + ["wrong"] * (2 - passed),
             "expected": ["2", "'<i>'"], "got": ["2", None]}
    scores = {"sandbox": "strict", "fixed": fixed, "official": {"passed": 0, "total": 2}}
    return {"id": name, "sample": 0, "policy": policy, "task": task(name), "system": "Ask.",
            "dialogue_history": history, "answer": answer, "outcome": "answered",
            "reward": passed / 2, "scores": scores} | more


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def logs(directory, slope=1.0, n=40):
    write_lines(directory / "critic_log.jsonl", [
        {"step": i, "loss": 0.69 - 0.01 * i * slope, "rewards/accuracies": 0.5, "margin": slope * i,
         "log_ratio/chosen": 0.1 * i,
         "log_ratio/rejected": -0.1 * i, "tokens_per_second": 1234.5, "peak_memory_gb": 0.5}
        for i in range(n)])


@pytest.fixture()
def run(tmp_path):
    """A made-up run of 30 tasks. The policy solves every third task, base every tenth."""
    rows = []
    for policy, every in (("base", 10), ("runs/x/policy", 3)):
        for i in range(30):
            rows.append(episode(f"task-{i}", policy, 2 if i % every == 0 else i % 2))
    rows[1] |= {"outcome": "limit"}
    rows[2]["dialogue_history"][2]["leaked"] = True
    broken = {key: rows[3][key] for key in ("id", "sample", "policy", "task", "system")}
    rows[3] = broken | {"dialogue_history": rows[3]["dialogue_history"][:1], "answer": None,
                        "outcome": "simulation_failed", "error": "agent: TimeoutError: 1"}
    write_lines(tmp_path / "episodes.jsonl", rows)
    return tmp_path


@needs_browser
def test_table_filter_and_search(browser, run):
    rows = [json.loads(line) for line in open(run / "episodes.jsonl")]
    by_policy = {p: [r for r in rows if r["policy"] == p] for p in ("base", "runs/x/policy")}
    more = evidence(Backend, by_policy, run / "episodes.jsonl")
    metrics = {policy: Backend.metrics(of) | more[policy] for policy, of in by_policy.items()}
    path = write_report(run / "report.html", [run], metrics)
    for scheme, width in (("light", 1200), ("dark", 390)):
        report = Watched(browser, path, viewport={"width": width, "height": 800},
                         color_scheme=scheme)
        page = report.page
        # fits on a phone
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (dark == "rgb(20, 22, 26)") == (scheme == "dark")
        table = rows_of(page)
        # 3 of 29 episodes without errors, 10 of 30; the official scorer passed none
        assert [text.split("\n")[0] for text in table["success · fixed"]] == ["10.3 %", "33.3 %"]
        assert [text.split("\n")[0] for text in table["success · official"]] == ["0.0 %", "0.0 %"]
        assert " .. " in table["success · fixed"][0] and table["replies"] == ["29", "30"]
        bars = [" ".join(bar.split()) for bar in page.locator(".endings .bar").all_inner_texts()]
        assert bars == ["base 30 episodes right 3 wrong 25 agent failed 1 at the limit 1",
                        "runs/x/policy 30 episodes right 10 wrong 20"]
        chips = ("all", "solved", "failed", "limit", "leaked", "error")
        counted = {chip: int(page.locator(f"#kind-{chip} span").inner_text()) for chip in chips}
        assert counted == {"all": 60, "solved": 13, "failed": 46,
                           "limit": 1, "leaked": 1, "error": 1}
        for chip, n in counted.items():
            page.click(f"#kind-{chip}")
            assert report.items() == n
        page.click("#kind-solved")
        page.select_option("#source", "runs/x/policy")
        assert report.items() == 10
        report.search("task-27 f", 1)
        assert page.locator("#detail").inner_text().count("task-27") >= 1
        report.search("no such words", 0)
        report.close()


@needs_browser
def test_success_of_the_table_is_counted(browser, run):
    """Without metrics.json, as during an evaluation: base solved 3 of 29, the policy 10 of 30."""
    report = Watched(browser, write_report(run / "report.html", [run]))
    cells = rows_of(report.page)["success · fixed"]
    assert [text.split("\n")[0] for text in cells] == ["10.3 %", "33.3 %"]
    report.close()


@needs_browser
def test_equal_rows_are_shown_once_and_nothing_is_cut_off(browser, tmp_path):
    """Ten policies with long names at 1,400 px; the scorers agree on one, on all or on none."""
    share = lambda value: {"success": value, "success_95": [value - 0.1, value + 0.1]}  # noqa: E731
    names = [f"runs/some-longer-name-{k}/policy" for k in range(10)]
    cost = {"all": 9e6, "per_episode": 12345.6, "per_solved": 23456.7}
    costs = {"agent_read": cost, "human_read": cost}
    repeated = [{"k": k, "tasks": 5, "pass^k": 0.4, "pass^k_95": [0.3, 0.5], "pass@k": 0.6,
                 "pass@k_95": [0.5, 0.7]} for k in (1, 2)]
    metrics = {name: {
        "episodes": 500, "fixed": share(0.5), "official": share(0.4 if k else 0.5),
        "clean_tasks": {"episodes": 500} | share(0.5), "tokens": costs, "repetitions": repeated,
        "endings": {"right": 250, "too early": 200, "<i>": 50}} for k, name in enumerate(names)}
    write_lines(tmp_path / "episodes.jsonl", [episode("a", "base", 2)])
    report = Watched(browser, write_report(tmp_path / "report.html", [tmp_path], metrics),
                     viewport={"width": 1400, "height": 900})
    page = report.page
    assert page.evaluate("[...document.querySelectorAll('.scroll')]"
                         ".every(s => s.scrollWidth <= s.clientWidth)")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    first = page.locator(".bars figure").first
    bars = [" ".join(text.split()) for text in first.locator(".bar").all_inner_texts()]
    one = names[1]
    assert bars[:3] == [f"{names[0]} 50.0 %", f"{one} · fixed, clean tasks 50.0 %",
                        f"{one} · official 40.0 %"]
    assert len(bars) == 19
    table = rows_of(page)
    assert [*table][:3] == ["success · fixed, clean tasks", "success · official", "episodes"]
    assert table["pass^2"][0].split("\n") == ["40.0 %", "30.0 % .. 50.0 %"]
    assert "pass^1" not in table
    assert table["agent: read"][9].split("\n") == ["12,346", "23,457 per solved task"]
    endings = page.locator(".endings .bar").first.inner_text().split("\n")
    assert endings[-3:] == ["right 250", "too early 200", "<i> 50"]
    report.close()


@needs_browser
def test_turn_by_turn_and_one_state(browser, tmp_path):
    """Success and questions by hand; of the ranked states, the clearest is drawn, next to c."""
    # two of four right after one question, one of two after two questions
    rows = [episode(f"t{i}", "base", 2 * (i in (0, 1, 5)), ["What is added?"] * n)
            for i, n in enumerate((1, 1, 1, 1, 2, 2))]
    texts = [f"What is {word}?" for word in "a b c d e f g h".split()]
    for i, spread in ((4, 0.1), (5, 1.0)):
        rows[i]["dialogue_history"][3] |= {"candidates": texts,
                                           "advantages": [spread * (3 - k) for k in range(8)]}
    credit = [{"policy": "base", "id": f"t{i}", "sample": 0, "turns": [
        {"advantage": value, "ratios": []} for value in (0.5 * i, -0.25)]} for i in (0, 1)]
    write_lines(tmp_path / "episodes.jsonl", rows)
    write_lines(tmp_path / "advantages.jsonl", credit)
    report = Watched(browser, write_report(tmp_path / "report.html", [tmp_path]))
    data = json.loads(report.page.locator("#data").inner_text())
    assert [(one["title"].split()[0], one["series"]) for one in data["turns"]] == [
        ("Success", [{"label": "base", "steps": [2, 3], "values": [0.5, 0.5], "counts": [4, 2]}]),
        ("Share",
         [{"label": "base", "steps": [1, 2], "values": [0.6667, 0.3333], "counts": [4, 2]}]),
        ("Mean", [{"label": "base", "steps": [1, 2], "values": [0.25, -0.25], "counts": [2, 2]}])]
    panels = report.page.locator("#turns figure")
    assert panels.count() == 3 and panels.first.locator("circle").count() == 2
    state = report.page.locator("#state")
    assert state.locator(".turn").count() == 3 and "y = x + 1  # one more" in state.inner_text()
    ranked = [text.split("\n")[0] for text in state.locator(".candidate").all_inner_texts()]
    assert ranked == ["+3.00", "+2.00", "+1.00", "+0.00", "−1.00", "−2.00", "−3.00", "−4.00"]
    state.get_by_text("the whole dialogue").click()
    assert "t5" in report.page.locator("#detail .head").inner_text()
    report.close()


@needs_browser
def test_replies_that_contradict_are_marked(browser, tmp_path):
    mini = load_tasks("mini:test", 1)[0] | {"ground_truth": code("bill", {"customs": 5})}
    odd = episode("m", "base", 1, ["What is the customs?"], task=mini)
    odd["dialogue_history"][2]["content"] = "The customs is 6."
    write_lines(tmp_path / "episodes.jsonl", [odd, episode("n", "base", 2)])
    report = Watched(browser, write_report(tmp_path / "report.html", [tmp_path]))
    report.page.click("#kind-wrong")
    assert report.items() == 1
    assert report.page.get_by_text("contradicts the hidden information").count() == 1
    assert "misled by the human" in report.page.locator("#detail .head").inner_text()
    assert rows_of(report.page)["contradict the hidden information"][0].startswith("50.0 %")
    report.close()


@needs_browser
def test_dialogue_answer_and_tests(browser, run):
    report = Watched(browser, write_report(run / "report.html", [run]))
    page = report.page
    report.search("task-0", 2)
    page.locator("#list .item").nth(1).click()
    turns = [turn.split("\n") for turn in page.locator("#detail .turn").all_inner_texts()]
    assert [turn[0] for turn in turns] == ["human", "agent 1", "human", "agent 2"]
    assert "What is added?" in turns[1]
    pairs = page.locator("#detail .pair:not(.title)")
    differ = ["differs" in row.get_attribute("class") for row in pairs.all()]
    assert differ == [False, True, False]  # x + 1 and x + 2
    assert pairs.nth(1).locator("mark").all_inner_texts() == ["1  # one more", "2"]
    calls = [row.split("\t") for row in page.locator("#detail .calls tbody tr").all_inner_texts()]
    assert calls == [["f(1)", "2", "2", "✓ passed"], ["f('<b>')", "'<i>'", "", "✓ passed"]]
    report.close()


@needs_browser
def test_comments_do_not_count_as_differences(browser, tmp_path):
    answer = "```python\ndef f(x):\n    y = x + 1\n    return y\n```"
    write_lines(tmp_path / "episodes.jsonl", [episode("a", "base", 2, answer=answer)])
    report = Watched(browser, write_report(tmp_path / "report.html", [tmp_path]))
    assert report.page.locator("#detail .pair.same").count() == 3
    assert report.page.locator("#detail .pair.differs").count() == 0
    report.close()


@needs_browser
@pytest.mark.parametrize("long", [False, True])
def test_hostile_texts_do_nothing(browser, tmp_path, long):
    text = HOSTILE + "a<b>" * 250_000 * long
    odd = episode("h<i>", f"</script>{HOSTILE}", 1, [text],
                  answer=text, outcome="answered", system=text)
    odd["task"] |= {"problem_description": text, "ground_truth": text, "screenshot": "x"}
    odd["task"]["test_cases"] = {HOSTILE: text}
    odd["dialogue_history"][1] |= {"candidates": [text, HOSTILE], "advantages": [0.5, float("nan")],
                                   "output": "think " + text + "OUTPUT:" + text,
                                   "screenshot": "http://example.com/leak.png"}
    odd["scores"]["fixed"] |= {"expected": [HOSTILE], "got": [HOSTILE]}
    odd["scores"]["reference_screenshot"] = "javascript:alert(1).png"
    write_lines(tmp_path / "episodes.jsonl",
                [odd, odd | {"sample": 1, "outcome": "error: " + text, "error": text}])
    write_lines(tmp_path / "critic_log.jsonl", [{"step": 0, "loss": float("nan"), "margin": 1.0}])
    metrics = {f"</script>{HOSTILE}": {"episodes": 1, HOSTILE: 1.5, "success": float("nan")}}
    path = write_report(tmp_path / "report.html", [tmp_path], metrics)
    assert path.stat().st_size < 2e6  # a long text is cut
    report = Watched(browser, path)
    for button in report.page.locator("#detail .link").all():
        button.click()
    shown = report.page.locator("#detail .turn").nth(1).inner_text()
    assert "<script>window.pwned = 1</script>" in shown and "</textarea>" in shown
    assert "\\u202eevil\\u202c \\ud800 \\u0000" in shown
    assert ("more characters" in shown) == long
    assert report.page.locator("#detail img, #detail script, #detail svg").count() == 0
    report.page.click("#kind-error")
    report.search("evil", 1)
    report.close()


@needs_browser
def test_pictures_are_shown_only_from_the_run_folder(browser, tmp_path):
    shots = tmp_path / "run" / "shots"
    shots.mkdir(parents=True)
    pixel = bytes.fromhex("89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c489"
                          "0000000d49444154789c63606060f80f00010401005fe5c34b"
                          "0000000049454e44ae426082")
    for name in ("a 1.png", "r.png"):
        (shots / name).write_bytes(pixel)
    odd = episode("p", "base", 1)
    odd["dialogue_history"][1]["screenshot"] = "shots/r.png"
    odd["scores"] = {"similarity": 0.125, "measure": "pixel similarity", "renderer": "x",
                     "screenshot": "shots/a 1.png", "reference_screenshot": "shots/r.png"}
    write_lines(tmp_path / "run" / "episodes.jsonl", [odd])
    (tmp_path / "run" / "episodes_args.json").write_text('{"env": "frontend"}')
    report = Watched(browser,
                     write_report(tmp_path / "elsewhere" / "report.html", [tmp_path / "run"]))
    report.page.wait_for_function(
        "document.images.length === 4"
        " && [...document.images].every(i => i.complete && i.naturalWidth === 1)")
    captions = report.page.locator(".pictures figcaption").all_inner_texts()
    assert captions == ["this turn", "hidden page"] * 2
    assert "pixel similarity 0.125" in report.page.locator("#detail").inner_text()
    report.close(requests=3)  # the file and the two pictures
    assert address("shots/r 1.png", ".") == "shots/r%201.png"
    assert address("shots/r.png", "../run") == "../run/shots/r.png"
    for bad in ("/etc/x.png", "../x.png", "a/../../x.png", "http://a/x.png", "//a/x.png",
                "data:x.png", "a\\b.png", "x.svg", "x.png?y", ""):
        assert address(bad, ".") is None, bad


@needs_browser
def test_curves_at_any_time_and_of_several_runs(browser, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    logs(one, 1.0, 700), logs(two, 2.0, 3)
    with open(one / "critic_log.jsonl", "a") as file:
        file.write('{"step": 700, "lo')  # the line that is being written
    before = (one / "critic_log.jsonl").read_bytes()
    assert str(one / "report.html") in run_script("-m", "colbench.look.report", one, two).stdout
    assert (one / "critic_log.jsonl").read_bytes() == before
    report = Watched(browser, one / "report.html")
    titles = report.page.locator(".curves figcaption").all_inner_texts()
    assert titles[:3] == ["Loss", "Pair accuracy", "Margin"] and "chosen" in titles[3]
    assert report.page.locator(".legend span").all_inner_texts() == [str(one), str(two)]
    margin = report.page.locator(".curves figure").nth(2)
    assert margin.locator("path").count() == 4  # raw and mean, of two runs
    # by hand: the running mean at the last step, over the 35 steps before it
    last = [sum(range(max(0, i - 35), 700)) / (700 - max(0, i - 35)) for i in (699,)]
    assert f"{one} {last[0]:.3g}"[:-1] in margin.locator(".readout").inner_text()
    assert "700 steps logged, 1,234 tokens/s" in report.page.locator("#curves").inner_text()
    report.close()


@needs_browser
def test_training_run_shows_ranked_candidates(browser, tmp_path):
    trajectory = episode("a", "x", 2)
    del trajectory["policy"]
    texts = ["What is added?", "Who are you?", "Why?"]
    trajectory["dialogue_history"][1]["candidates"] = texts
    state = {"id": "a", "sample": 0, "turn": 1,
             "messages": [{"role": "system", "content": "Ask."}, trajectory["dialogue_history"][0]],
             "candidates": texts, "advantages": [0.25, -1.5, 0.75]}
    write_lines(tmp_path / "preferences.jsonl", [state])
    for has_trajectory in (False, True):
        if has_trajectory:
            write_lines(tmp_path / "trajectories.jsonl", [trajectory])
        report = Watched(browser, write_report(tmp_path / "report.html", [tmp_path]))
        report.page.get_by_text("3 candidates").click()
        ranked = [row.split("\n")
                  for row in report.page.locator("#detail .candidate").all_inner_texts()]
        assert [row[0] for row in ranked] == ["+0.75", "+0.25", "−1.50"]
        texts_shown = [row[1].split("  ")[0] for row in ranked]
        assert texts_shown == ["Why?", "What is added?", "Who are you?"]
        if has_trajectory:
            assert ["← played" in row[1] for row in ranked] == [False, True, False]
            badge = report.page.locator("#detail .side .score")
            assert badge.all_inner_texts() == ["+0.25"]
        report.close()


@needs_browser
def test_thousand_episodes_are_small_and_drawn_lazily(browser, tmp_path):
    """1,000 episodes: ten turns of 400 characters, hidden code of 1.5 kB, credit per token."""
    words, rows, credit = "which discount holds for orders above the limit ", [], []
    for i in range(1000):
        row = episode(f"t{i // 2}", ("base", "policy")[i % 2], i % 3, [f"{i} " + words * 8] * 9,
                      answer="x = 1\n" * 150)
        row["task"]["ground_truth"] = "y = 2  # why\n" * 110
        row["dialogue_history"][1]["input"] = "prompt " * 2000
        rows.append(row)
        credit.append({"policy": row["policy"], "id": row["id"], "sample": 0, "turns": [
            {"advantage": 0.1, "ratios": [(k * 4, -0.123) for k in range(1, 100)]}
            for _ in range(10)]})
    write_lines(tmp_path / "episodes.jsonl", rows)
    write_lines(tmp_path / "advantages.jsonl", credit)
    path = write_report(tmp_path / "report.html", [tmp_path], {})
    assert path.stat().st_size < 20e6
    report = Watched(browser, path)
    times = []
    for _ in range(3):  # the machine may be busy
        report.page.reload()
        times.append(report.page.evaluate(
            "performance.getEntriesByType('navigation')[0].loadEventEnd"))
    assert min(times) < 2000, times  # ms until all scripts have run
    assert report.items() < 100 and report.page.locator("#detail .turn").count() == 20
    assert report.page.locator("#kind-all span").inner_text() == "1000"
    report.search("t499 998", 1)
    report.close(requests=4)


def test_episodes_that_do_not_fit_are_counted(tmp_path):
    write_lines(tmp_path / "episodes.jsonl",
                [episode(f"t{i}", "base", 1, [f"{i}" + "é" * 19_000] * 9) for i in range(40)])
    path = write_report(tmp_path / "report.html", [tmp_path], {})
    assert path.stat().st_size < 20e6 and "of 40 episodes are left out" in path.read_text()


def test_same_run_same_file(run):
    logs(run)
    one, other = (write_report(run / name, [run]) for name in ("a.html", "b.html"))
    assert one.read_bytes() == other.read_bytes()


def test_nothing_to_report(tmp_path):
    with pytest.raises(UserError, match="nothing to report"):
        write_report(tmp_path / "report.html", [tmp_path])
    (tmp_path / "episodes.jsonl").write_text('{"id"\n{}\n')
    assert f"{tmp_path}/episodes.jsonl:1" in refused("-m", "colbench.look.report", tmp_path)


# ---- credit


@pytest.fixture(scope="module")
def critic(tmp_path_factory):
    """An adapter that changes the tiny model: random instead of zero."""
    torch.manual_seed(0)
    model = add_lora(load_model("tiny"), 4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    path = tmp_path_factory.mktemp("critic")
    model.save_pretrained(path)
    return path


def test_credit_against_one_message_at_a_time(critic, tmp_path):
    """add_credit packs dialogues and candidates into few passes; here each message is one pass."""
    tokenizer = load_tokenizer("tiny")
    texts = ["What is the toll?", "Is there a fee <|eot_id|>?"]
    rows = [episode(f"c{i}", "base", 1, texts[:i]) for i in range(3)]
    rows[2]["dialogue_history"][3]["candidates"] = [
        "What is the fee?", "Is it three?", "What is the fee?"]
    path = tmp_path / "advantages.jsonl"
    add_credit(path, rows[:1], critic, "tiny", False, tokenizer)
    add_credit(path, rows, critic, "tiny", False, tokenizer, load_model("tiny"))  # resumes
    got = {row["id"]: row["turns"] for row in map(json.loads, open(path))}
    assert [*got] == ["c0", "c1", "c2"]
    model, base = load_model("tiny", adapter=str(critic)), load_model("tiny")

    def ratios(row, place, text):
        system = {"role": "system",
                  "content": row["system"] + HIDDEN_INFO + row["task"]["ground_truth"]}
        history = prompt_messages("", row["dialogue_history"][:place])[1:]
        prompt = encode_dialogue(tokenizer, [system, *history])[0]
        ids = message_ids(tokenizer, text, end_of_turn(tokenizer))
        with torch.no_grad():
            tokens = torch.tensor([prompt + ids])
            logps = [m(tokens).logits[0].log_softmax(-1) for m in (model, base)]
        at = torch.arange(len(prompt) - 1, len(prompt) + len(ids) - 1)
        return (logps[0][at, ids] - logps[1][at, ids])
    for row in rows:
        places = [i for i, m in enumerate(row["dialogue_history"]) if m["role"] == "assistant"]
        for place, turn in zip(places, got[row["id"]]):
            message = row["dialogue_history"][place]
            expected = ratios(row, place, message["content"])
            assert turn["advantage"] == pytest.approx(expected.mean().item(), rel=0.02, abs=1e-3)
            got_ratios = [ratio for _, ratio in turn["ratios"]]
            assert got_ratios == pytest.approx(expected.tolist(), rel=0.02, abs=2e-3)
            assert abs(turn["advantage"]) > 1e-3
            for text, value in turn.get("candidates", []):
                expected_mean = ratios(row, place, text).mean().item()
                assert value == pytest.approx(expected_mean, rel=0.02, abs=1e-3)
    assert [text for text, _ in got["c2"][1]["candidates"]] == ["What is the fee?", "Is it three?"]


def test_credit_follows_the_flags_of_the_critic(critic, tmp_path):
    """As a sum: L times the mean. Without c: another number. With --official only π_ref lacks c."""
    rows = [episode("c", "base", 1, ["What is the toll?"])]
    tokenizer = load_tokenizer("tiny")
    got = {}
    for name, flags in (("plain", {}), ("sum", {"no_length_norm": True}),
                        ("blind", {"no_hidden_info": True}), ("official", {"official": True})):
        shutil.copytree(critic, tmp_path / name)
        (tmp_path / name / "training_args.json").write_text(json.dumps(flags))
        got[name] = add_credit(None, rows, tmp_path / name, "tiny", False, tokenizer)[0]["turns"][0]
    length = len(got["plain"]["ratios"])
    assert got["sum"]["advantage"] == pytest.approx(length * got["plain"]["advantage"], rel=0.02)
    assert abs(got["blind"]["advantage"] - got["plain"]["advantage"]) > 1e-3
    other = [episode("c", "base", 1, ["What is the toll?"],
                     task=task("c", "def f(x):\n    return 0"))]
    blind = add_credit(None, other, tmp_path / "blind", "tiny", False, tokenizer)
    assert blind[0]["turns"][0] == got["blind"]
    system, user = prompt_messages(rows[0]["system"], rows[0]["dialogue_history"][:1])
    hidden = {"role": "system",
              "content": system["content"] + HIDDEN_INFO + rows[0]["task"]["ground_truth"]}
    ids = message_ids(tokenizer, "What is the toll?", end_of_turn(tokenizer))
    with torch.no_grad():
        theta, ref = (
            message_logps(model, [Tree(encode_dialogue(tokenizer, messages)[0], [], [ids])])[0][0]
            for model, messages in ((load_model("tiny", adapter=str(critic)), [hidden, user]),
                                    (load_model("tiny"), [system, user])))
    assert got["official"]["advantage"] == pytest.approx((theta - ref).mean().item(), rel=0.02)
    assert abs(got["official"]["advantage"] - got["plain"]["advantage"]) > 1e-3


@pytest.mark.parametrize("text", [
    "What is the toll?", "naïve 🙂👩‍💻 日本", "<|eot_id|> x", "a", "  "])
def test_tokens_cover_the_message(text):
    tokenizer, text = load_tokenizer("tiny"), text.strip()
    ends = token_ends(tokenizer, text)
    assert ends == sorted(ends) and ends[-1] == len(text)
    assert len(ends) == len(message_ids(tokenizer, text, 0))


@needs_browser
def test_tokens_are_shaded_on_demand(browser, tmp_path):
    write_lines(tmp_path / "episodes.jsonl", [episode("s", "base", 1, ["🙂 no"])])
    turns = [{"advantage": -0.5, "ratios": [(1, 0.25), (4, -1.25), (4, 0.0)]},
             {"advantage": 2.0, "ratios": []}]
    credit = {"policy": "base", "id": "s", "sample": 0, "turns": turns}
    write_lines(tmp_path / "advantages.jsonl", [credit])
    report = Watched(browser, write_report(tmp_path / "report.html", [tmp_path], {}))
    assert report.page.locator("#detail .side .score").all_inner_texts() == ["−0.50", "+2.00"]
    assert report.page.locator("#detail .bubble span[title]").count() == 0
    report.page.get_by_text("shade tokens").first.click()
    tokens = report.page.locator("#detail .bubble span[title]")
    assert tokens.all_inner_texts() == ["🙂", " no", "⏎"]
    assert tokens.nth(1).get_attribute("title") == "−1.25"
    report.page.get_by_text("plain text").first.click()
    assert tokens.count() == 0
    report.close()


# ---- talk

def check_talk(output, directory, number=2):
    mini = load_tasks("mini:test", number)[-1]
    assert mini["problem_description"] in " ".join(output.split())
    assert mini["ground_truth"].splitlines()[2].strip() in output
    row = json.loads((directory / "talk.jsonl").read_text().splitlines()[-1])
    assert row["id"] == mini["id"]
    assert any(m["content"] == "Four, I think." for m in row["dialogue_history"])
    with Scorer(workers=1) as scorer:
        fixed = scorer.score(mini, row["answer"])["fixed"]
    assert row["reward"] == fixed["passed"] / 10 and f"score {fixed['passed']}/10 " in output


def test_talk_through_a_pipe(critic, tmp_path):
    """A run with a critic shows the advantages too."""
    shutil.copytree(critic, tmp_path / "critic")
    command = ["-m", "colbench.look.talk", tmp_path, "--task", 2, "--policy", "base"]
    printed = run_script(*command, text="\n" + "Four, I think.\n" * 9).stdout
    check_talk(printed, tmp_path)
    shown = printed.partition("advantage of each message")[2].splitlines()[1:-2]
    row = json.loads((tmp_path / "talk.jsonl").read_text())
    [credit] = add_credit(None, [row], critic, "tiny", False, load_tokenizer("tiny"))
    advantages = [float(line.split()[0]) for line in shown]
    assert advantages == [round(turn["advantage"], 2) for turn in credit["turns"]]
    assert "error: the input ended" in refused(*command)
    assert len((tmp_path / "talk.jsonl").read_text().splitlines()) == 1
    assert "tasks are counted from 1" in refused(*command[:-3], 0)


def test_talk_in_a_terminal(tmp_path):
    mine, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "colbench.look.talk", tmp_path],
                               cwd=ROOT, stdin=theirs,
                               stdout=theirs, stderr=theirs)
    os.close(theirs)
    output, answered, deadline = "", 0, time.time() + 300
    while time.time() < deadline:
        if select.select([mine], [], [], 1)[0]:
            try:
                data = os.read(mine, 65536)
            except OSError:  # the other end is closed
                break
            output += data.decode(errors="replace")
        if output.count("you> ") > answered:
            answered += 1
            os.write(mine, b"Four, I think.\n")
    assert process.wait(30) == 0, output
    check_talk(output.replace("\r\n", "\n"), tmp_path, 1)
