"""Tasks of Backend Programming: in the published format, or the bundled mini benchmark."""
import ast
import json
import warnings

from colbench.env.backend.mini import mini_tasks
from colbench.env.data import check_texts, read_tasks
from colbench.run.errors import UserError

MINI_SIZES = {"train": 1000, "test": 300}  # tasks of `mini:train` and `mini:test` when no limit is given


def load_tasks(source, limit=None):
    """The first `limit` (None: all) tasks: [{"id", "problem_description", "ground_truth", "test_cases": {name: call}}].

    source: `mini:train`, `mini:test`, or as for colbench.env.data.read_tasks. UserError for what cannot be a task.
    """
    if not str(source).startswith("mini:"):
        return read_tasks(source, check_task, limit)
    split = str(source)[len("mini:"):]
    if split not in MINI_SIZES:
        raise UserError(f"{source}: the mini benchmark has mini:train and mini:test")
    return mini_tasks(split, MINI_SIZES[split] if limit is None else limit)


def check_task(row, where):
    """The task in a row of a file; UserError for a reference that is no Python and tests without a usable call."""
    task = check_texts(row, where)
    try:
        _python(ast.parse, task["ground_truth"], "not Python")
    except ValueError as error:
        raise UserError(f"{where}: ground_truth: {error}") from None
    if row.get("test_cases") is None:
        raise UserError(f"{where}: test_cases: missing")
    try:
        return {**task, "test_cases": parse_test_cases(row["test_cases"])}
    except ValueError as error:
        raise UserError(f"{where}: test_cases: {error}") from None


def parse_test_cases(value):
    """{name: call} from a dict or its JSON or Python text. ValueError, one line, if there is no usable call."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = _python(ast.literal_eval, value, "neither JSON nor Python text of a dict")
    if not isinstance(value, dict):
        raise ValueError(f"a dict of name: call is wanted, this is a {type(value).__name__}")
    value = {name: call for name, call in value.items() if call is not None}  # a table's columns are those of all rows
    if not value:
        raise ValueError("a task without tests")
    for name, call in value.items():
        if not isinstance(call, str):
            raise ValueError(f"{name}: a call as a text is wanted, this is a {type(call).__name__}")
        _python(lambda text: ast.parse(text.strip(), mode="eval"), call, f"{name}: not a Python expression")
    return {str(name): call for name, call in value.items()}


def _python(parse, text, problem):
    """parse(text), every way in which text can be no Python turned into ValueError(problem)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # published references hold invalid escapes such as "\d"
            return parse(text)
    except SyntaxError as error:
        raise ValueError(f"{problem} ({error.msg}, line {error.lineno} of it)") from None
    except (ValueError, TypeError, MemoryError, RecursionError):
        raise ValueError(problem) from None
