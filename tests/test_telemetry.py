"""Nothing leaves the machine that nobody asked for, however fedtune is used."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w

from fedtune import PRIVATE
from fedtune.config import Settings

# the libraries that read these variables when they are imported, and what they must have read
SEEN = """
import json, os, sys
{first}
import {part}
import datasets.config, flwr.supercore.telemetry, flwr_datasets.common.telemetry, huggingface_hub.constants
from ray._common.usage import usage_lib
print(json.dumps([
    flwr.supercore.telemetry.FLWR_TELEMETRY_ENABLED,
    flwr_datasets.common.telemetry.FLWR_TELEMETRY_ENABLED,
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY,
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS,
    usage_lib.usage_stats_enabled(),
]))
"""
OFF = ["0", "0", True, False, False]
READERS = "import datasets.config, flwr.supercore.telemetry, flwr_datasets.common.telemetry, huggingface_hub.constants"


def fresh(code: str, **variables: str) -> str:
    """Run code in an interpreter without any of the variables but those given."""
    environment = {k: v for k, v in os.environ.items() if k not in PRIVATE and k != "HF_HUB_OFFLINE"} | variables
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("part", "first"),
    [("fedtune.experiment.run", ""), ("fedtune.federation.simulation", ""), ("fedtune.types", READERS)],
    ids=["a run", "the simulation", "after the libraries"],
)
def test_libraries_do_not_report_whatever_is_imported(part: str, first: str) -> None:
    pytest.importorskip("ray")
    assert json.loads(fresh(SEEN.format(part=part, first=first))) == OFF


def test_an_explicit_wish_to_report_is_kept() -> None:
    pytest.importorskip("ray")
    wish = {"FLWR_TELEMETRY_ENABLED": "1", "RAY_USAGE_STATS_ENABLED": "1"}
    assert json.loads(fresh(SEEN.format(part="fedtune", first=""), **wish)) == ["1", "1", True, False, True]


def test_a_child_process_is_as_private() -> None:
    child = f"import json, os; print(json.dumps({{name: os.environ.get(name) for name in {sorted(PRIVATE)}}}))"
    code = f"import fedtune, subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert json.loads(fresh(code)) == PRIVATE


def test_doctor_says_what_is_switched_on() -> None:
    code = "import sys; sys.argv = ['fedtune', 'doctor']; from fedtune.cli import main; main()"
    assert re.search("^telemetry +off$", fresh(code), re.MULTILINE)
    assert "NOT OFF: RAY_USAGE_STATS_ENABLED=1" in fresh(code, RAY_USAGE_STATS_ENABLED="1")


OFFLINE = """
import socket
asked = []

def refuse(self, address):
    if self.family != socket.AF_UNIX:
        asked.append(str(address))
        raise OSError(f"this test has no network: {address}")
    return connect(self, address)

def lookup(host, *rest, **more):
    asked.append(str(host))
    raise socket.gaierror("this test has no network")

connect = socket.socket.connect
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = lookup
try:
    socket.create_connection(("203.0.113.1", 80))
except OSError:
    assert asked.pop(), "the guard would see a connection"
"""


def test_a_run_from_local_files_opens_no_connection(settings: Callable[..., Settings], tmp_path: Path) -> None:
    """A whole run, its arms and evaluations, from a model and data on disk: no library asks the network for anything."""
    config = settings(federation={"clients": 2, "rounds": 1}, eval={"modes": ["likelihood", "official"], "limit": 3})
    (tmp_path / "c.toml").write_text(tomli_w.dumps(config.config.plain()))
    code = (
        OFFLINE
        + f"""
from pathlib import Path
from fedtune.settings import load
from fedtune.config.load import read_toml
from fedtune.experiment.run import run
folder, result = run(load([read_toml(Path({str(tmp_path / "c.toml")!r}))]), Path({str(tmp_path / "run")!r}),
                     extra_arms=["local-only"])
assert len(result.arms) == 2
print(asked)
"""
    )
    assert fresh(code).splitlines()[-1] == "[]"
