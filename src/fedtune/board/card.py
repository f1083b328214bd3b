"""What the Hub and others read of a submission: a model card, `.eval_results`, and results in lm-eval's shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedtune.evaluation import scorers
from fedtune.io import write_bytes, write_json
from fedtune.results.entry import Entry, escape_markdown
from fedtune.results.schema import Score


def _metric(score: Score) -> str:
    return scorers.metric(score.metric).short or score.metric


def lm_eval(entry: Entry) -> dict[str, Any]:
    """Return the main arm's scores in the shape of lm-eval's `results_*.json`."""
    scores = entry.main.scores
    return {
        "results": {
            f"{s.task}_{s.mode}": {"alias": s.task, f"{_metric(s)},none": s.score, "sample_len": s.n} for s in scores
        },
        "n-samples": {f"{s.task}_{s.mode}": {"original": s.n, "effective": s.n} for s in scores},
        "task_hashes": {f"{s.task}_{s.mode}": s.items_sha256 for s in scores},
        "config": {"model": "hf", "model_args": f"pretrained={entry.base},revision={entry.revision},peft=adapter"},
        "model_name": entry.base,
        "git_hash": entry.code.get("commit"),
        "transformers_version": entry.versions.get("transformers"),
    }


def eval_results(entry: Entry) -> list[dict[str, Any]]:
    """Return the entries of `.eval_results/*.yaml` (task, value, source) for a model repository on the Hub."""
    return [
        {
            "dataset": {"id": s.task, "task_id": s.mode},
            "value": s.score,
            "metric": _metric(s),
            "notes": f"n = {s.n}, federated fine-tuning of {entry.base} with {entry.method}",
        }
        for s in entry.main.scores
        if s.score is not None
    ]


def model_card(entry: Entry) -> str:
    """Return the adapter's README: metadata for the Hub, scores with intervals, costs, how to make it again."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=s.task,
            dataset_name=s.title,
            dataset_config=s.mode,  # or the Hub's library puts both modes of a task into one result
            metric_type=_metric(s),
            metric_value=s.score,
        )
        for s in entry.main.scores
        if s.score is not None
    ]
    settings = entry.settings_or_none  # of a run, unless the entry is damaged
    data = ModelCardData(
        base_model=entry.base,
        library_name="peft",
        tags=["federated-learning", *([settings.peft.kind] if settings else []), entry.method, entry.domain],
        model_name=entry.title or f"{entry.base} {entry.domain} {entry.method}",
        eval_results=results or None,
    )
    rows = [
        f"| {escape_markdown(s.title)} | {s.n} | {escape_markdown(_shown(s))} | {_base(entry, s)} |"
        for s in entry.main.scores
    ]
    costs, name = entry.costs, escape_markdown(str(entry.data.get("name", "")))
    sha256 = escape_markdown(str(entry.data.get("sha256", ""))[:16])
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# {escape_markdown(f'{entry.base}, fine-tuned federatedly on {entry.domain} with {entry.method}')}",
        "| task | n | score | base model |\n|---|---|---|---|\n" + "\n".join(rows),
        f"Communication: {costs.bytes_up:,} bytes up, {costs.bytes_down:,} down. Seed {entry.seed}, protocol "
        f"{escape_markdown(entry.protocol)}, data {name} ({sha256}).",
        f"Differential privacy: {'none' if entry.privacy is None else f'epsilon {entry.privacy.epsilon:g}'}.",
        "Load it: `PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)`.",
        f"Make it again: `fedtune run --config config.toml --seed {entry.seed}`.",
    ]
    if entry.unranked:  # also names the packages that the run used
        lines.append(f"Not ranked: {escape_markdown('; '.join(entry.unranked))}.")
    return "\n\n".join(lines) + "\n"


def _shown(score: Score) -> str:
    if score.score is None:
        return f"withheld: {score.withheld}"
    low, high = score.interval or (score.score, score.score)
    return f"{score.score:.4f} ({low:.4f} to {high:.4f})"


def _base(entry: Entry, score: Score) -> str:
    arm = entry.arm("base")
    same = arm.like(score) if arm else None
    return f"{same.score:.4f}" if same and same.score is not None else "not evaluated"


def write(out: Path, entry: Entry) -> None:
    """Write README.md, `.eval_results/fedtune.yaml` and results_lm_eval.json into a folder."""
    import yaml

    write_bytes(out / "README.md", model_card(entry).encode())
    write_bytes(out / ".eval_results/fedtune.yaml", yaml.safe_dump(eval_results(entry), sort_keys=False).encode())
    write_json(out / "results_lm_eval.json", lm_eval(entry))
