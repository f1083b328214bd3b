"""Evaluate a base model or somebody's adapter by itself, without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedtune import domains
from fedtune.config import Config
from fedtune.evaluation.run import evaluate_all
from fedtune.experiment.reporter import Reporter
from fedtune.io import digest, folder_lock, only_files
from fedtune.models import load
from fedtune.models.folder import checked
from fedtune.models.load import LoadedModel
from fedtune.models.proof import proof_of
from fedtune.models.source import CONFIG, adapter_revision
from fedtune.models.trained import load_folder
from fedtune.results.schema import Score
from fedtune.types import AdapterError


def base_of(target: str, base: str | None) -> tuple[str, Path | None]:
    """Return the base model's name, and the adapter folder if `target` is one.

    Raises:
        AdapterError: the folder is not one that can be loaded, or names no base model.
    """
    folder = Path(target)
    if not (folder / CONFIG).is_file():
        if base:
            missing = f"is no adapter folder, it has no {CONFIG}" if folder.is_dir() else "no such adapter folder"
            raise AdapterError(f"--base {base}: {target}: {missing}")
        return target, None
    config, _ = checked(folder)  # says what is wrong with it before the base model is loaded
    name = base or config.base
    if not name:
        raise AdapterError(f"{folder}: its {CONFIG} names no base model; give one with --base")
    return name, folder


def default_folder(target: str, config: Config) -> Path:
    """Return where the per-sample logs of an evaluation are kept: one folder for each target and its settings."""
    return Path("evals") / digest([Path(target).name, config.semantic()])[:12]


def identity(base: LoadedModel, config: Config) -> list[Any]:
    """Return what identifies a base model as it is evaluated: its files, and the numbers it computes with."""
    return [f"{base.name}@{base.revision}", str(base.model.dtype), config.model.quantization]


def evaluate(
    config: Config, adapter: Path | None, folder: Path, watch: Reporter = Reporter(), *, insist: bool = False
) -> list[Score]:
    """Evaluate the model of some settings, with an adapter (a PEFT folder) if one is given.

    What the per-sample logs in `folder` hold of this very evaluation is not done again. `insist` evaluates the adapter
    on another base model than it names.

    Raises:
        LockedError: another process evaluates into this folder.
        FedtuneError: anything a user can repair.
    """
    tasks = domains.chosen_tasks(config)
    with folder_lock(folder):
        only_files(folder, "*.jsonl")
        if adapter is not None:
            checked(adapter)  # says why it is refused before the base model is loaded
        base = load.load(config.model)
        who, model = identity(base, config), base.model
        if adapter is not None:
            model = load_folder(base, adapter, insist=insist).model
            model.eval()
            who.append(adapter_revision(adapter))
        if apart := proof_of(base.model).why:
            who.append("one text at a time")
            watch.note(f"engine: one text at a time ({apart})")
        try:
            return evaluate_all(model, base.tokenizer, tasks, config, folder, digest(who), watch.evaluating)
        finally:
            watch.close()
