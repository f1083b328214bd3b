"""What counts as tests of a program: a text of which at least one statement can fail when it is run."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

from fedtune.data.files import kind_of
from fedtune.domains.rows import optional, texts

WANTED = "a text, a list of texts, or an object with `test_list` (and `test_imports`, `test_setup_code`)"
_COMMENT = re.compile(r"//[^\n]*|/\*.*?(?:\*/|\Z)", re.S)  # one that nothing closes takes the rest
_CAN_FAIL = re.compile(r"\bassert|\bthrow\b|\babort\b|\bexit\b|\bexpect\b")
_LATER = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


def _run_at_once(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what runs when a module is executed: not what stands in functions and classes."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, _LATER):
            yield child
            yield from _run_at_once(child)


def _fails_sometimes(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        return not isinstance(node.test, ast.Constant)
    return isinstance(node, (ast.Call, ast.Raise))


def _tests_something(text: str, language: str) -> bool:
    if language == "python":
        try:
            return any(map(_fails_sometimes, _run_at_once(ast.parse(text))))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return _CAN_FAIL.search(_COMMENT.sub("", text)) is not None


def program_tests(found: Any, language: str) -> str:
    """Return a problem's tests as one text.

    Args:
        found: a text; a list of texts, each a line of its own; or an object like MBPP's rows, whose imports and
            set-up code go first.

    Raises:
        ValueError: tests of another form, and tests that pass whatever they are run with.
    """
    if isinstance(found, dict) and "test_list" in found:
        head = texts(found, "test_imports") if found.get("test_imports") else []
        text = "\n".join([*head, optional(found, "test_setup_code"), *texts(found, "test_list")])
    elif isinstance(found, list):
        text = "\n".join(texts({"tests": found}, "tests"))
    elif isinstance(found, str):
        text = found
    else:
        shown = f"an object with {', '.join(found)}" if isinstance(found, dict) else kind_of(found)
        raise ValueError(f"its tests are {shown}; wanted is {WANTED}")
    if not _tests_something(text, language):
        raise ValueError(f"its tests test nothing: {text.strip()[:60]!r}")
    return text
