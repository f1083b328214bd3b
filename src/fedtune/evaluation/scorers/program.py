"""Programs: what is written is run with the item's tests in a sandbox; pass@1."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from fedtune.config import Config
from fedtune.config.schema import EvalSettings
from fedtune.domains.base import Item, Task
from fedtune.evaluation import again, metrics, programs, sandbox
from fedtune.evaluation.confine import SandboxError
from fedtune.evaluation.items import TaskItems
from fedtune.evaluation.retry import Failed
from fedtune.evaluation.scorers.base import Metric, Row, Sample, Scorer, Solver, pair, stray
from fedtune.results.schema import Score
from fedtune.results.stats import mean_interval, proportion_interval
from fedtune.types import FedtuneError


def _ran(score: Score) -> str:
    shares = score.details
    return f"{shares['compile_rate']:.0%}, {shares['timeout_rate']:.0%}" if "compile_rate" in shares else ""


PASS = Metric("pass@1", quality="compiles, timeouts", quality_of=_ran)


def _is_outcome(found: Any) -> bool:
    """Tell whether a stranger's outcome is one of the sandbox's."""
    if not isinstance(found, dict):
        return False
    return found.get("kind") in get_args(sandbox.Kind) and type(found.get("compiled")) is bool


def _passed(row: Row) -> int:
    return sum(o["kind"] == "passed" for o in row["outcomes"])


class Program(Scorer):
    """Programs written greedily, as a model has no likelihood of what it writes itself; or sampled, as officially.

    Args:
        mode: `greedy` or `official`.
        sampled: whether there are `eval.samples` of each item, in float32.
    """

    metric = PASS
    key = "group"
    samples_optional = True
    needs_tests = True
    readings = ("official",)

    def __init__(self, mode: str, *, sampled: bool) -> None:
        self.mode, self.sampled = mode, sampled
        self.uses = frozenset({"samples", "official_limit"} if sampled else {"max_new_tokens"})

    def solver(self) -> Solver:
        """Return what completes prompts."""
        from fedtune.evaluation.solvers import Completions

        return Completions(sampled=self.sampled)

    def depends_on(self, config: Config) -> list[Any]:
        """Return how many programs there are of an item, and how long they may be."""
        return [config.eval.samples, config.eval.max_new_tokens]

    def unavailable(self, task: Task) -> str:
        """Say why this task's language cannot be run here, or return an empty string.

        Raises:
            SandboxError: there is no sandbox at all; nothing is generated for nothing.
        """
        try:
            return sandbox.lacking(programs.LANGUAGES[task.language])
        except SandboxError as err:
            raise SandboxError(f'{task.name}: {err}. Without one: -s eval.tasks=["algorithms-solutions"]') from err

    def samples(self, loaded: TaskItems, first: int, answers: Sequence[Any], settings: EvalSettings) -> list[Sample]:
        """Run the programs of some items together; where writing raised, the program is the prompt alone."""
        items = loaded.items[first : first + len(answers)]
        texts = [[""] * self._of_each(settings) if isinstance(a, Failed) else a for a in answers]
        written = [[item.prompt + text for text in own] for item, own in zip(items, texts, strict=True)]
        rows = programs.run_each(written, [item.gold_answer for item in items], loaded.task.language)
        for number, (row, own, answer) in enumerate(zip(rows, written, answers, strict=True), first):
            if isinstance(answer, Failed):
                row["error"] = answer.text
                # a prompt that passes its tests alone is no program that was written
                row["outcomes"] = [{**o, "kind": "wrong"} if o["kind"] == "passed" else o for o in row["outcomes"]]
            passed = [o["kind"] == "passed" for o in row["outcomes"]]
            row.update(i=loaded.places[number], group=loaded.items[number].group, programs=own)
            row.update(correct=passed[0], value=sum(passed) / len(passed))
        return rows

    def summarise(self, task: str, rows: Sequence[Row], settings: EvalSettings | None = None, items: str = "") -> Score:
        """Score problems, each with the `outcomes` of its programs (kind and compiled).

        Programs that could not be run here at all withhold the score; so does too large a share of problems for which
        writing raised.
        """
        own, n = settings or EvalSettings(), len(rows)
        kinds = Counter(o["kind"] for r in rows for o in r["outcomes"])
        total = sum(kinds.values())
        unrun = f"{kinds['no-sandbox']} programs could not be run" if kinds["no-sandbox"] else ""
        why = unrun or metrics.withheld(rows, own.max_error_rate)
        per_problem = [_passed(r) / len(r["outcomes"]) for r in rows]
        single = all(len(r["outcomes"]) == 1 for r in rows)
        spread = proportion_interval(round(sum(per_problem)), n) if single else mean_interval(per_problem)
        return Score(
            task=task,
            mode=self.mode,
            metric=self.metric.name,
            n=n,
            score=None if why else math.fsum(per_problem) / n,
            interval=None if why else pair(spread),
            errors=sum(bool(r.get("error")) for r in rows),
            withheld=why,
            details={**self._pass_at_k(rows, own), **_shares(rows, kinds, total)} if total else {},
            items_sha256=items,
        )

    def _of_each(self, settings: EvalSettings) -> int:
        return settings.samples if self.sampled else 1

    def _pass_at_k(self, rows: Sequence[Row], settings: EvalSettings) -> dict[str, float]:
        k = self._of_each(settings)
        chances = (programs.pass_at(len(r["outcomes"]), _passed(r), k) for r in rows)
        return {f"pass@{k}": math.fsum(chances) / len(rows)} if k > 1 and rows else {}

    def check_sample(self, row: Row) -> str:
        """Say whether a sample's value is not what its outcomes give."""
        texts, outcomes = row.get("programs"), row.get("outcomes")
        if not isinstance(texts, list) or not isinstance(outcomes, list) or len(texts) != len(outcomes) or not texts:
            return "it has not one outcome for each program"
        if not all(isinstance(t, str) for t in texts):
            return "its programs are not texts"
        if not all(map(_is_outcome, outcomes)):
            return "an outcome is none that running a program has"
        passed = [o["kind"] == "passed" for o in outcomes]
        same = row.get("correct") == passed[0] and row.get("value") == sum(passed) / len(passed)
        if not same:
            return "its value is not the share of its programs that passed"
        return stray(row, ("programs", "outcomes", "value"))

    def check_failed(self, row: Row) -> str:
        """Say whether the programs of an item that raised are not judged as any others are; none of them passed."""
        return self.check_sample(row)

    def check_log(self, rows: Sequence[Row], settings: EvalSettings) -> str:
        """Say which item has not as many programs as the settings ask for."""
        count = self._of_each(settings)
        few = next((r for r in rows if not isinstance(r.get("programs"), list) or len(r["programs"]) != count), None)
        return f"item {few['i']} has not as many programs as the settings say ({count})" if few else ""

    def foreign(self, row: Row, item: Item) -> str:
        """Say whether a program does not begin as the item does."""
        begun = all(text.startswith(item.prompt) for text in row["programs"])
        return super().foreign(row, item) if begun else "its programs do not begin with the item's prompt"

    def run_again(self, task: Task, rows: Sequence[Row], tests: Mapping[int, str] | None = None) -> Iterator[str]:
        """Yield what running the programs that are said to pass shows, where they can be run here."""
        if why := again.too_much(rows) if tests is None else "":
            yield why
        elif tests is not None or not again.unable(task):
            try:
                found = list(again.failing(task, rows, tests))
            except FedtuneError as err:
                yield f"its programs could not be run again: {err}"
                return
            if found:
                count = f"at least {again.ENOUGH}" if len(found) == again.ENOUGH else str(len(found))
                place, ended = found[0]
                yield f"{count} programs do not pass as they are said to; the first: item {place}, {ended}"

    def not_run_again(self, task: Task) -> str:
        """Say why the programs cannot be run again on this machine, or return an empty string."""
        why = again.unable(task)
        return f"programs not run again here: {why}" if why else ""

    def published(
        self, task: Task, path: Path, reading: str, references: Path | None = None, *, as_asked: bool = True
    ) -> tuple[list[Sample], str]:
        """Run a published file of generations, a list of programs for each problem.

        Raises:
            DataError: there are no tests. SandboxError: nothing can be run.
        """
        texts = programs.read_published(path)
        asked = f"run with the tests of {references}, not with those of the set" if as_asked and references else ""
        tests, why = ([], asked) if asked else again.tests_of_the_set(task, len(texts))
        if why:
            tests = programs.published_tests(task, path, references, len(texts))
        rows = programs.run_each(texts, tests, task.language)
        return [{**row, "correct": all(o["kind"] == "passed" for o in row["outcomes"])} for row in rows], why


def _shares(rows: Sequence[Row], kinds: Counter[str], total: int) -> dict[str, float]:
    """Return the share of each outcome, and of the programs that compiled and that ran too long."""
    shares = {f"share_{kind}": count / total for kind, count in sorted(kinds.items())}
    compiled = sum(o["compiled"] for r in rows for o in r["outcomes"])
    return {**shares, "compile_rate": compiled / total, "timeout_rate": kinds["timeout"] / total}


PROGRAM = {"likelihood": Program("greedy", sampled=False), "official": Program("official", sampled=True)}
