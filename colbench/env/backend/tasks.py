"""Tasks of Backend Programming: in the published format, or the bundled mini benchmark."""
import ast
import json
import warnings

from colbench.env.backend.mini import mini_tasks
from colbench.env.data import check_texts, read_tasks
from colbench.run.errors import UserError

MINI_SIZES = {"train": 1000, "test": 300}  # without a limit


def load_tasks(source, limit=None):
    """The first `limit` tasks (None: all).

    source: `mini:train`, `mini:test`, or as for colbench.env.data.read_tasks.
    Returns [{"id", "problem_description", "ground_truth", "test_cases": {name: call}}].
    UserError: not a task.
    """
    if not str(source).startswith("mini:"):
        return read_tasks(source, check_task, limit)
    split = str(source)[len("mini:"):]
    if split not in MINI_SIZES:
        raise UserError(f"{source}: no such split; use mini:train or mini:test")
    return mini_tasks(split, MINI_SIZES[split] if limit is None else limit)


def check_task(row, where):
    """The task in a row of a file. UserError: hidden code not Python, or no usable call."""
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
    """{name: call} from a dict or its JSON or Python source. ValueError: no usable call."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = _python(ast.literal_eval, value, "neither JSON nor a Python dict")
    if not isinstance(value, dict):
        raise ValueError(f"expected an object {{name: call}}, got {type(value).__name__}")
    # a table pads each row with the columns of the others
    value = {name: call for name, call in value.items() if call is not None}
    if not value:
        raise ValueError("empty; add at least one test call")
    for name, call in value.items():
        if not isinstance(call, str):
            raise ValueError(f"{name}: expected a call as a string, got {type(call).__name__}")
        _python(lambda text: ast.parse(text.strip(), mode="eval"), call,
                f"{name}: not a Python expression")
    return {str(name): call for name, call in value.items()}


def _python(parse, text, problem):
    """parse(text). ValueError(problem): the text is not Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # published code has invalid escapes such as "\d"
            return parse(text)
    except SyntaxError as error:
        raise ValueError(f"{problem} ({error.msg}, line {error.lineno} of it)") from None
    except (ValueError, TypeError, MemoryError, RecursionError):
        raise ValueError(problem) from None
