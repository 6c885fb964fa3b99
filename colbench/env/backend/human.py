"""Who plays the human of Backend Programming: a scripted one, or a chat model with this prompt."""
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

What you have in mind is exactly what the code below does. The assistant cannot see this code and must never see it.

{hidden_information}

When the assistant asks something, look the answer up in the code and say it in plain words, the way a customer would. \
If the code does not settle the question, say that you don't know. Tell nothing that was not asked, and write no code.

The conversation so far (you are the Human):

{dialogue_history}

Reply to the Agent's last message as the Human, in one or two short sentences, and write nothing but the reply."""

Detail = namedtuple("Detail", "keywords sentence")  # what a question about it mentions; the whole truth about it
STOP_WORDS = frozenset("""
a about all also am an and any are as at be been before but by can cannot could did do does doing each else ever every
exact exactly for from function get give had has have help her here his how i if in include into is it its itself just
know let like look make may me mean might more most must my need no not of off on once one only or other our out over
own please question return same say set shall she should sir so some such take tell than thank that the their them then
there these they thing this those to too under until up us use used using very want was way we well were what when where
which while who whom why will with within without would write yes you your
""".split())
# nouns that say only that a quantity is meant: they count as keywords where a detail has no other
WEAK_WORDS = frozenset("""
amount calculate code compute cost count detail fee figure level number price quantity rate result rule size total value
""".split())


def make_human(spec, chat=None):
    """The human for `spec`: "scripted", "self" (plays on `chat`, the local model), or the address of a server.

    UserError: another spec, or a server that cannot be used.
    """
    if spec == "scripted":
        return ScriptedHuman()
    return chat_human(spec, chat, HUMAN_PROMPT, "scripted, self or the address of a server (http://…)")


class ScriptedHuman:
    """Offline and deterministic: answers a question about a detail of the reference with one true short sentence.

    Details are the reference's comments, its constants in CAPITALS and the defaults of its arguments. One detail a
    message: the one whose keywords the agent's question covers best, among equals the one mentioned first. Of a list of
    three or more things only the first is heard: reading out all the things there could be finds nothing out sooner.
    """

    repeatable = True

    def __init__(self):
        self.replies = self.leaks = self.cuts = 0

    def reply(self, tasks, histories, seeds):
        """See colbench.env.humans; seeds are not needed."""
        self.replies += len(tasks)
        self.leaked = [False] * len(tasks)
        return [answer(task["ground_truth"], history[-1]["content"]) for task, history in zip(tasks, histories)]


def answer(reference, message):
    """The scripted human's reply to the agent's message."""
    places = {}  # keyword -> where the message first mentions it
    for place, word in enumerate(keywords(_heard(message))):
        places.setdefault(word, place)
    best, best_key = UNKNOWN, (0, 0)
    for detail in details(reference):
        hits = [places[word] for word in detail.keywords if word in places]
        # one word in passing is no question about a long comment
        if hits and (len(hits) >= 2 or 2 * len(hits) >= len(detail.keywords)):
            key = (len(hits) ** 2 / len(detail.keywords), -min(hits))
            if best is UNKNOWN or key > best_key:
                best, best_key = detail.sentence, key
    return best


def _heard(message):
    """The part of the message that is listened to: its questions if any, and of three or more things the first."""
    questions = [sentence for sentence in re.split(r"(?<=[.?!])\s+|\n", message) if "?" in sentence]
    heard = " ".join(questions) or message
    things = [thing for thing in re.split(r"[,;?!\n]|\b(?:and|or)\b", heard) if keywords(thing)]
    return things[0] if len(things) >= 3 else heard


def keywords(text):
    """Its content words in order: lower case, plurals folded, stop words and single letters left out."""
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
def details(reference):
    """The details of a reference that a question can be about, in the order of its lines: a tuple of Detail."""
    found = sorted([*_comments(reference), *_constants(reference)], key=lambda detail: detail[0])  # by row
    result = []
    for _, words, sentence in found:
        words = frozenset(keywords(words))
        words = words - WEAK_WORDS or words
        if words and not leaks(sentence, reference):
            result.append(Detail(words, sentence))
    return tuple(result)


def _comments(reference):
    """(row, words, sentence) per comment; full-line comments on consecutive rows are one."""
    numbers, code_rows, comments, before = {}, set(), [], ["", ""]
    for token in python_tokens(reference) or ():
        row = token.start[0]
        if token.type == tokenize.COMMENT:
            comments.append((row, token.string.lstrip("#!: ").strip()))
            continue
        if token.string.strip():
            code_rows.add(row)
        if token.type == tokenize.NUMBER:
            minus = before[1] == "-" and not re.match(r"[\w)\]}]", before[0])  # a sign, not a subtraction
            numbers.setdefault(row, "-" * minus + token.string)
        before = [before[1], token.string]
    merged, last = [], None
    for row, text in comments:
        full_line = row not in code_rows
        if full_line and last == row - 1 and merged:
            text = f"{merged.pop()[1]} {text}"
        last = row if full_line else None
        merged.append((row, text, full_line))
    for row, text, full_line in merged:
        text = " ".join(text.split())
        if re.search(r"\w\(|[=\[\]{};]|\b(def|import|print|lambda)\b", text):  # code that was commented out
            continue
        noun = re.sub(r"^(the|an?)\s+", "", text.rstrip(".:"), flags=re.IGNORECASE)
        if not full_line and row in numbers and 0 < len(noun.split()) <= 4:
            yield row, noun, f"The {noun} is {numbers[row]}."
        elif text:
            yield row, text, text[0].upper() + text[1:].rstrip(".:,") + "."


def _constants(reference):
    """(row, words, sentence) per constant in CAPITALS and per default argument: numbers and short texts."""
    try:
        tree = ast.parse(reference)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        pairs = []
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            pairs = [(name, node.value) for name in names if name.isupper()]
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            plain = node.args.posonlyargs + node.args.args
            pairs = [(arg.arg, value) for arg, value in zip(plain[::-1], node.args.defaults[::-1])]
            pairs += [(arg.arg, value) for arg, value in zip(node.args.kwonlyargs, node.args.kw_defaults)]
        for name, value in pairs:
            try:
                value = ast.literal_eval(value)
            except (ValueError, TypeError):  # an expression, or no value at all
                continue
            if isinstance(value, (int, float)) or isinstance(value, str) and 0 < len(value) <= 80 and "\n" not in value:
                words = " ".join(re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name)).lower()
                yield node.lineno, words, f"The {words} is {value}."


# ---- whether a reply can be true

WORDS = {word: str(n) for n, word in enumerate(  # no "one": "the first one"
    "zero - two three four five six seven eight nine ten eleven twelve".split()) if word != "-"}
BOUND = re.compile(r"\b(?:after|than|above|over|below|under|beyond|least|most|every|first|per|up to|by|minus) \d+")
NUMBER = re.compile(r"(?<![\w.])(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
NAME = re.compile(r"(?<!\w)[\"'“‘`]([^\"'”’`\n]{1,60})[\"'”’`](?!\w)|"  # in quotes, or as code spells it
                  r"\b([A-Za-z]+_\w+|[a-z]+[A-Z]\w*|(?!OK\b)[A-Z]{2,}\d*)\b")
DONT_KNOW = re.compile(r"\b(?:don[’']?t|do not|not|can[’']?t|cannot|no) (?:know|sure|say|idea)\b", re.IGNORECASE)


def contradicts(task, question, reply):
    """Whether the reply to the agent's message cannot be true by the task's reference.

    Of the mini benchmark the numbers of all details are known, and the scripted human is the judge: a reply contradicts
    if it gives a detail another number, or does not know what that one knows. Elsewhere it does if a number or a name
    in it (in quotes, or spelled as code is) stands neither in the reference nor in the request nor in the question, a
    number also not as a percentage or as the neighbour of a bound. That is less than to be wrong: a number that stands
    elsewhere in the reference passes.
    """
    reference, asked = task["ground_truth"], f"{task['problem_description']} {question}"
    details = details_of(reference)
    if details is not None:
        return _contradicts_mini(details, answer(reference, question), _numbers(f"{reference} {asked}"), reply)
    words = f"{reference} {asked}".lower()
    names = [(quoted or plain).strip(" .,;:!?").lower() for quoted, plain in NAME.findall(reply)]
    return not _numbers(reply) <= _numbers(asked) | _true_numbers(reference) or not all(name in words for name in names)


def _contradicts_mini(details, judge, known, reply):
    """details: {name: number}; judge: the scripted human's reply; known: numbers that may be said of anything."""
    for word, digit in WORDS.items():
        reply = re.sub(rf"\b{word}\b", digit, reply, flags=re.IGNORECASE)
    reply = BOUND.sub("", reply)
    for piece in re.split(r"[.;,!?]+(?:\s|$)|\n|\band\b", reply):
        named, told = _named(piece), _numbers(piece)
        if len(named) == 1 and told and details.get(named[0], 0) not in told:
            return True
    told, named = _numbers(reply), _named(reply)
    if not (right := re.match(r"The (\w+) is (\d+)\.", judge)):
        return not told <= known | {0.0}
    return bool(DONT_KNOW.search(reply)) or bool(told) and int(right[2]) not in told and (
        not named or right[1] in named)


def _named(text):
    """The details of the mini benchmark that a text names."""
    words = keywords(text)
    return [name for name in DETAILS if _singular(name) in words]


def _numbers(text):
    """The numbers in a text, without their signs."""
    return {float(number.replace(",", "")) for number in NUMBER.findall(text)}


@lru_cache(maxsize=20_000)
def _true_numbers(reference):
    """The numbers that true words about a reference may hold."""
    plain = re.sub(r"(?<=\d)_(?=\d)", "", reference)
    found = _numbers(plain) | _numbers(plain.replace(",", " ")) | {0.0, 1.0}  # [100,200] is no number of six digits
    bounds = {float(n) for n in re.findall(r"(?:[<>]=?|range\(|//|%|\[)\s*-?(\d+)", reference)}
    return found | {n + step for n in bounds for step in (-1, 1)} | {
        round(value, 9) for n in found for value in (100 * n, n / 100, abs(1 - n), 100 * abs(1 - n))}
