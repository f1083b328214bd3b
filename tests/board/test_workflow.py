"""The workflow's own shell blocks, run against scratch repositories: what a pull request and a merge really do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtune.board.store import read_entry
from fedtune.io import read_json, write_json

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.xdist_group("submission")
AS = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
ENVIRONMENT = {**os.environ, **AS, "PYTHONPATH": str(ROOT / "src"), "GIT_CONFIG_GLOBAL": "/dev/null"}


def workflow() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / ".github/workflows/board.yml").read_text()))


def block(job: str, step: str) -> str:
    return next(str(s["run"]) for s in workflow()["jobs"][job]["steps"] if s.get("id") == step)


def sh(where: Path, script: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a script as the runner does: bash -e."""
    environment = {**ENVIRONMENT, **extra}
    return subprocess.run(
        ["bash", "-e", "-c", script], cwd=where, env=environment, capture_output=True, text=True, check=False
    )


def git(where: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=where, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tool(where: Path) -> None:
    """Put the command where the workflow installs it."""
    path = where / ".venv/bin/fedtune"
    path.parent.mkdir(parents=True)
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -m fedtune "$@"\n')
    path.chmod(0o755)


class Place:
    """A bare repository as on the server, and clones of it as on runners and at people's."""

    def __init__(self, root: Path) -> None:
        self.root, self.remote, self.count = root, root / "remote.git", 0
        git(root, "init", "-q", "--bare", "-b", "main", str(self.remote))
        first = self.clone()
        for name in ("submissions", "results"):
            (first / name).mkdir()
            shutil.copy(ROOT / name / "README.md", first / name / "README.md")
        shutil.copy(ROOT / ".gitattributes", first)
        (first / ".gitignore").write_text(".venv/\nsite/\n")
        self.push(first, "main")

    def clone(self, name: str = "") -> Path:
        self.count += 1
        path = self.root / (name or f"clone-{self.count}")
        git(self.root, "clone", "-q", str(self.remote), str(path))
        git(path, "checkout", "-q", "-B", "main")
        return path

    def push(self, clone: Path, branch: str) -> None:
        git(clone, "add", "-A")
        git(clone, "commit", "-qm", "change")
        git(clone, "push", "-q", "origin", f"HEAD:{branch}")

    def pull_request(self, change: Any) -> subprocess.CompletedProcess[str]:
        """Make a change on a branch, and run what the workflow runs for a pull request with it."""
        change(author := self.clone())
        self.push(author, f"pr-{self.count}")
        return self.checked(f"pr-{self.count}")

    def checked(self, branch: str) -> subprocess.CompletedProcess[str]:
        """Run what the workflow runs for a pull request of a branch."""
        self.count += 1
        runner = self.root / f"runner-{self.count}"
        runner.mkdir()
        tool(runner)
        git(runner, "clone", "-q", "-b", "main", str(self.remote), "trusted")
        git(runner, "clone", "-q", "-b", branch, str(self.remote), "proposed")
        return sh(runner, block("validate", "check"), GITHUB_BASE_REF="main")

    def publish(self, runner: Path | None = None) -> tuple[Path, list[subprocess.CompletedProcess[str]]]:
        """Run what the workflow runs after a merge."""
        runner = runner or self.clone()
        tool(runner)
        steps = [sh(runner, block("publish", s), REMOTE=str(self.remote)) for s in ("add", "commit", "build")]
        return runner, steps

    def log(self) -> list[str]:
        return git(self.root, "--git-dir", str(self.remote), "log", "--format=%s", "main").splitlines()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def submit(good: Path, name: str = "a-team") -> Any:
    return lambda clone: shutil.copytree(good, clone / "submissions" / name)


def spoil(clone: Path) -> None:
    path = next((clone / "submissions").rglob("rounds.jsonl"))
    path.write_text(path.read_text() + "\n")


def test_only_one_job_may_write_and_no_action_moves() -> None:
    found = workflow()
    assert found["permissions"] == {"contents": "read"}
    assert "permissions" not in found["jobs"]["validate"]
    assert "pull_request_target" not in found[True]
    steps = [s for job in found["jobs"].values() for s in job["steps"]]
    pinned = [s["uses"].split("@")[1] for s in steps if "uses" in s]
    assert all(len(sha) == 40 for sha in pinned)
    assert all(s["with"]["persist-credentials"] is False for s in steps if "checkout@" in s.get("uses", ""))
    # a text that came from outside is never part of a script
    assert not [s["run"] for s in steps if "${{" in s.get("run", "")]


def test_a_pull_request_is_checked_by_what_it_changes(place: Place, good: Path) -> None:
    def readme(clone: Path) -> None:
        (clone / "submissions/README.md").write_text("# Better words\n")

    assert place.pull_request(readme).returncode == 0
    done = place.pull_request(submit(good, "odd name;$(touch owned) 'x'"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": good") == 2
    assert done.stdout.startswith("::stop-commands::")
    assert not list(place.root.rglob("owned"))

    def bad(clone: Path) -> None:
        submit(good)(clone)
        spoil(clone)

    refused = place.pull_request(bad)
    assert refused.returncode == 1
    assert "rounds.jsonl: is not the file that was listed" in refused.stdout


def test_from_a_merge_to_the_page_and_a_flag_that_stays(place: Place, good: Path) -> None:
    # nothing handed in yet: an empty page, no commit
    runner, steps = place.publish()
    assert [s.returncode for s in steps] == [0, 0, 0], [s.stderr for s in steps]
    assert (runner / "site/index.html").exists()
    assert place.log() == ["change"]

    # one good and one spoilt submission: the good one is published all the same
    merged = place.clone()
    submit(good)(merged)
    (merged / "submissions/b-team").mkdir()
    (merged / "submissions/b-team/entry.json").write_text("{")
    place.push(merged, "main")
    runner, steps = place.publish()
    assert [s.returncode for s in steps] == [0, 0, 0], [s.stderr for s in steps]
    assert "refused: 1 of 1 submission" in steps[0].stderr
    assert place.log() == ["Entries of what was merged", "change", "change"]
    seeds = sorted(place.clone("seen").rglob("results/**/seed-*.json"))
    assert [read_entry(p).state for p in seeds] == ["re-scored", "re-scored"]

    # a maintainer flags one by pull request: taken; anything more than a flag: refused
    name = str(seeds[0].relative_to(place.root / "seen"))

    def flag(clone: Path) -> None:
        sh(clone, f'{sys.executable} -m fedtune board flag "{name}" --reason "trained on the test set"')

    def better(clone: Path) -> None:
        document = read_json(clone / name)
        document["arms"][-1]["scores"][0]["score"] = 1.0
        write_json(clone / name, document)

    assert place.pull_request(flag).returncode == 0
    refused = place.pull_request(better)
    assert refused.returncode == 1
    assert "differs in more than its flag" in refused.stderr

    # merged, the flag stays whatever is published later
    merged = place.clone()
    flag(merged)
    place.push(merged, "main")
    runner, steps = place.publish()
    assert [s.returncode for s in steps] == [0, 0, 0], [s.stderr for s in steps]
    assert read_entry(runner / name).state == "flagged"
    assert "trained on the test set" in (runner / "site/board.json").read_text()


def test_a_submission_that_is_cut_off_keeps_no_other_from_being_committed(place: Place) -> None:
    merged = place.clone()
    for name in ("a-killed", "a-slow", "b-good", "c-refused"):
        (merged / "submissions" / name).mkdir()
        (merged / "submissions" / name / "entry.json").write_text("{}")
    place.push(merged, "main")
    runner = place.clone()
    tool(runner)
    # each as it would end: cut off by timeout(1), put into the store, refused
    ends = 'case "$6" in *a-killed) exit 137;; *a-slow) exit 124;; *c-refused) exit 4;; esac; echo "{}" > "results/${6##*/}.json"'
    (runner / ".venv/bin/fedtune").write_text(f"#!/bin/sh\n{ends}\n")
    steps = [sh(runner, block("publish", s), REMOTE=str(place.remote)) for s in ("add", "commit")]
    assert [s.returncode for s in steps] == [0, 0], [s.stdout + s.stderr for s in steps]
    assert "timeout 45m .venv/bin/fedtune board add" in block("publish", "add")
    assert [p.name for p in sorted((place.clone("seen") / "results").glob("*.json"))] == ["b-good.json"]
    # any other end is none of a submission's, and stops the job
    (runner / ".venv/bin/fedtune").write_text("#!/bin/sh\nexit 1\n")
    assert sh(runner, block("publish", "add")).returncode == 1


def test_what_was_tried_before_comes_last_and_begins_elsewhere_each_time(place: Place) -> None:
    merged = place.clone()
    for name in ("a-slow", "b-slow", "c-honest"):
        (merged / "submissions" / name).mkdir()
        (merged / "submissions" / name / "entry.json").write_text(name)
    place.push(merged, "main")
    runner = place.clone()
    tool(runner)
    (runner / ".venv/bin/fedtune").write_text('#!/bin/sh\necho "tried ${6##*/}"\nexit 124\n')
    # time for two, and then the same push after push
    script = block("publish", "add").replace('"$SECONDS" -gt 3000', '"$(wc -l < done)" -ge 2')
    script = script.replace("timeout 45m", "echo >> done; timeout 45m")

    def tried(number: int) -> list[str]:
        (runner / "done").write_text("")
        done = sh(runner, script, GITHUB_RUN_NUMBER=str(number))
        assert done.returncode == 0, done.stderr
        return [line[6:] for line in done.stdout.splitlines() if line.startswith("tried ")]

    assert tried(1) == ["a-slow", "b-slow"]
    assert tried(2) == ["c-honest", "a-slow"]
    assert [tried(n)[0] for n in (3, 4, 5)] == ["a-slow", "b-slow", "c-honest"]
    # another content is another submission
    (runner / "submissions/b-slow/entry.json").write_text("mended")
    git(runner, "commit", "-qam", "change")
    assert tried(3)[0] == "b-slow"


def test_two_publishers_at_once_lose_nothing(place: Place, good: Path) -> None:
    merged = place.clone()
    submit(good)(merged)
    place.push(merged, "main")
    slow = place.clone("slow")
    # while the slow one works, somebody else pushes to main
    other = place.clone()
    (other / "submissions/README.md").write_text("# New words\n")
    place.push(other, "main")
    _, steps = place.publish(slow)
    assert [s.returncode for s in steps] == [0, 0, 0], [s.stderr for s in steps]
    end = place.clone("end")
    assert len(list(end.rglob("results/**/seed-*.json"))) == 2
    assert (end / "submissions/README.md").read_text() == "# New words\n"


def test_a_pull_request_answers_for_its_own_changes_only(place: Place, good: Path) -> None:
    author = place.clone()
    (author / "submissions/README.md").write_text("# Better words\n")
    place.push(author, "slow")
    # meanwhile main publishes another's entries, under a name that begins with a dot
    merged = place.clone()
    submit(good, ".a-team")(merged)
    place.push(merged, "main")
    _, steps = place.publish()
    assert [s.returncode for s in steps] == [0, 0, 0], [s.stderr for s in steps]
    assert len(list(place.clone("seen").rglob("results/**/seed-*.json"))) == 2
    done = place.checked("slow")
    assert done.returncode == 0, done.stdout + done.stderr

    def elsewhere(clone: Path) -> None:
        shutil.move(clone / "results", clone / "elsewhere")
        (clone / "results").symlink_to("elsewhere", target_is_directory=True)

    refused = place.pull_request(elsewhere)
    assert refused.returncode == 1
    assert "results: is a link" in refused.stderr
