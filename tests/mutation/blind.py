"""Mutants that nobody chose: every so many numbers and operators of the code, counted through the files."""

import ast
from pathlib import Path

from tests.mutation.mutants import Mutant

FILES = {
    "flexgs/training/trainer.py": "steps rates draws bookkeeping train",
    "flexgs/training/densify.py": "densify steps train",
    "flexgs/training/optim.py": "rates steps train", "flexgs/image/losses.py": "steps losses",
    "flexgs/model/order.py": "steps draws model equations",
    "flexgs/model/deltas.py": "steps draws model progressive",
    "flexgs/model/field.py": "steps model", "flexgs/model/importance.py": "importance",
    "flexgs/model/merge.py": "model draws", "flexgs/evaluate.py": "evaluation metrics",
    "flexgs/report/table.py": "evaluation table",
    "flexgs/store.py": "interrupted store", "tuning/trial.py": "bookkeeping interrupted",
    "tuning/study.py": "bookkeeping"}
"""And the words of the tests that cover each."""

OPERATORS: dict[type, tuple[str, str]] = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "==")}


def chosen(root: Path, n: int) -> list[Mutant]:
    """n of all places, evenly spaced, each with a line of context long enough to be found once."""
    places = [(file, *place) for file in FILES for place in _places((root / file).read_text())]
    step = len(places) / n
    found = []
    for file, first, last, new in (places[int((i + 0.5) * step)] for i in range(n)):
        text = (root / file).read_text()
        start, end = first, last
        while text.count(text[start:end]) != 1:
            start, end = max(0, start - 1), min(len(text), end + 1)
        line = text.count("\n", 0, first) + 1
        found.append(Mutant(f"line {line}: {text[first:last].strip()} -> {new}", file, text[start:end],
                            text[start:first] + new + text[last:end],
                            tuple(f"tests/test_{w}.py" for w in FILES[file].split())))
    return found


def _places(text: str) -> list[tuple[int, int, str]]:
    """(first, last, what takes its place) of numbers and of operators between two operands, in the order of
    the text."""
    starts = [0]
    for line in text.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    raw = text.encode()

    def at(line: int, column: int) -> int:
        return len(raw[:starts[line - 1] + column].decode())

    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            first, last = at(node.lineno, node.col_offset), at(node.end_lineno or 0, node.end_col_offset or 0)
            found.append((first, last, repr(node.value + 1) if node.value in (0, 1)
                          else repr(node.value * 2)))
        pairs = [(node.left, node.op, node.right)] if isinstance(node, ast.BinOp) else (
            [(node.left, node.ops[0], node.comparators[0])] if isinstance(node, ast.Compare)
            and len(node.ops) == 1 else [])
        for left, op, right in pairs:
            old, new = OPERATORS.get(type(op), ("", ""))
            first, last = at(left.end_lineno or 0, left.end_col_offset
                             or 0), at(right.lineno, right.col_offset)
            between = text[first:last]
            if old and between.count(old) == 1 and "#" not in between:
                place = first + between.index(old)
                found.append((place, place + len(old), new))
    return sorted(found)
