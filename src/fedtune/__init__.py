"""fedtune: benchmark, toolkit and leaderboard for federated fine-tuning of large language models.

As a library it has the functions of `fedtune.api`; each is imported when it is first used, so that
`import fedtune` alone costs nothing.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtune.api import aggregate, evaluate, load_settings, run, sweep
    from fedtune.config import Config, Settings
    from fedtune.domains import DOMAINS, TASKS
    from fedtune.evaluation.scorers import KINDS
    from fedtune.experiment.reporter import Reporter
    from fedtune.methods import METHODS
    from fedtune.methods.wrappers import WRAPPERS
    from fedtune.objectives import OBJECTIVES
    from fedtune.results.schema import Result
    from fedtune.spaces import SPACES
    from fedtune.types import ConfigError, FedtuneError

__version__ = "0.1.0"
__all__ = ["__version__", "aggregate", "evaluate", "load_settings", "run", "sweep"]
__all__ += ["Config", "ConfigError", "FedtuneError", "Reporter", "Result", "Settings"]
__all__ += ["DOMAINS", "KINDS", "METHODS", "OBJECTIVES", "SPACES", "TASKS", "WRAPPERS"]

_HOMES = {
    "fedtune.api": ("aggregate", "evaluate", "load_settings", "run", "sweep"),
    "fedtune.config": ("Config", "Settings"),
    "fedtune.domains": ("DOMAINS", "TASKS"),
    "fedtune.evaluation.scorers": ("KINDS",),
    "fedtune.experiment.reporter": ("Reporter",),
    "fedtune.methods": ("METHODS",),
    "fedtune.methods.wrappers": ("WRAPPERS",),
    "fedtune.objectives": ("OBJECTIVES",),
    "fedtune.results.schema": ("Result",),
    "fedtune.spaces": ("SPACES",),
    "fedtune.types": ("ConfigError", "FedtuneError"),
}


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` when it is first used."""
    for module, names in _HOMES.items():
        if name in names:
            globals()[name] = getattr(importlib.import_module(module), name)
            return globals()[name]
    raise AttributeError(f"module 'fedtune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Nothing leaves the machine that nobody asked for: what the libraries below this one would report of their own accord
# is off, for whoever imports any part of fedtune and for every process started from there. A value that is set already
# stays, so an explicit wish to report is kept.
PRIVATE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    # transformers asks a service of the Hub to convert weights that are not safetensors, in a thread of its own
    "DISABLE_SAFETENSORS_CONVERSION": "1",
}

# the same where a library was imported first and has read its environment: module -> its constant of this name, value
_READ_ALREADY = {
    "flwr.supercore.telemetry": ("FLWR_TELEMETRY_ENABLED", "0"),
    "flwr_datasets.common.telemetry": ("FLWR_TELEMETRY_ENABLED", "0"),
    "huggingface_hub.constants": ("HF_HUB_DISABLE_TELEMETRY", True),
    "datasets.config": ("HF_UPDATE_DOWNLOAD_COUNTS", False),
}


def _keep_private() -> None:
    for module, (variable, value) in _READ_ALREADY.items():
        if module in sys.modules and variable not in os.environ:
            setattr(sys.modules[module], variable, value)
    for variable, off in PRIVATE.items():
        os.environ.setdefault(variable, off)


_keep_private()
