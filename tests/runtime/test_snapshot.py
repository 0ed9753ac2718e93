"""A resumed session goes on to the bit, a fork goes its own way, and wrong files say why."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import lipass
from lipass.errors import LipassError, LipassWarning
from lipass.kernels import registry
from lipass.kernels.merge.running import MergeRule
from lipass.passes.graph.marks import StepInputs
from lipass.policy.steering import POLICIES
from lipass.policy.trajectory import parse_trajectory
from lipass.receipt import current_report, reset_report
from lipass.runtime import told
from lipass.runtime.snapshot import mark_of
from lipass.runtime.steering_scores import SteeringScores
from lipass.runtime.tree_file import from_bytes, to_bytes
from lipass.runtime.written_slots import Placed
from lipass.session import Session, current_step

SIGMAS = (1.0, 0.9375, 0.8333, 0.625, 0.0)
WAY_BACK = parse_trajectory("left-15, right-16")  # chunks 0-3 out, 4-7 back
CHUNKS = len(WAY_BACK) // 4


@pytest.fixture(autouse=True)
def _fresh_report():
    reset_report()


class Guarded:
    """A toy model behind the guard that a compiled unit uses."""

    inputs = StepInputs(("x", "sigma"), (), (), levels=(1,), latents=(0,))

    def __call__(self, x, sigma):
        step = current_step()
        args = (x, sigma)
        return (
            self.compute(args)
            if step is None
            else step.call(self, self.inputs, args, self.compute)
        )

    def compute(self, args):
        x, sigma = args
        return 0.5 * x * x - sigma * x


def go_on(session, latents, chunks, seed=0, poses=WAY_BACK, stream="main"):
    """Generate chunks behind `latents [M, 3]`; returns all of them, and the plans."""
    plans = []
    for index in chunks:
        generator = torch.Generator().manual_seed(1000 * seed + index)
        x = torch.randn(4, 3, generator=generator)
        start = 4 * index
        with session.chunk(
            poses=poses[:start] if start else None, query=poses[start : start + 4],
            latents=latents if start else None, stream=stream,
        ) as chunk:  # fmt: skip
            for step in chunk.steps(SIGMAS):
                with step:
                    x = x + (step.sigma_next - step.sigma) * MODEL(x, step.sigma)
        latents = torch.cat([latents, x.sin()])
        plans.append(chunk.plan.to_json())
    return latents, plans


MODEL = Guarded()
NOTHING = torch.empty(0, 3)


def through_a_file(snapshot):
    return lipass.Snapshot.from_bytes(snapshot.to_bytes())


@pytest.mark.parametrize("cut", [0, 1, 3, 5, 7])
@pytest.mark.parametrize("options", [{}, {"steps.form": "lookup", "context.window_chunks_max": 2}])
def test_resumed_session_goes_on_to_the_bit(cut, options):
    with Session(preset="all", **options) as session:
        whole, plans = go_on(session, NOTHING, range(CHUNKS))
    with Session(preset="all", **options) as session:
        latents, before = go_on(session, NOTHING, range(cut))
        snapshot = through_a_file(session.snapshot(carry={"latents": latents}))
    with Session.resume(snapshot) as session:
        resumed, after = go_on(session, snapshot.carried["latents"], range(cut, CHUNKS))
    assert torch.equal(resumed, whole)
    assert before + after == plans


def test_fork_goes_its_own_way_and_its_parent_does_not_notice():
    with Session(preset="all") as session:
        whole, plans = go_on(session, NOTHING, range(CHUNKS))
    aside = torch.cat([WAY_BACK[:20], parse_trajectory("w-20, right-8", step_m=0.3)[1:]])
    with Session(preset="all") as session:
        latents, before = go_on(session, NOTHING, range(5))
        with session.fork() as fork:
            other, elsewhere = go_on(fork, latents, range(5, 8), seed=7, poses=aside)
            mine, after = go_on(session, latents, range(5, 6))
            go_on(fork, other, range(8, 10), seed=7, poses=aside)
        mine, last = go_on(session, mine, range(6, CHUNKS))
    assert torch.equal(mine, whole)
    assert before + after + last == plans
    assert elsewhere != plans[5:8]
    assert not torch.equal(other[20:], whole[20 : len(other)])


def test_streams_keep_their_turns():
    with Session(preset="exact") as session:
        go_on(session, NOTHING, range(2), stream="a")
        go_on(session, NOTHING, range(3), stream="b")
        snapshot = through_a_file(session.snapshot())
    with Session.resume(snapshot) as session:
        with pytest.raises(ValueError, match="must not become shorter"):
            session.chunk(poses=WAY_BACK[:4], query=WAY_BACK[4:8], stream="b")
        _, plans = go_on(session, NOTHING.new_ones(8, 3), range(2, 3), stream="a")
    assert [json.loads(plan)["index"] for plan in plans] == [2]


def test_receipt_of_a_resumed_session_has_all_its_chunks():
    with Session(preset="all") as session:
        go_on(session, NOTHING, range(3))
        snapshot = session.snapshot()
    reset_report()
    with Session.resume(through_a_file(snapshot)) as session:
        go_on(session, NOTHING.new_ones(12, 3), range(3, 5))
        assert [one.plan.index for one in current_report().chunks] == [0, 1, 2, 3, 4]
        assert {one.session for one in current_report().chunks} == {session.number}
        again = session.snapshot()
    assert [plan.to_json() for plan in again.plans[:3]] == [p.to_json() for p in snapshot.plans]
    assert "session  chunk" in lipass.report().table()


def test_recorded_plans_go_on():
    with Session(preset="all") as session:
        whole, _ = go_on(session, NOTHING, range(CHUNKS))
        plans = session.snapshot().plans
    with Session.replay(plans) as session:
        latents, _ = go_on(session, NOTHING, range(4))
        snapshot = through_a_file(session.snapshot())
    with Session.resume(snapshot) as session:
        latents, _ = go_on(session, latents, range(4, CHUNKS))
    assert torch.equal(latents, whole)


def test_what_was_told_is_not_told_again_and_what_was_counted_counts():
    still = WAY_BACK[:1].expand(40, 4, 4)

    def trial(session, chunks):
        for index in chunks:
            with session.chunk(poses=still[: 4 * index] if index else None, query=still[:4]):
                pass

    session = Session(preset="cache")
    trial(session, range(3))
    snapshot = through_a_file(session.snapshot())
    session.effect.told = True
    session.close()
    resumed = Session.resume(snapshot)
    trial(resumed, range(3, 5))
    with pytest.warns(LipassWarning, match="left nothing out in 4 chunks"):
        resumed.close()


def test_cameras_that_were_told_of_are_not_told_of_again():
    # Written camera to world, and said to be the other way round.
    walk = torch.linalg.inv(parse_trajectory(", ".join(["w-8, right-10, w-8, left-20"] * 2)))
    options = {"preset": "context", "context.chunk_latents": 4}

    def trial(session, chunks):
        for index in chunks:
            start = 4 * index
            with session.chunk(
                poses=walk[:start] if start else None, query=walk[start : start + 4]
            ):
                pass

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with Session(**options) as whole:
            trial(whole, range(23))
    assert len(told) == 1
    for cut in (8, 22):
        with warnings.catch_warnings(record=True) as again:
            warnings.simplefilter("always")
            with Session(**options) as session:
                trial(session, range(cut))
                snapshot = through_a_file(session.snapshot())
            with Session.resume(snapshot) as session:
                trial(session, range(cut, 23))
        assert [str(one.message) for one in again] == [str(one.message) for one in told]


RULE = MergeRule(0.8, 40, 6, 6, 12)


def cache(count):
    """Keys and values of `count` chunks that look alike; of many, old ones are lost."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(1, 2, 6, 8, generator=generator).repeat(1, 1, 2, 1)
    k = [base + 0.2 * torch.randn(1, 2, 12, 8, generator=generator) for _ in range(count)]
    v = [torch.randn(1, 2, 12, 8, generator=generator).bfloat16() for _ in range(count)]
    kept = [0, *range(max(1, count - 4), count)]
    return torch.cat([k[i] for i in kept], 2), torch.cat([v[i] for i in kept], 2)


def merged(session, count, stream="main"):
    k, v = cache(count)
    q = torch.randn(1, 2, 20, 8, generator=torch.Generator().manual_seed(count))
    with session.histories.answering(stream):
        return registry.answer_of("merge_history")(q, k, v, 0.3, RULE, "blocks.0")


@pytest.mark.parametrize("cut", [1, 4, 6, 8])
def test_merged_memory_goes_on_to_the_bit(cut):
    with Session(preset="exact") as session:
        whole = [merged(session, count) for count in range(1, 10)][-1]
        counts = session.histories.anew, session.histories.added
    with Session(preset="exact") as session:
        for count in range(1, cut + 1):
            merged(session, count)
        snapshot = through_a_file(session.snapshot())
        with session.fork() as fork:  # what it adds is not added here
            merged(fork, cut + 1)
        for count in range(cut + 1, 10):
            mine = merged(session, count)
    with Session.resume(through_a_file(Session.resume(snapshot).snapshot())) as session:
        merged(session, cut)  # the same history once more
        for count in range(cut + 1, 10):
            found = merged(session, count)
        assert (session.histories.anew, session.histories.added) == counts
    assert all(map(torch.equal, found, whole))
    assert all(map(torch.equal, mine, whole))


def test_slots_that_were_written_are_remembered():
    placed = Placed(8, ((0, 2), (4, 8)), 2, False)
    with Session(preset="exact") as session:
        session.written.add("main", 4, Placed(8, ((2, 8),), 0, False), 8)
        snapshot = through_a_file(session.snapshot())
    with Session.resume(snapshot) as session:
        assert "latent 8 was written to place 0" in session.written.why_not(
            "main", 5, placed, [4, 5, 6, 7, 8, 9]
        )


def test_another_process_goes_on(tmp_path):
    torch.manual_seed(0)
    with Session(preset="all") as session:
        whole, _ = go_on(session, NOTHING, range(7))
    with Session(preset="all") as session:
        latents, _ = go_on(session, NOTHING, range(5))
        session.snapshot(carry={"latents": latents, "seed": 0}).save(tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    code = (
        f"import sys; sys.path.insert(0, {str(sys.path[0])!r})\n"
        f"import importlib.util, torch, lipass\n"
        f"spec = importlib.util.spec_from_file_location('own', {__file__!r})\n"
        "own = importlib.util.module_from_spec(spec); spec.loader.exec_module(own)\n"
        f"snapshot = lipass.Snapshot.load({str(tmp_path / 'a.safetensors')!r})\n"
        "with lipass.Session.resume(snapshot) as session:\n"
        "    got, _ = own.go_on(session, snapshot.carried['latents'], range(5, 7))\n"
        f"torch.save(got, {str(tmp_path / 'b.pt')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "b.pt"), whole)


def test_carried_things_come_back_and_are_copies():
    w2c = torch.eye(4).expand(2, 4, 4)
    carry = {
        "seed": 7, "text": "fog", "w2c": w2c, "half": torch.ones(3, dtype=torch.bfloat16),
        "many": [{"flag": True, "none": None}, (1, 2.5)], "none": torch.empty(0, 3),
        "mask": torch.tensor([True, False]), "count": torch.tensor(5),
    }  # fmt: skip
    with Session(preset="off") as session:
        snapshot = session.snapshot(carry=carry)
    back = through_a_file(snapshot).carried
    assert back["many"] == [{"flag": True, "none": None}, [1, 2.5]]
    assert (back["seed"], back["text"]) == (7, "fog")
    for name in ("w2c", "half", "none", "mask", "count"):
        assert torch.equal(back[name], carry[name])
        assert back[name].dtype == carry[name].dtype
    carry["half"].zero_()
    assert snapshot.carried["half"].sum() == 3


@pytest.mark.parametrize("filed", [False, True])
def test_what_a_branch_writes_reaches_neither_another_nor_the_snapshot(filed):
    """A snapshot is a point to come back to, as often as one likes."""
    carry = {"history": torch.zeros(3), "cache": {"k": [torch.zeros(2)]}}
    with Session(preset="off") as session:
        session.steer([torch.zeros(1, 2, 3)])
        snapshot = session.snapshot(carry=carry)
    snapshot = through_a_file(snapshot) if filed else snapshot
    for _ in range(2):
        with Session.resume(snapshot) as session, session.chunk(query=WAY_BACK[:4]) as chunk:
            for tensor in (
                snapshot.carried["history"], snapshot.carried["cache"]["k"][0], chunk.text[0],
            ):  # fmt: skip
                assert tensor.sum() == 0
                tensor += 1
    assert through_a_file(snapshot).carried["history"].sum() == 0
    assert dict(snapshot.carried).keys() == carry.keys()


@pytest.mark.parametrize(
    ("carry", "error", "words"),
    [
        ({"model": nn.Linear(1, 1)}, TypeError, "must be plain data, got Linear"),
        ({"f": [0, print]}, TypeError, r"carry\['f'\]\[1\] must be plain data, got builtin"),
        ({1: 2}, TypeError, "names in carry must be strings, got 1; write '1'"),
        ({"x": float("nan")}, ValueError, r"carry\['x'\] must be finite, got nan"),
        ({"$tensor": 0}, ValueError, "must not be '\\$tensor'"),
        ({"x": torch.empty(1, device="meta")}, ValueError, "must hold values"),
    ],
)  # fmt: skip
def test_what_cannot_be_carried_is_refused(carry, error, words):
    with Session(preset="off") as session, pytest.raises(error, match=words):
        session.snapshot(carry=carry)


def test_snapshot_is_taken_between_chunks_of_an_open_session():
    session = Session(preset="all")
    with session, session.chunk(query=WAY_BACK[:4]):
        for take in (session.snapshot, session.fork):
            with pytest.raises(LipassError, match="between two chunks, got an open one, 0 of 'ma"):
                take()
    with pytest.raises(LipassError, match="of an open session, got a closed one"):
        session.snapshot()


def test_other_options_are_refused_and_named():
    with Session(preset="all", **{"context.memory_latents": 8}) as session:
        snapshot = through_a_file(session.snapshot())
    same = {"preset": "all", "context.memory_latents": 8, "inner": "eager"}
    assert Session.resume(snapshot, **same).config.inner == "eager"
    assert Session.resume(snapshot, lipass.Config.resolve(None, same)).config.inner == "eager"
    with pytest.raises(ValueError, match=r"got context\.memory_latents 4 for 8; leave them out"):
        Session.resume(snapshot, **{**same, "context.memory_latents": 4})
    with pytest.raises(ValueError, match="steps False for True"):
        Session.resume(snapshot, preset="context", **{"context.memory_latents": 8})
    with pytest.raises(TypeError, match="a config or options, got both"):
        Session.resume(snapshot, lipass.Config.resolve("all"), preset="all")
    with pytest.raises(TypeError, match=r"Session.resume\(lipass.Snapshot.load\(path\)\)"):
        Session.resume("session.safetensors")


def test_another_model_is_refused():
    torch.manual_seed(0)
    model, other = nn.Linear(4, 3), nn.Linear(4, 3)
    with Session(preset="all") as session:
        snapshot = through_a_file(session.snapshot(model=model))
        unmarked = session.snapshot()
    Session.resume(snapshot, model=model)
    Session.resume(snapshot, model=torch.compile(model, backend="eager"))
    Session.resume(snapshot)
    with pytest.raises(ValueError, match="got Linear with 2 tensors and other shapes or weights"):
        Session.resume(snapshot, model=other)
    with pytest.raises(ValueError, match="got Sequential with 2 tensors for Linear with 2"):
        Session.resume(snapshot, model=nn.Sequential(model))
    with pytest.raises(ValueError, match="must have the mark of a model"):
        Session.resume(unmarked, model=model)
    with torch.no_grad():
        model.weight.add_(1)
    with pytest.raises(ValueError, match="other shapes or weights"):
        Session.resume(snapshot, model=model)


class Elsewhere(torch.Tensor):
    """Says that it lies on another device."""

    device = torch.device("cuda:1")


def test_the_same_model_over_several_devices_is_no_other_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    before = mark_of(model)
    for kept in (model[0]._parameters, model[1]._buffers):
        for name, tensor in kept.items():
            kept[name] = tensor.detach().as_subclass(Elsewhere)
    devices = [tensor.device for _, tensor in (*model.named_parameters(), *model.named_buffers())]
    assert len(set(devices)) == 2
    assert mark_of(model) == before


@pytest.fixture(scope="module")
def written():
    with Session(preset="exact") as session:
        merged(session, 3)
        return session.snapshot().to_bytes()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda data: b"", "0 bytes that are none"),
        (lambda data: b"PK\x03\x04 no such file", "that are none"),
        (lambda data: b"\xff" * 64, "that are none"),
        (lambda data: data[:-1], "has changed or was cut"),
        (lambda data: data[: len(data) // 2], "has changed or was cut"),
        (lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "has changed or was cut"),
        (lambda data: data.replace(b"main", b"mail"), "has changed or was cut"),
        (lambda data: to_bytes({}, "lipass.session", 9), "must have version 1, got '9'"),
        (
            lambda data: to_bytes({}, "another", 1),
            "must be of kind 'lipass.session', got 'another'",
        ),
    ],
)
def test_file_that_is_none_says_why(written, spoil, words):
    with pytest.raises(ValueError, match=words):
        lipass.Snapshot.from_bytes(spoil(written))


def test_nothing_in_a_file_is_code(written):
    assert b"pickle" not in written
    assert from_bytes(written, "lipass.session", 1)["options"]["preset"] == "exact"


def test_files_need_safetensors(monkeypatch, written):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(LipassError, match="run pip install safetensors"):
        lipass.Snapshot.from_bytes(written)


def text_of(seed):
    """Keys and values of one block, a mask, and a name."""
    made = torch.Generator().manual_seed(seed)
    pair = tuple(torch.randn(1, 8, 6, generator=made).mT for _ in range(2))
    return {"blocks": [pair], "mask": torch.ones(1, 6, dtype=torch.bool)}


def steered(session, chunks, said):
    """Say texts in front of some chunks; gives the texts and plans of all."""
    texts, plans = [], []
    for index in chunks:
        for change in said.get(index, ()):
            session.steer(*change)
        start = 4 * index
        with session.chunk(
            poses=WAY_BACK[:start] if start else None, query=WAY_BACK[start : start + 4]
        ) as chunk:
            texts.append(chunk.text)
        plans.append(chunk.plan.to_json())
    return texts, plans


@pytest.mark.parametrize("policy", POLICIES)
def test_a_prompt_that_is_changing_goes_on_changing(policy, monkeypatch):
    """Said twice, the second time before the first change was over, and cut in both."""
    # No model is called here, so no attention asks what prompts weigh.
    monkeypatch.setattr(SteeringScores, "check_asked", lambda self, chunk: None)
    said = {
        0: [(text_of(0),)],
        2: [(text_of(1), 4, policy)],
        4: [(text_of(2), 4, lipass.Steering(policy=policy, curve=lambda share: share**2))],
    }
    with Session(preset="context") as session:
        texts, plans = steered(session, range(8), said)
    with Session(preset="context") as session:
        mine, before = steered(session, range(3), said)
        snapshot = through_a_file(session.snapshot())
    with Session.resume(snapshot) as session:
        middle, between = steered(session, range(3, 5), said)
        snapshot = through_a_file(session.snapshot())
    with Session.resume(snapshot) as session:
        rest, after = steered(session, range(5, 8), {})
    assert before + between + after == plans
    torch.testing.assert_close([*mine, *middle, *rest], texts, rtol=0, atol=0)
    pair = rest[-1]["blocks"][0]
    assert type(pair) is tuple
    if policy != "two-prompt":  # two prompts behind each other lie in a tensor of their own
        assert [one.stride() for one in pair] == [one.stride() for one in text_of(2)["blocks"][0]]


def test_a_prompt_that_was_said_twice_stays_one():
    day, night = text_of(0), text_of(1)
    with Session(preset="context") as session:
        steered(session, range(6), {0: [(day,)], 2: [(night, 1, "hard")], 4: [(day, 1, "hard")]})
        snapshot = through_a_file(session.snapshot())
    texts = snapshot.parts["prompts"]["told"]["main"]["texts"]
    assert len(texts) == 2
    with Session.resume(snapshot) as session:
        (text,), _ = steered(session, [6], {})
        first, *_, last = session.prompts._told["main"].texts.values()
        assert text is first is last


class Asked(torch.Tensor):
    """Remembers where it was asked to go."""

    def to(self, device, *, copy):
        assert copy
        return str(device)


@pytest.mark.parametrize("there", [True, False])
def test_a_prompt_comes_back_to_the_device_that_it_was_on(there, monkeypatch):
    """Where it exists in this process; a text on the CPU is none that the model can read."""
    kind, (strides, _, device) = told.packed(torch.ones(2, 3).as_subclass(Elsewhere))
    assert (kind, strides, device) == ("tensor", [3, 1], "cuda:1")
    monkeypatch.setattr(told, "is_there", lambda device: there)
    monkeypatch.setattr(told, "laid_out", lambda tensor, strides: tensor)
    asked = torch.ones(2, 3).as_subclass(Asked)
    assert told.unpacked([kind, [strides, asked, device]]) == ("cuda:1" if there else "cpu")


@pytest.mark.parametrize(
    ("found", "devices"), [(None, ["cpu"]), ("cuda", ["cpu", "cuda", "cuda:0", "cuda:1"])]
)
def test_devices_that_this_process_has(found, devices, monkeypatch):
    here = None if found is None else torch.device(found)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: here)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2 if found else 0)
    names = ["cpu", "cuda", "cuda:0", "cuda:1", "cuda:2", "mps", "meta"]
    assert [one for one in names if told.is_there(torch.device(one))] == devices


def test_a_prompt_of_a_file_from_before_stays_on_the_cpu():
    text = told.unpacked(["list", [["tensor", [[1, 2], torch.ones(2, 2)]]]])
    assert (text[0].stride(), text[0].device.type) == ((1, 2), "cpu")


def test_a_text_of_another_kind_is_refused_with_the_remedy():
    class Encoding(dict):
        pass

    with Session(preset="context") as session:
        session.steer(Encoding(text_of(0)))
        with pytest.raises(TypeError, match="lists, tuples and dicts, got Encoding; say such"):
            session.snapshot()
        steered(session, range(2), {})
