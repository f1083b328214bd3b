"""Code: from a description to a function."""

from __future__ import annotations

import ast
import sys
import sysconfig
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedtune.data.hub import HubSet
from fedtune.data.packages import ALGORITHMS, list_wheel, read_wheel
from fedtune.domains.base import Domain, Item, Row, Task, TrainingSet

_ASK = "Write a Python function that does what its documentation says."
_SKIPPED = (
    "test",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "site-packages",
    "ensurepip",
    "pydoc_data",
    "__pycache__",
)


def _functions(source: str, module: str) -> Iterator[Row]:
    """Yield every documented function of a module: signature and docstring -> body."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and len(node.body) > 1 and (doc := ast.get_docstring(node)):
            head = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1]))
            body = textwrap.dedent("\n".join(lines[node.body[1].lineno - 1 : node.end_lineno]))
            if 30 <= len(doc) <= 600 and body and len(body) < 1500:
                asked = f"{head}\n{textwrap.indent(doc, '    ')}"
                solution = textwrap.indent(body, "    ")
                name = f"{module}.{node.name}"
                yield {
                    "instruction": _ASK,
                    "input": asked,
                    "output": solution,
                    "module": module,
                    "name": name,
                }


def _standard_library() -> Sequence[Row]:
    """Return documented functions of the Python that runs; which version it is stands in the set's name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    rows: list[Row] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not any(part in _SKIPPED for part in parts):
            rows += _functions(path.read_text(encoding="utf-8", errors="replace"), parts[0].removesuffix(".py"))
    return rows


def _algorithms() -> Sequence[Row]:
    """Return the documented functions of the `algorithms` package: never trained on, real solutions."""
    rows: list[Row] = []
    for name in list_wheel(ALGORITHMS, "algorithms/", ".py"):
        rows += _functions(read_wheel(ALGORITHMS, name).decode("utf-8"), name.split("/")[1])
    return rows


def _solution(row: Row) -> Item:
    asked = f"{row['instruction']} {row['input']}"
    return Item(asked, asked, (str(row["output"]),), 0, str(row["module"]))


CODE = Domain(
    name="code",
    title="Code",
    training=TrainingSet("code-alpaca-20k", HubSet("flwrlabs/code-alpaca-20k", "train")),
    packaged=TrainingSet(
        f"python-{sys.version_info.major}.{sys.version_info.minor}-stdlib-functions",
        packaged=_standard_library,
        group="module",
    ),
    tasks=(),
    packaged_tasks=(Task("algorithms-solutions", "solution", _solution, packaged=_algorithms),),
)
