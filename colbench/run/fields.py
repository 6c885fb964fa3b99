"""What stands in a line of a file: which fields, and what kind of value each has. Every reader asks `checked`.

A kind is
    str, float, bool, dict, list   a text, a finite number, true or false, an object of anything, a list of anything
    range(1, 10)                   a whole number in it; 1.0 is one too (and true), as table libraries write them
    {"a", "b"}                     one of these texts
    [kind]                         a list of such
    (kind, kind)                   a list of just these
    {"name": kind, "name?": kind}  an object; with `?` the field may be missing. Fields without a kind stay as they are
    a function of (value, where)   gives the value back, or raises UserError
"""
import sys

from colbench.run.errors import UserError

COUNT, FROM_1 = range(1 << 31), range(1, 1 << 31)
NAMES = {str: "a text", float: "a number", bool: "true or false", dict: "an object", list: "a list"}


def checked(value, kind, where: str):
    """`value`, of which a reader may now expect `kind`. UserError that begins with `where` (FILE:LINE, then fields).

    Null is missing: a named field that is null is left out of what is returned.
    """
    if isinstance(kind, dict):
        row = dict(_is_a(dict, value, where))
        for field, of in kind.items():
            name = field.removesuffix("?")
            if row.get(name) is not None:
                row[name] = checked(row[name], of, f"{where}: {name}")
            elif name == field:
                raise UserError(f"{where}: {name}: missing")
            else:
                row.pop(name, None)
        return row
    if isinstance(kind, list):
        return [checked(part, kind[0], f"{where}[{i}]") for i, part in enumerate(_is_a(list, value, where))]
    if isinstance(kind, tuple):
        if len(_is_a(list, value, where)) != len(kind):
            raise UserError(f"{where}: a list of {len(kind)} is wanted, this has {len(value)}")
        return [checked(part, of, f"{where}[{i}]") for i, (part, of) in enumerate(zip(value, kind))]
    if isinstance(kind, range):
        right = is_number(value) and value == int(value) and int(value) in kind
        return int(value) if right else _refuse(f"a whole number from {kind.start} on", value, where)
    if isinstance(kind, set):
        return value if isinstance(value, str) and value in kind else _refuse(" or ".join(sorted(kind)), value, where)
    return _is_a(kind, value, where) if kind in NAMES else kind(value, where)


def is_number(value) -> bool:
    """Whether it is a finite number that a float can hold; true and false are none."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_a(kind, value, where):
    if kind is bool and type(value) is float and value in (0, 1):  # a table library's column in which some are missing
        return bool(value)
    right = is_number(value) if kind is float else isinstance(value, kind)
    return value if right else _refuse(NAMES[kind], value, where)


def _refuse(wanted, value, where):
    known = {str: "a text", dict: "an object", list: "a list", bool: str(value).lower(), type(None): "null"}
    raise UserError(f"{where}: {wanted} is wanted, this is {known.get(type(value)) or repr(value)[:40]}")
