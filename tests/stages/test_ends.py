"""What happens to a line when a process of it ends: it is told at once, and nothing is left."""

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from made import obedient

from lipass import LipassError, LipassWarning, Stage, Stages
from lipass.stages import StageError, processes

WITHIN_S = 2.0


def is_there(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def wait_until(done, within_s=20.0):
    until = time.monotonic() + within_s
    while not done() and time.monotonic() < until:
        time.sleep(0.02)
    return done()


def test_a_killed_stage_is_told_and_the_others_are_closed(tmp_path):
    first, second = obedient("first", closes=str(tmp_path / "closed")) + obedient("second")
    stages = Stages([first, second], apart=True)
    (found,) = stages.run([{}])
    one, other = (process for _, process, _ in found["trace"])
    stages.put({"second": {"sleep": 60.0}})
    stages.put({})
    time.sleep(0.2)
    killed = time.monotonic()
    os.kill(other, signal.SIGKILL)
    with pytest.raises(
        LipassError, match=r"got stage 'second' ended by SIGKILL with 2 items"
    ) as e:
        stages.get()
    assert time.monotonic() - killed < WITHIN_S
    assert "make the stages anew; where nobody killed it, memory ran out" in str(e.value)
    for call in (stages.get, stages.forget, lambda: stages.put({})):
        with pytest.raises(LipassError, match="'second' ended by SIGKILL"):
            call()
    stages.close()
    assert (tmp_path / "closed").read_text() == str(one)
    assert not is_there(one)


def test_who_waits_for_room_is_told_too():
    stages = Stages(obedient("only"), apart=True)
    (found,) = stages.run([{}])
    for n in range(2):
        stages.put({"only": {"sleep": 60.0 - n}})
    (_, process, _) = found["trace"][0]
    os.kill(process, signal.SIGKILL)
    killed = time.monotonic()
    with pytest.raises(LipassError, match="'only' ended by SIGKILL"):
        list(stages.run({} for _ in range(9)))
    assert time.monotonic() - killed < WITHIN_S
    stages.close()


@pytest.mark.parametrize(
    ("make", "kind", "says"),
    [
        ("made:unmade", StageError, "got FileNotFoundError from stage 'only'.*weights/none"),
        ("made:Gone", StageError, "got AttributeError from stage 'only'"),
        ("made:ends_at_once", LipassError, "'only' ended by exit code 7 with 0 items under way"),
    ],
)
def test_a_stage_that_cannot_begin_is_told(make, kind, says):
    with pytest.raises(kind, match=f"(?s){says}"):
        Stages([Stage("only", make)], apart=True)


@pytest.mark.parametrize("first", ["made:Slow", "made:Obedient"])
def test_why_a_stage_could_not_be_made_is_told_while_an_earlier_one_is_loading(first):
    options = {"seconds": 60.0} if first == "made:Slow" else {"name": "first"}
    began = time.monotonic()
    with pytest.raises(StageError, match=r"(?s)FileNotFoundError from stage 'last'.*weights/none"):
        Stages([Stage("first", first, options), Stage("last", "made:unmade")], apart=True)
    assert time.monotonic() - began < 50.0


def test_what_the_close_of_a_stage_apart_raises_is_told():
    said = "(?s)got OSError from stage 'first'.*the disk is full"
    line = [*obedient("first", closes="raise"), *obedient("second")]
    with pytest.raises(StageError, match=said), Stages(line, apart=True):
        pass


@pytest.fixture
def slow(tmp_path, monkeypatch):
    """Make a line of a stage that takes long to close, and leaves a mark when it has."""
    monkeypatch.setattr(processes, "_ASKED_S", 0.3)
    lines = []

    def made(close_seconds):
        options = {"close_seconds": close_seconds, "closed": str(tmp_path / "closed")}
        lines.append(Stages([Stage("slow", "made:Slow", options, threads=1)], apart=True))
        return lines[-1]

    yield made
    assert not any(one.process.is_alive() for line in lines for one in line._line._ranks)


def test_a_stage_that_takes_long_to_close_is_waited_for(slow, tmp_path):
    with slow(2.0) as stages:
        assert list(stages.run([0.0])) == [0.0]
    assert (tmp_path / "closed").exists()


def test_a_stage_that_takes_longer_to_close_than_it_may_is_named(slow, tmp_path):
    stages = slow(60.0)
    began = time.monotonic()
    with pytest.warns(LipassWarning, match="got 'slow' in its close, ended by force; ask"):
        stages.close(timeout_s=0.5)
    assert time.monotonic() - began < 20.0
    assert not (tmp_path / "closed").exists()


@pytest.mark.parametrize("timeout_s", [None, 0.5])
def test_a_stage_that_goes_on_with_its_item_is_named(slow, tmp_path, timeout_s):
    stages = slow(0.0)
    stages.put(60.0)
    time.sleep(0.2)
    with pytest.warns(LipassWarning, match="got 'slow' at an item, ended by force"):
        stages.close(timeout_s=timeout_s)
    assert not (tmp_path / "closed").exists()


def test_who_gives_time_has_items_finished(slow, tmp_path):
    stages = slow(0.0)
    stages.put(1.0)
    time.sleep(0.2)
    stages.close(timeout_s=60.0)
    assert (tmp_path / "closed").exists()


def test_a_failed_line_that_is_closing_is_given_less_time():
    """The others are closed at once where one has ended; who then closes the line may hurry."""
    line = [Stage("slow", "made:Slow", {"close_seconds": 60.0}, threads=1), *obedient("other")]
    stages = Stages(line, apart=True)
    os.kill(stages._line._ranks[1].process.pid, signal.SIGKILL)
    with pytest.raises(LipassError, match="'other' ended by SIGKILL"):
        stages.get(timeout_s=20.0)
    time.sleep(0.5)
    with warnings.catch_warnings():  # told by the thread that waits for it
        warnings.simplefilter("ignore", LipassWarning)
        stages.close(timeout_s=0.5)


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from lipass import Stage, Stages

def main():
    line = [Stage(n, "made:Obedient", {{"name": n, "closes": {closed!r} + n}}, threads=1)
            for n in ("first", "second")]
    stages = Stages(line, apart=True)
    (found,) = stages.run([{{}}])
    print(*(process for _, process, _ in found["trace"]), flush=True)
    {then}

{guard}main()
"""


def script(tmp_path, then="time.sleep(600)", guard='if __name__ == "__main__": '):
    path = tmp_path / "script.py"
    tests, closed = str(Path(__file__).parent), str(tmp_path / "closed-")
    path.write_text(SCRIPT.format(tests=tests, closed=closed, then=then, guard=guard))
    return subprocess.Popen(
        [sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_stages_end_cleanly_when_their_caller_is_killed(tmp_path):
    with script(tmp_path) as caller:
        processes = [int(one) for one in caller.stdout.readline().split()]
        caller.kill()
    assert len(processes) == 2
    assert wait_until(lambda: not any(map(is_there, processes)))
    assert {one.name for one in tmp_path.glob("closed-*")} == {"closed-first", "closed-second"}


def test_a_script_that_forgets_to_close_ends_all_the_same(tmp_path):
    with script(tmp_path, then="pass") as caller:
        out, errors = caller.communicate(timeout=100)
    assert caller.returncode == 0, errors
    assert errors == ""
    assert not any(is_there(int(one)) for one in out.split())
    assert len(list(tmp_path.glob("closed-*"))) == 2


def test_a_script_without_its_guard_is_told_of_it(tmp_path):
    with script(tmp_path, guard="") as caller:
        _, errors = caller.communicate(timeout=100)
    assert caller.returncode == 1
    assert "must do so under `if __name__ == '__main__':`" in errors
