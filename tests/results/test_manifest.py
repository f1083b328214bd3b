"""What the machine says of itself."""

from pathlib import Path

import pytest

from fedtune.results.manifest import energy_counters, energy_since, machine, versions


def test_versions_belong_to_who_asked_for_them() -> None:
    versions()["torch"] = "another"
    assert versions()["torch"] != "another"


def _zone(root: Path, value: int) -> None:
    zone = root / "intel-rapl:0"
    zone.mkdir(exist_ok=True)
    (zone / "energy_uj").write_text(f"{value}\n")
    (zone / "max_energy_range_uj").write_text("1000000\n")


def test_energy_is_counted_over_a_wrap(tmp_path: Path) -> None:
    _zone(tmp_path, 900_000)
    start = energy_counters(tmp_path)
    _zone(tmp_path, 100_000)
    assert energy_since(start, tmp_path) == pytest.approx(0.2)
    assert energy_since({}, tmp_path) is None
    assert energy_counters(tmp_path / "none") == {}


def test_the_machine_has_no_name() -> None:
    known = machine()
    assert set(known) == {"system", "cpus", "memory_bytes", "processor", "gpus"}
    assert known["gpus"] >= 0
