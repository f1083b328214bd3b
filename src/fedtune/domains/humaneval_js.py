"""HumanEval in JavaScript, derived: those problems whose tests only compare calls on literals with literals.

Not MultiPL-E's translation and not called by its name: comments and signature are taken over, every
`assert candidate(args) == value` becomes `assert.deepEqual(candidate(args), value)`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from typing import Any

from fedtune.domains.base import Row

_SAFE_INTEGER = 2**53


def _value(value: Any) -> str:
    """Write a Python literal as JavaScript; tuples become arrays. Raises ValueError for what it has no equal for."""
    if value is None or isinstance(value, (bool, str)):
        return json.dumps(value)
    if isinstance(value, (int, float)):
        if isinstance(value, int) and abs(value) > _SAFE_INTEGER:
            raise ValueError(value)
        return json.dumps(value, allow_nan=False)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return "{" + ", ".join(f"{json.dumps(k)}: {_value(v)}" for k, v in value.items()) + "}"
    raise ValueError(value)


def _literal(node: ast.expr) -> str:
    return _value(ast.literal_eval(node))


def _call(node: ast.expr) -> str:
    if not isinstance(node, ast.Call) or node.keywords or ast.unparse(node.func) != "candidate":
        raise ValueError(ast.unparse(node))
    return f"candidate({', '.join(map(_literal, node.args))})"


def _assertion(node: ast.Assert) -> str:
    """Translate one assertion; an empty text for one that tests nothing (`assert True`)."""
    test = node.test
    if isinstance(test, ast.Constant) and test.value is True:
        return ""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return f"  assert.ok(!{_call(test.operand)});"
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq):
        return f"  assert.deepEqual({_call(test.left)}, {_literal(test.comparators[0])});"
    return f"  assert.ok({_call(test)});"


def _tests(source: str, name: str) -> str:
    """Translate a problem's `check` function. Raises ValueError where that is not possible."""
    check = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "check")
    lines = []
    for node in check.body:
        if isinstance(node, ast.Assert):
            lines.append(_assertion(node))
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            raise ValueError(ast.unparse(node))
    kept = [line for line in lines if line]
    if not kept:
        raise ValueError(name)
    head = ["const assert = require('node:assert');", "", "function test() {", f"  let candidate = {name};"]
    return "\n".join([*head, *kept, "}", "", "test();"])


def _prompt(source: str, name: str) -> str:
    """Write documentation as comments and the signature as JavaScript."""
    tree = ast.parse(source + "    pass\n")
    found = next(n for n in reversed(tree.body) if isinstance(n, ast.FunctionDef) and n.name == name)
    comment = "\n".join(f"//{line}" for line in (ast.get_docstring(found) or "").splitlines())
    return f"{comment}\nfunction {name}({', '.join(a.arg for a in found.args.args)}){{"


def derive(rows: Sequence[Row]) -> list[Row]:
    """Return the problems that can be told in JavaScript, in HumanEval's order."""
    made: list[Row] = []
    for row in rows:
        name = str(row["entry_point"])
        try:
            made.append(
                {"name": row["task_id"], "prompt": _prompt(row["prompt"], name), "tests": _tests(row["test"], name)}
            )
        except (ValueError, TypeError, SyntaxError, StopIteration):
            continue
    return made
