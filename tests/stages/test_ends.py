"""What happens to a line when a process of it ends: it is told at once, and nothing is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from made import obedient

from lipass import LipassError, Stage, Stages
from lipass.stages import StageError

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
