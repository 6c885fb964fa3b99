"""Check the fields of a row. Every reader of a file calls `checked`.

A kind is
    str, float, bool   a string, a finite number, true or false
    dict, list         any object, any list
    range(1, 10)       an integer in it; 1.0 counts as 1 (and as true): table libraries write it
    {"a", "b"}         one of these strings
    [kind]             a list of that kind
    (kind, kind)       a list of exactly these
    {"name": kind, "name?": kind}
                       an object; `?`: the field may be missing. Other fields stay as they are
    a function of (value, where)
                       returns the value, or raises UserError
"""
import sys

from colbench.run.errors import UserError

COUNT, FROM_1 = range(1 << 31), range(1, 1 << 31)
NAMES = {str: "a string", float: "a number", bool: "true or false", dict: "an object",
         list: "a list"}


def checked(value, kind, where: str):
    """`value` if it is of this kind, else UserError that begins with `where` (FILE:LINE: field).

    Null means missing: named fields that are null are left out of the result.
    """
    if isinstance(kind, dict):
        row = dict(_is_a(dict, value, where))
        for field, field_kind in kind.items():
            name = field.removesuffix("?")
            if row.get(name) is not None:
                row[name] = checked(row[name], field_kind, f"{where}: {name}")
            elif name == field:
                raise UserError(f"{where}: {name}: missing")
            else:
                row.pop(name, None)
        return row
    if isinstance(kind, list):
        parts = enumerate(_is_a(list, value, where))
        return [checked(part, kind[0], f"{where}[{i}]") for i, part in parts]
    if isinstance(kind, tuple):
        if len(_is_a(list, value, where)) != len(kind):
            raise UserError(f"{where}: expected a list of {len(kind)}, got {len(value)}")
        return [checked(part, part_kind, f"{where}[{i}]")
                for i, (part, part_kind) in enumerate(zip(value, kind))]
    if isinstance(kind, range):
        if is_number(value) and value == int(value) and int(value) in kind:
            return int(value)
        return _refuse(f"an integer of at least {kind.start}", value, where)
    if isinstance(kind, set):
        if isinstance(value, str) and value in kind:
            return value
        return _refuse(" or ".join(sorted(kind)), value, where)
    return _is_a(kind, value, where) if kind in NAMES else kind(value, where)


def is_number(value) -> bool:
    """Whether it is a finite number that a float can hold; true and false are not."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_a(kind, value, where):
    if kind is bool and type(value) is float and value in (0, 1):
        return bool(value)  # table libraries write it so if some are missing
    right = is_number(value) if kind is float else isinstance(value, kind)
    return value if right else _refuse(NAMES[kind], value, where)


def _refuse(expected, value, where):
    names = {str: "a string", dict: "an object", list: "a list", bool: str(value).lower(),
             type(None): "null"}
    got = names.get(type(value)) or repr(value)[:40]
    raise UserError(f"{where}: expected {expected}, got {got}")
