"""The scripted human tells the truth, one thing at a time; no human gives the hidden code away."""
import ast
import random
import re
import time

import pytest

from colbench.env.backend.human import HUMAN_PROMPT, ScriptedHuman, answer, details, make_human
from colbench.env.backend.mini import mini_tasks
from colbench.env.humans import ModelHuman, chat_human, cut_leak, leaks
from colbench.lm.server import ServerChat
from colbench.run.errors import UserError
from test_server import Server, completion, last

QUOTE = """\
def quote(n, d):
    total = 0
    total += 6 * n  # insurance
    total -= 35 * (d > 7)  # rebate
    return total
"""

SHIPPING = '''\
BASE_FEE = 4.5
MODE = "express"
_cache = {}


def shippingCost(weights, freeAbove=250, *, currency="EUR", strict=None):
    """Adds up what the parcels cost."""
    # Parcels under two kilos travel as letters,
    # which need no customs form.
    parcels = [w for w in weights if w >= 2]
    surcharge = -1.5 * len(parcels)  # the island surcharge
    # total = sum(parcels)
    total = 0
    for i in range(len(parcels)):
        total += parcels[i] * 3 - 7  # price per kilo
        total = round(total, 2)  # rounding happens after every single parcel and never at the end
    if total > freeAbove:
        return "Nothing to pay"
    return {"sum": total + surcharge + BASE_FEE, "currency": currency, "mode": MODE}
'''


def ask(hidden_code, message):
    history = [{"role": "user", "content": "Please help."},
               {"role": "assistant", "content": message}]
    return ScriptedHuman().reply([{"ground_truth": hidden_code}], [history], [0])[0]


# ---- the scripted human


@pytest.mark.parametrize("question, reply", [
    ("What is the insurance?", "The insurance is 6."),
    ("rebates?", "The rebate is 35."),
    ("Sure, I can help! Could you tell me about the INSURANCE, please?", "The insurance is 6."),
    ("Tell me the insurance.", "The insurance is 6."),
    ("What is the toll?", "I don't know."),
    ("What is the total?", "I don't know."),
    ("What are n and d?", "I don't know."),
    ("What does quote do?", "I don't know."),
    ("How do you compute the price?", "I don't know."),
    ("", "I don't know."),
    ("???", "I don't know."),
    ("What is the rebate and the insurance?", "The rebate is 35."),
    ("Insurance? Rebate?", "The insurance is 6."),
    # in a long list only the first thing is heard
    ("What are the toll, customs, fuel, insurance and rebate?", "I don't know."),
    ("What is the toll?\nWhat is the customs?\nWhat is the insurance?", "I don't know."),
    ("What are the insurance, toll, customs and rebate?", "The insurance is 6."),
])
def test_one_question_one_answer(question, reply):
    assert ask(QUOTE, question) == reply


@pytest.mark.parametrize("question, reply", [
    ("What is the base fee?", "The base fee is 4.5."),
    ("Which mode?", "The mode is express."),
    ("Is there a limit above which it is free?", "The free above is 250."),
    ("In which currency?", "The currency is EUR."),
    ("How much is the surcharge on islands?", "The island surcharge is -1.5."),
    ("What is the price per kilo?", "The price per kilo is 3."),
    ("What happens with parcels under two kilos?",
     "Parcels under two kilos travel as letters, which need no customs form."),
    ("When does the rounding happen, after every parcel or at the end?",
     "Rounding happens after every single parcel and never at the end."),
    ("How many parcels?", "I don't know."),
    ("Should it be strict?", "I don't know."),
    ("How large is the cache?", "I don't know."),
])
def test_comments_constants_and_defaults_are_details(question, reply):
    assert ask(SHIPPING, question) == reply


def test_weak_words_alone_match_no_other_detail():
    code = "def f(n):\n    n += 3  # insurance cost\n    n += 4  # total\n    return n\n"
    assert ask(code, "What is the insurance cost?") == "The insurance cost is 3."
    assert ask(code, "And the insurance?") == "The insurance cost is 3."
    assert ask(code, "What is the storage cost?") == "I don't know."
    assert ask(code, "The total?") == "The total is 4."


def test_everything_it_says_is_true_on_random_code():
    """Random words and numbers. The generator knows the truth, not the code under test."""
    rng = random.Random(3)
    words = [a + b for a in "bar cor dil fen gom hul jat lem".split()
             for b in "tow ker mund pel vin".split()]
    for trial in range(200):
        names = rng.sample(words, rng.randint(3, 9))
        facts, lines, top = {}, [], []
        for name in names[:-1]:
            number = rng.choice([rng.randint(2, 999), round(rng.uniform(0, 5), 2)])
            facts[name] = number
            kind = rng.randrange(3)
            if kind == 0:
                sign = rng.choice(["+=", "-=", "=", "*="])
                lines.append(f"    x {sign} {number} * n + {rng.randint(1, 9)}  # {name}")
            elif kind == 1:
                top.append(f"{name.upper()}_LIMIT = {number}")
            else:
                lines += [f"    # The {name} must stay under {number}.",
                          f"    x = min(x, {number})"]
        default = facts[names[-1]] = rng.randint(2, 99)
        head = f"def work(n, {names[-1]}={default}):"
        code = "\n".join([*top, head, "    x = 0", *lines, "    return x"])
        ast.parse(code)
        for word in words:
            reply = ask(code, f"What is the {rng.choice([word, word + 's', word.upper()])}?")
            if word in facts:
                numbers = re.findall(r"[\d.]*\d", reply)
                assert word in reply and numbers == [str(facts[word])], (code, word, reply)
            else:
                assert reply == "I don't know.", (code, word, reply)


def test_truth_on_the_mini_benchmark():
    tasks = mini_tasks("test", 100)
    lines = [re.findall(r"[+-]= (\d+).*# (\w+)", task["ground_truth"]) for task in tasks]
    numbers = [{name: number for number, name in found} for found in lines]
    names = sorted({name for task in numbers for name in task})
    assert len(names) == 20 and all(2 <= len(task) <= 4 for task in numbers)
    human = ScriptedHuman()
    for name in names:
        histories = [[{"role": "user", "content": task["problem_description"]},
                      {"role": "assistant", "content": f"What is the {name}?"}] for task in tasks]
        truth = [f"The {name} is {known[name]}." if name in known else "I don't know."
                 for known in numbers]
        assert human.reply(tasks, histories, range(100)) == truth
    assert human.replies == 2000
    assert human.leaks == 0


def test_it_says_no_code_and_survives_any_hidden_code():
    for comment in ("result = everything + offset", "compute_everything of a", "print_all(a, 2)",
                    "def g: pass", "return everything + offset * 2 - a"):
        kept = comment == "compute_everything of a"
        code = (f"def f(a, everything, offset):\n    # {comment}\n"
                "    return everything + offset * 2 - a\n")
        assert len(details(code)) == kept, comment
    odd = ["", "def f(:", "<html><body>page</body></html>", "x = 'unclosed",
           "def f():\n\treturn 1\n        return 2", "# only"]
    for hidden_code in odd:
        assert isinstance(ask(hidden_code, "What is the page?"), str)
    assert answer("def f(n):\n    return n  # ::\n", "What is n?") == "I don't know."


# ---- leaks


@pytest.mark.parametrize("reply", [
    "Sure: def shippingCost(weights): ...", "It is def  shippingCost (w)",
    "surcharge = -1.5 * len(parcels)",
    "You need `surcharge=-1.5*len(parcels)` there.",
    "Loop with\n  for i in range(len(parcels)):\n    total += parcels[i]",
    'return {"sum": total + surcharge + BASE_FEE, "currency": currency',
    "parcels = [w for w in weights if w >= 2] first",
    SHIPPING, "\n".join(line.strip() for line in SHIPPING.splitlines()[9:13]),
])
def test_code_is_a_leak(reply):
    assert leaks(reply, SHIPPING)
    rest = cut_leak(reply, SHIPPING)
    assert reply.startswith(rest) and not leaks(rest, SHIPPING)
    assert not rest.endswith(("`", ":", "`python"))


@pytest.mark.parametrize("reply", [
    "The base fee is 4.5.",
    'It returns "Nothing to pay" then.',
    "Parcels under two kilos travel as letters, which need no customs form.",
    "Adds up what the parcels cost.", "The island surcharge is -1.5 per parcel.", "currency",
    "It should return total.", "BASE_FEE = 4.5", "weights, freeAbove and currency",
    "rounding happens after every single parcel and never at the end",
    "Take every weight of at least 2, times 3, minus 7, and add the base fee.",
    "I don't know.", "", "def helper(x)", "It gives a dict with the keys sum, currency and mode.",
    "{'a': 1}", "for every parcel in the list, add its price",
])
def test_an_answer_is_not_a_leak(reply):
    assert not leaks(reply, SHIPPING)
    assert cut_leak(reply, SHIPPING) == reply


def test_a_quoted_string_is_not_a_leak_but_the_code_around_it_is():
    text = "Refurbished desktop from a reputable supplier on eBay, with a warranty of two years"
    code = ("def pick(budget):\n    if budget <= 600 and budget > 10:\n"
            f"        return '{text}'\n    return 0\n")
    for reply in (text, f"'{text}'", f"return '{text}'", f'Then say "{text}".'):
        assert not leaks(reply, code)
    assert leaks(f"if budget <= 600 and budget > 10: return '{text}'", code)


def test_lists_of_texts_and_constants_are_not_leaks():
    entry = "'summer': ['summer_dress', 't-shirt', 'shorts'],"
    code = "discount_rate_percent = 12.5\nwear = {\n    " + entry + "\n}\n"
    for reply in (entry, "discount_rate_percent = 12.5"):
        assert not leaks(reply, code)


def test_every_long_piece_of_code_is_found():
    """60 characters of code are a leak with any whitespace; their words alone are not."""
    lines = SHIPPING.splitlines()
    code = "\n".join(line for line in lines if "#" not in line and '"' not in line)
    rng = random.Random(1)
    for start in range(0, len(code) - 60):
        piece = code[start:start + 60]
        piece = re.sub(r"\s+", lambda blank: rng.choice([" ", "\n", "  "]), piece)
        if len(re.sub(r"\s", "", piece)) >= 32:
            assert leaks(f"Well, {piece} it is.", code), piece
            assert not leaks(" or ".join(re.findall(r"\w+", piece)), code)


def test_hostile_replies_do_not_slow_the_leak_search():
    start = time.perf_counter()
    hostile = ("`" * 400 + "x", "(" * 400, "def " * 100, " " * 400, "def shippingCost(" + "`" * 400)
    for reply in hostile:
        cut_leak(reply, SHIPPING)
    for message in ("a" * 100_000, "? " * 20_000, "insurance, " * 20_000):
        ask(SHIPPING, message)
    assert time.perf_counter() - start < 60  # a backtracking pattern would take hours


# ---- a model plays the human

TASK = {"id": "t", "ground_truth": SHIPPING,
        "problem_description": "Please ship. The signature is: def shippingCost(weights)"}


def history(text):
    return [{"role": "user", "content": TASK["problem_description"]},
            {"role": "assistant", "content": "Which currency?"},
            {"role": "user", "content": "EUR."},
            {"role": "assistant", "content": text}]


@pytest.fixture
def simulator():
    """A server that replies by the agent's message and the temperature: (first, second draft)."""
    code = "```python\n" + SHIPPING + "```"
    drafts = {
        "plain": ("  Human: Free above 250.\n", None),
        "long": ("word " * 200, None),
        "once": (f"Here: {code}", "It is 3 per kilo."),
        "twice": (f"First. {code}", f"The second time. {code}"),
        "only": (code, code),
        "mute": ("", ""),
        "then down": (f"Before it. {code}", 500),
        "down": (500, 500),
        "then blank": (f"Before it. {code}", "  "),
        "blank": (" ", "\n"),
        "thinks": (f"<think>{code}</think>\nHuman: It is 3.\n\nAgent: Thanks.", None),
        "thinks of code": (f"<think>first</think>{code}", "<think>second</think>It is 3."),
    }

    def behave(body, earlier):
        kind = re.findall(r"Agent: (.*)\n", last(body))[-1]
        if kind.startswith("thinks long"):
            ends = body["max_tokens"] > 1000 and kind == "thinks long"
            return "<think>hm</think>It is 3." if ends else "<think>hm"
        text = drafts[kind][0 if body["temperature"] == 0 else 1]
        if text == 500:
            return 500, {}, {"error": {"message": "dead"}}
        return 200, {}, completion(text)

    server = Server(behave)
    yield server
    server.close()


def test_leaks_are_resampled_once_then_cut(simulator):
    human = ModelHuman(ServerChat(simulator.url, "first", max_retries=0), HUMAN_PROMPT)
    kinds = ["plain", "long", "once", "twice", "only", "then down", "then blank", "blank", "down",
             "mute"]
    drawn = human.reply([TASK] * len(kinds), [history(kind) for kind in kinds], range(len(kinds)))
    replies = dict(zip(kinds, drawn))
    assert replies["plain"] == "Free above 250."
    assert replies["long"] == ("word " * 200)[:400].strip()
    assert replies["once"] == "It is 3 per kilo."
    assert replies["twice"] == "The second time."
    assert replies["only"] == replies["blank"] == "I don't know."
    assert replies["then down"] == replies["then blank"] == "Before it."
    assert isinstance(replies["down"], Exception) and isinstance(replies["mute"], Exception)
    assert (human.replies, human.leaks, human.cuts) == (8, 5, 4)
    second = [body for body in simulator.requests if body["temperature"] == 1]
    assert len(second) == 6
    assert not {body["seed"] for body in second} & set(range(len(kinds)))
    human.reply([TASK], [history("plain")], [0])
    assert (human.replies, human.leaks, human.cuts) == (9, 5, 4)


def test_thoughts_are_neither_reply_nor_leak(simulator):
    human = ModelHuman(ServerChat(simulator.url, "first", max_retries=0), HUMAN_PROMPT)
    kinds = ["thinks", "plain", "thinks of code", "thinks long", "down", "thinks longer"]
    replies = human.reply([TASK] * len(kinds), [history(kind) for kind in kinds], range(len(kinds)))
    assert replies[:4] == ["It is 3.", "Free above 250.", "It is 3.", "It is 3."]
    assert "only thoughts" in str(replies[5]) and isinstance(replies[4], Exception)
    assert human.thoughts == [f"```python\n{SHIPPING}```", "", "second", "hm", "", ""]
    assert human.leaked == [False, False, True, False, False, False]
    assert (human.replies, human.leaks) == (4, 1)


def test_the_human_sees_everything_and_gives_no_code_away(simulator):
    human = ModelHuman(ServerChat(simulator.url, "first"), HUMAN_PROMPT)
    histories = [history(kind) for kind in ("once", "twice", "only")]
    replies = human.reply([TASK] * 3, histories, [1, 2, 3])
    for body in simulator.requests:
        prompt = last(body)
        assert SHIPPING in prompt and TASK["problem_description"] in prompt
        question, reply = prompt.index("Agent: Which currency?"), prompt.index("Human: EUR.")
        assert question < reply < prompt.rindex("Agent: ")
        assert body["max_tokens"] <= 400
    for reply in replies:
        for line in SHIPPING.splitlines():
            assert not (len(line.strip()) >= 20 and line.strip() in reply)
        assert "def " not in reply and "=" not in reply


def test_a_custom_prompt_with_braces_in_the_values(simulator):
    prompt = "{hidden_information}|{problem_description}|{dialogue_history}\n\n"
    human = ModelHuman(ServerChat(simulator.url, "first"), prompt, max_characters=6)
    assert human.reply([TASK], [history("plain")], [0]) == ["Free a"]
    assert last(simulator.requests[-1]).startswith(SHIPPING + "|")


def test_make_human(simulator):
    assert isinstance(make_human("scripted"), ScriptedHuman)
    chat = ServerChat(simulator.url, "first")
    assert make_human("self", chat).chat is chat
    server = Server()
    human = make_human(f"{server.url}#second")
    assert human.chat.model == "second"
    assert human.chat is not chat
    assert human.max_characters == 400
    assert chat_human(server.url, None, "x", "", max_characters=99).max_characters == 99
    server.close()
    for spec, says in [("robot", "robot: .*scripted"), ("self", "no local model"),
                       (server.url, "is the server up")]:
        with pytest.raises(UserError, match=says):
            make_human(spec)
