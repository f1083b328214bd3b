"""fedtune: benchmark, toolkit and leaderboard for federated fine-tuning of large language models."""

import os
import sys

__version__ = "0.1.0"

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

# the same where a library was imported first and has read its environment: module -> variable, constant, value
_READ_ALREADY = {
    "flwr.supercore.telemetry": ("FLWR_TELEMETRY_ENABLED", "FLWR_TELEMETRY_ENABLED", "0"),
    "flwr_datasets.common.telemetry": ("FLWR_TELEMETRY_ENABLED", "FLWR_TELEMETRY_ENABLED", "0"),
    "huggingface_hub.constants": ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", True),
    "datasets.config": ("HF_UPDATE_DOWNLOAD_COUNTS", "HF_UPDATE_DOWNLOAD_COUNTS", False),
}


def _keep_private() -> None:
    for module, (variable, constant, value) in _READ_ALREADY.items():
        if module in sys.modules and variable not in os.environ:
            setattr(sys.modules[module], constant, value)
    for variable, off in PRIVATE.items():
        os.environ.setdefault(variable, off)


_keep_private()
