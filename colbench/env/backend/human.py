"""The human of Backend Programming: scripted, or a chat model with the prompt below."""
import ast
import re
import tokenize
from collections import namedtuple
from functools import lru_cache

from colbench.env.backend.mini import DETAILS, details_of
from colbench.env.humans import UNKNOWN, chat_human, leaks, python_tokens

HUMAN_PROMPT = """\
You play a person who is chatting with a programming assistant. You asked it for this:

{problem_description}

What you have in mind is exactly what the code below does. The assistant cannot see this code and \
must never see it.

{hidden_information}

When the assistant asks something, look the answer up in the code and say it in plain words, the \
way a customer would. If the code does not settle the question, say that you don't know. Tell \
nothing that was not asked, and write no code.

The conversation so far (you are the Human):

{dialogue_history}

Reply to the Agent's last message as the Human, in one or two short sentences, and write nothing \
but the reply."""

Detail = namedtuple("Detail", "keywords sentence")  # words of a question about it; the full answer
STOP_WORDS = frozenset("""
a about all also am an and any are as at be been before but by can cannot could did do does doing
each else ever every exact exactly for from function get give had has have help her here his how i
if in include into is it its itself just know let like look make may me mean might more most must my
need no not of off on once one only or other our out over own please question return same say set
shall she should sir so some such take tell than thank that the their them then there these they
thing this those to too under until up us use used using very want was way we well were what when
where which while who whom why will with within without would write yes you your
""".split())
# nouns that only name a quantity: keywords only of a detail that has no others
WEAK_WORDS = frozenset("""
amount calculate code compute cost count detail fee figure level number price quantity rate result
rule size total value
""".split())


def make_human(spec, chat=None):
    """The human for `spec`: "scripted", "self" (`chat`, the local model) or a server's URL.

    UserError: unknown spec, or unusable server.
    """
    if spec == "scripted":
        return ScriptedHuman()
    return chat_human(spec, chat, HUMAN_PROMPT, "scripted, self or the address of a server (http://…)")


class ScriptedHuman:
    """Offline and deterministic: answers a question about a detail with one short, true sentence.

    Details are the hidden code's comments, constants in CAPITALS and default arguments. It gives at
    most one detail per message: the one whose keywords the question covers best, and on a tie the
    one mentioned first. In a list of three or more things it hears only the first, so an agent
    gains nothing by listing everything that might exist.
    """

    repeatable = True

    def __init__(self):
        self.replies = self.leaks = self.cuts = 0

    def reply(self, tasks, histories, seeds):
        """See colbench.env.humans; seeds are not used."""
        self.replies += len(tasks)
        self.leaked = [False] * len(tasks)
        return [answer(task["ground_truth"], history[-1]["content"])
                for task, history in zip(tasks, histories)]


def answer(hidden_code, message):
    """The scripted human's reply to the agent's message."""
    places = {}  # keyword -> where the message first mentions it
    for place, word in enumerate(keywords(_heard(message))):
        places.setdefault(word, place)
    best, best_key = UNKNOWN, (0, 0)
    for detail in details(hidden_code):
        hits = [places[word] for word in detail.keywords if word in places]
        # a single shared word does not make a question about a long comment
        if hits and (len(hits) >= 2 or 2 * len(hits) >= len(detail.keywords)):
            key = (len(hits) ** 2 / len(detail.keywords), -min(hits))
            if best is UNKNOWN or key > best_key:
                best, best_key = detail.sentence, key
    return best


def _heard(message):
    """What the human hears: the questions, if any; of three or more things, the first."""
    questions = [part for part in re.split(r"(?<=[.?!])\s+|\n", message) if "?" in part]
    heard = " ".join(questions) or message
    things = [part for part in re.split(r"[,;?!\n]|\b(?:and|or)\b", heard) if keywords(part)]
    return things[0] if len(things) >= 3 else heard


def keywords(text):
    """The content words in order: lower case, singular, without stop words and single letters."""
    words = (word.lower() for word in re.findall(r"[^\W\d_]+", text))
    return [_singular(word) for word in words if len(word) > 1 and word not in STOP_WORDS]


def _singular(word):
    if len(word) < 4 or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("sses", "xes", "ches", "shes")):
        return word[:-2]
    return word.removesuffix("s")


@lru_cache(maxsize=20_000)
def details(hidden_code):
    """What a question can be about, in the order of the code's lines: a tuple of Detail."""
    found = [*_comments(hidden_code), *_constants(hidden_code)]
    result = []
    for _, words, sentence in sorted(found, key=lambda item: item[0]):  # by row
        words = frozenset(keywords(words))
        words = words - WEAK_WORDS or words
        if words and not leaks(sentence, hidden_code):
            result.append(Detail(words, sentence))
    return tuple(result)


def _comments(hidden_code):
    """(row, words, sentence) per comment; full-line comments on consecutive rows are joined."""
    numbers = {}  # row -> its first number
    code_rows, comments = set(), []
    last_two = ["", ""]  # the previous tokens
    for token in python_tokens(hidden_code) or ():
        row = token.start[0]
        if token.type == tokenize.COMMENT:
            comments.append((row, token.string.lstrip("#!: ").strip()))
            continue
        if token.string.strip():
            code_rows.add(row)
        if token.type == tokenize.NUMBER:
            # a minus after a value is a subtraction, not a sign
            negative = last_two[1] == "-" and not re.match(r"[\w)\]}]", last_two[0])
            numbers.setdefault(row, f"-{token.string}" if negative else token.string)
        last_two = [last_two[1], token.string]
    merged, last = [], None
    for row, text in comments:
        full_line = row not in code_rows
        if full_line and last == row - 1 and merged:
            text = f"{merged.pop()[1]} {text}"
        last = row if full_line else None
        merged.append((row, text, full_line))
    for row, text, full_line in merged:
        text = " ".join(text.split())
        if re.search(r"\w\(|[=\[\]{};]|\b(def|import|print|lambda)\b", text):  # commented-out code
            continue
        noun = re.sub(r"^(the|an?)\s+", "", text.rstrip(".:"), flags=re.IGNORECASE)
        if not full_line and row in numbers and 0 < len(noun.split()) <= 4:
            yield row, noun, f"The {noun} is {numbers[row]}."
        elif text:
            yield row, text, text[0].upper() + text[1:].rstrip(".:,") + "."


def _constants(hidden_code):
    """(row, words, sentence) per constant in CAPITALS or default argument: numbers, short texts."""
    try:
        tree = ast.parse(hidden_code)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        pairs = []
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            pairs = [(name, node.value) for name in names if name.isupper()]
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            args = node.args
            plain = args.posonlyargs + args.args
            pairs = [(arg.arg, value) for arg, value in zip(plain[::-1], args.defaults[::-1])]
            pairs += [(arg.arg, value) for arg, value in zip(args.kwonlyargs, args.kw_defaults)]
        for name, value in pairs:
            try:
                value = ast.literal_eval(value)
            except (ValueError, TypeError):  # an expression, or no default
                continue
            short = isinstance(value, str) and 0 < len(value) <= 80 and "\n" not in value
            if short or isinstance(value, (int, float)):
                words = " ".join(re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name)).lower()
                yield node.lineno, words, f"The {words} is {value}."


# ---- whether a reply can be true

WORDS = {word: str(n) for n, word in enumerate(  # without "one", as in "the first one"
    "zero - two three four five six seven eight nine ten eleven twelve".split()) if word != "-"}
BOUND = re.compile(r"\b(?:after|than|above|over|below|under|beyond|least|most|every|first|per|"
                   r"up to|by|minus) \d+")
NUMBER = re.compile(r"(?<![\w.])(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
NAME = re.compile(r"(?<!\w)[\"'“‘`]([^\"'”’`\n]{1,60})[\"'”’`](?!\w)|"  # quoted, or like code
                  r"\b([A-Za-z]+_\w+|[a-z]+[A-Z]\w*|(?!OK\b)[A-Z]{2,}\d*)\b")
DONT_KNOW = re.compile(r"\b(?:don[’']?t|do not|not|can[’']?t|cannot|no) (?:know|sure|say|idea)\b",
                       re.IGNORECASE)


def contradicts(task, question, reply):
    """Whether the hidden code rules out the reply to the agent's message.

    Mini benchmark, where all numbers are known: the reply gives a detail a wrong number, or does
    not know what the scripted human knows. Other tasks: the reply has a number or a name (quoted,
    or spelled like code) that is in neither the hidden code nor the request nor the question.
    Percentages and numbers next to a bound are allowed. A wrong reply can pass, since any number
    in the hidden code is accepted.
    """
    hidden_code = task["ground_truth"]
    asked = f"{task['problem_description']} {question}"
    details = details_of(hidden_code)
    if details is not None:
        known = _numbers(f"{hidden_code} {asked}")
        return _contradicts_mini(details, answer(hidden_code, question), known, reply)
    if not _numbers(reply) <= _numbers(asked) | _true_numbers(hidden_code):
        return True
    words = f"{hidden_code} {asked}".lower()
    names = [(quoted or plain).strip(" .,;:!?").lower() for quoted, plain in NAME.findall(reply)]
    return not all(name in words for name in names)


def _contradicts_mini(details, scripted_reply, known, reply):
    """details: {name: number}; known: numbers that may be said of anything."""
    for word, digit in WORDS.items():
        reply = re.sub(rf"\b{word}\b", digit, reply, flags=re.IGNORECASE)
    reply = BOUND.sub("", reply)
    for piece in re.split(r"[.;,!?]+(?:\s|$)|\n|\band\b", reply):
        names, numbers = _named(piece), _numbers(piece)
        if len(names) == 1 and numbers and details.get(names[0], 0) not in numbers:
            return True
    names, numbers = _named(reply), _numbers(reply)
    if not (truth := re.match(r"The (\w+) is (\d+)\.", scripted_reply)):
        return not numbers <= known | {0.0}
    if DONT_KNOW.search(reply):
        return True
    return bool(numbers) and int(truth[2]) not in numbers and (not names or truth[1] in names)


def _named(text):
    """The details of the mini benchmark that a text names."""
    words = keywords(text)
    return [name for name in DETAILS if _singular(name) in words]


def _numbers(text):
    """The numbers in a text, without their signs."""
    return {float(number.replace(",", "")) for number in NUMBER.findall(text)}


@lru_cache(maxsize=20_000)
def _true_numbers(hidden_code):
    """The numbers that a true sentence about the hidden code may contain."""
    plain = re.sub(r"(?<=\d)_(?=\d)", "", hidden_code)
    # [100,200] is not a six-digit number
    found = _numbers(plain) | _numbers(plain.replace(",", " ")) | {0.0, 1.0}
    bounds = {float(n) for n in re.findall(r"(?:[<>]=?|range\(|//|%|\[)\s*-?(\d+)", hidden_code)}
    neighbours = {n + step for n in bounds for step in (-1, 1)}
    percentages = {round(value, 9) for n in found
                   for value in (100 * n, n / 100, abs(1 - n), 100 * abs(1 - n))}
    return found | neighbours | percentages
