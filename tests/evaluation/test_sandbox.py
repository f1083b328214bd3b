"""One test an attack: the host is untouched, nothing is left running, the verdict is right."""

import os
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.evaluation import confine, memory, sandbox
from fedtune.evaluation.memory import can_bound
from fedtune.evaluation.sandbox import CPP, JAVASCRIPT, PYTHON, Limits, Outcome, execute

needs_sandbox = pytest.mark.skipif(
    sandbox.engine() is None, reason=f"NO SANDBOX ON THIS MACHINE, ITS PROPERTIES ARE NOT TESTED: {sandbox.MISSING}"
)
pytestmark = [needs_sandbox, pytest.mark.xdist_group("sandbox")]


def _running(mark: str) -> list[str]:
    """Return processes of this machine whose command line has the mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if mark in text and str(os.getpid()) != path.parent.name:
            found.append(text)
    return found


def _survivors(mark: str, patience: float = 5.0) -> list[str]:
    """Return what still runs after the kernel has had time to take killed processes away."""
    deadline = time.monotonic() + patience
    while (left := _running(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> str:
    """The secret that the programs of this test are started with: it tells them from those of other tests."""
    made = os.urandom(16).hex()
    monkeypatch.setattr(sandbox.secrets, "token_hex", lambda size: made)
    return made


def test_a_right_program_passes_and_a_wrong_one_does_not() -> None:
    assert execute("def f(x):\n    return x + 1\nassert f(1) == 2", PYTHON) == Outcome("passed")
    assert execute("def f(x):\n    return x\nassert f(1) == 2", PYTHON).kind == "wrong"


def test_errors_are_told_from_wrong_answers_and_from_programs_that_do_not_compile() -> None:
    missing = execute("undefined_name", PYTHON)
    assert (missing.kind, missing.compiled) == ("error", True)
    assert "NameError" in missing.detail
    broken = execute("def f(:", PYTHON)
    assert (broken.kind, broken.compiled) == ("error", False)


def test_an_endless_loop_is_a_timeout() -> None:
    assert execute("while True: pass", PYTHON).kind == "timeout"


QUICK = replace(PYTHON, limits=Limits(0.5))


def test_a_limit_is_of_processor_time_so_that_a_busy_machine_fails_no_program() -> None:
    """A program that has to wait for the processor looks, to the clock, like one that sleeps."""
    assert execute("import time\ntime.sleep(0.8)\nassert True", QUICK).kind == "passed"
    assert execute("import time\ntime.sleep(600)", QUICK).kind == "timeout"
    assert execute("while True: pass", QUICK).kind == "timeout"
    stubborn = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert execute(stubborn, QUICK).kind in ("killed", "timeout")


def test_as_many_programs_run_at_a_time_as_the_process_has_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def pool(max_workers: int) -> ThreadPoolExecutor:
        asked.append(max_workers)
        return ThreadPoolExecutor(max_workers)

    monkeypatch.setattr(sandbox, "ThreadPoolExecutor", pool)
    monkeypatch.setattr(sandbox, "cores", lambda: 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert [o.kind for o in sandbox.execute_all([("assert f", "")], PYTHON)] == ["error"]
    assert asked == [3]


def test_a_fork_bomb_ends_at_the_limit_and_leaves_nothing(token: str) -> None:
    bomb = "import os, time\nmade = 0\nfor _ in range(1000):\n    try:\n        pid = os.fork()\n"
    bomb += "    except OSError:\n        break\n    if pid == 0:\n        time.sleep(30)\n        os._exit(0)\n    made += 1\n"
    ended = execute(bomb + "raise ValueError(f'made {made}')", PYTHON)
    assert ended.kind == "error"
    assert "made " in ended.detail
    assert int(ended.detail.rsplit("made ", 1)[1]) < PYTHON.limits.processes
    assert _survivors(token) == []


def test_two_gibibytes_are_not_to_be_had() -> None:
    assert execute("x = bytearray(3 * 2**30)", PYTHON).kind == "out-of-memory"


def test_two_hundred_megabytes_of_output_do_not_arrive() -> None:
    flood = "import sys\nfor _ in range(200):\n    sys.stdout.write('x' * 2**20)\n"
    assert execute(flood, PYTHON).kind in ("error", "killed", "timeout")


def test_etc_and_home_cannot_be_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    for path in ("/etc/passwd", "/etc/shadow", str(secret), str(Path.home() / ".bashrc")):
        ended = execute(f"open({path!r}).read()", PYTHON)
        assert ended.kind == "error", path
        assert "Error" in ended.detail


def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert (
        execute(
            "import os\nassert 'HF_TOKEN' not in os.environ\nassert set(os.environ) <= {'PATH', 'HOME', 'PWD', 'LC_CTYPE', 'PYTHONHASHSEED'}",
            PYTHON,
        ).kind
        == "passed"
    )


def test_a_listener_on_the_host_is_not_reached() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        reached: list[int] = []
        server.settimeout(4)

        def wait() -> None:
            try:
                server.accept()
                reached.append(1)
            except OSError:
                pass

        thread = threading.Thread(target=wait)
        thread.start()
        with socket.create_connection(("127.0.0.1", port), 2):
            thread.join()
        assert reached == [1]
        thread = threading.Thread(target=wait)
        thread.start()
        ended = execute(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)", PYTHON)
        thread.join()
    assert ended.kind == "error"
    assert reached == [1]


@pytest.mark.parametrize("path", ["/usr/fedtune-was-here", "/job/program.py", "/fedtune-was-here", "/dev/shm/x"])
def test_nothing_can_be_written_outside_its_own_tmp(path: str) -> None:
    assert execute(f"open({path!r}, 'w').write('x')", PYTHON).kind == "error"
    assert not Path("/usr/fedtune-was-here").exists()
    assert execute("open('/tmp/mine', 'w').write('x')\nassert open('/tmp/mine').read() == 'x'", PYTHON).kind == "passed"
    assert not Path("/tmp/mine").exists()


def test_its_own_tmp_is_small() -> None:
    fill = "for i in range(40):\n    open(f'/tmp/{i}', 'w').write('x' * 2**21)"
    ended = execute(fill, PYTHON)
    assert ended.kind == "error"
    assert "No space left" in ended.detail


SMALL = replace(PYTHON, limits=Limits(3.0, memory=256 * confine.MEBIBYTE))
FORKS = """
import os, time
kids = []
for _ in range(4):
    kid = os.fork()
    if kid == 0:
        held = bytearray(200 * 2**20)
        time.sleep(2)
        os._exit(0)
    kids.append(kid)
assert any(os.WIFSIGNALED(os.waitpid(kid, 0)[1]) for kid in kids), "nobody was stopped"
"""
SHARED = """
import ctypes
libc, n = ctypes.CDLL(None, use_errno=True), 64 * 2**20
libc.shmat.restype = ctypes.c_void_p
for _ in range(12):
    place = libc.shmat(libc.shmget(0, n, 0o1600), None, 0)
    ctypes.memset(place, 1, n)
    libc.shmdt(ctypes.c_void_p(place))
"""


@pytest.mark.skipif(not can_bound(), reason="this user may make no control group that bounds memory")
def test_all_processes_together_and_what_they_share_have_the_memory_of_one() -> None:
    assert execute(FORKS, SMALL).kind == "passed"
    assert execute(SHARED, SMALL).kind == "killed"
    assert execute("held = bytearray(200 * 2**20)", SMALL).kind == "passed"
    assert not list(Path("/sys/fs/cgroup").glob(f"**/fedtune-{os.getpid()}-*"))


@pytest.mark.skipif(not can_bound(), reason="this user may make no control group that bounds memory")
def test_the_empty_groups_of_who_was_killed_are_removed() -> None:
    parent = memory._parent()
    assert parent
    dead, own = parent / f"fedtune-{2**22 + 1}-x", parent / f"fedtune-{os.getpid()}-x"
    dead.mkdir()
    own.mkdir()
    try:
        memory._sweep(parent)
        assert (dead.exists(), own.exists()) == (False, True)
    finally:
        own.rmdir()


def test_without_a_control_group_programs_run_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_parent", lambda: None)
    assert execute("assert True", PYTHON) == Outcome("passed")


def test_a_compiler_has_the_same_small_tmp() -> None:
    """What is compiled is of a stranger: forty files of 4 MB, of which no limit of one file would stop any."""
    files = "for i in $(seq 40); do head -c 4000000 /dev/zero > /tmp/$i || { echo stopped at $i >&2; exit 7; }; done"
    language = replace(CPP, compile=("sh", "-c", files), tool="sh")
    ended = execute("int main() {}", language)
    assert "stopped at " in ended.detail
    assert int(ended.detail.rsplit(" ", 1)[1]) <= 17


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
def test_a_compiled_program_has_the_same_small_tmp() -> None:
    body = """#include <cstdio>
#include <string>
int main() {
    std::string block(4000000, 'x');
    for (int i = 0; i < 100; i++) {
        FILE *made = fopen(("/tmp/" + std::to_string(i)).c_str(), "wb");
        if (!made || fwrite(block.data(), 1, block.size(), made) != block.size() || fclose(made)) return fprintf(stderr, "stopped at %d", i), 7;
    }
    return 9;
}"""
    ended = execute(body, CPP)
    assert "stopped at " in ended.detail
    assert int(ended.detail.rsplit(" ", 1)[1]) < 17


@pytest.mark.parametrize(
    "cheat",
    [
        "import os\nos._exit(0)",
        "raise SystemExit",
        "import sys\nsys.exit(0)",
        "print('PASSED')\nprint('ok')\nimport os\nos._exit(0)",
    ],
)
def test_leaving_early_or_a_forged_message_does_not_pass(cheat: str) -> None:
    ended = execute(f"{cheat}\nassert False", PYTHON)
    assert ended == Outcome("wrong", "ended before its last assertion")


def test_a_child_that_detaches_dies_with_the_program(token: str) -> None:
    orphan = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(300)\n    os._exit(0)\n"
    assert execute(orphan, PYTHON).kind == "passed"
    assert _survivors(token) == []


def test_an_object_that_equals_everything_still_passes_a_known_limit() -> None:
    """The sandbox stops harm, not cheating: this is why verified scores need regenerated programs."""
    cheat = (
        "class Any:\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return Any()\nassert f(1) == 2"
    )
    assert execute(cheat, PYTHON).kind == "passed"


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
def test_javascript() -> None:
    head = "const assert = require('node:assert');\nfunction f(x) { return x + 1; }\n"
    assert execute(head + "assert.deepEqual(f(1), 2);", JAVASCRIPT).kind == "passed"
    assert execute(head + "assert.deepEqual(f(1), 3);", JAVASCRIPT).kind == "wrong"
    assert execute("process.exit(0);", JAVASCRIPT).kind == "wrong"
    assert execute("while (true) {}", JAVASCRIPT).kind == "timeout"
    assert execute("function f( {", JAVASCRIPT).compiled is False
    assert execute("require('fs').readFileSync('/etc/passwd')", JAVASCRIPT).kind == "error"


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
def test_cpp() -> None:
    from fedtune.evaluation.programs import assemble

    def run(body: str) -> Outcome:
        tests = f"#include <cstdio>\n#include <cassert>\n#include <cstdlib>\nint main() {{\n{body}\n}}\n"
        return execute(
            *assemble("int f(int x) { return x + 1; }", tests, "c++")[:1], CPP, assemble("", tests, "c++")[1]
        )

    assert run("assert(f(1) == 2);").kind == "passed"
    assert run("assert(f(1) == 3);").kind == "wrong"
    assert run("std::exit(0);").kind == "wrong"
    broken = run("int x = ;")
    assert (broken.kind, broken.compiled) == ("error", False)


def test_without_a_sandbox_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "engine", lambda: None)
    assert execute("x = 1", PYTHON).kind == "no-sandbox"
    with pytest.raises(sandbox.SandboxError, match="apt install bubblewrap"):
        sandbox.lacking(PYTHON)


def test_a_missing_tool_is_an_error_of_that_language_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "has_tool", lambda tool: tool != "node")
    assert sandbox.lacking(PYTHON) == ""
    with pytest.raises(sandbox.SandboxError, match="javascript programs need node"):
        list(sandbox.execute_all([], JAVASCRIPT))


def test_a_container_is_entered_with_nothing_it_does_not_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confine, "engine", lambda: "podman")
    words = confine.command(PYTHON.run, PYTHON.limits, True, tmp_path / "work")
    text = " ".join(words)
    for flag in (
        "--network none",
        "--read-only",
        "--cap-drop ALL",
        "--pull never",
        "--user 65534:65534",
        "--pids-limit 64",
    ):
        assert flag in text
    assert f"-v {tmp_path}/work:/job:ro" in text
    assert f"--tmpfs /tmp:rw,exec,nosuid,mode=1777,size={confine.TMP_BYTES}" in text
    after = words[words.index(confine.IMAGE) + 1 :]
    assert after[:4] == ["timeout", "-s", "KILL", "32"]
    assert after[-4:] == ["python3", "-B", "/job/runner.py", "{token}"]
