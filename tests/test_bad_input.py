"""What a session cannot use is told with rule, value and remedy, and the session goes on."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lipass
from lipass import Config, LipassError, LipassWarning, Session
from lipass.policy.plan import ChunkPlan
from lipass.policy.trajectory import parse_trajectory

SIGMAS = (1.0, 0.75, 0.5, 0.25, 0.0)
W2C = parse_trajectory("left-15, right-16")
POSES, QUERY = W2C[:8], W2C[8:12]
LATENTS = torch.randn(8, 4, 2, 2, generator=torch.Generator().manual_seed(0))
NAN, INF = float("nan"), float("inf")


class Loop:
    """A session in use: two chunks are done, and the third is about to be made."""

    def __init__(self):
        self.session = Session(preset="all")
        self.done = 0
        self.go_on()
        self.go_on()

    def next(self, **given):
        start = 4 * self.done
        poses = W2C[:start] if start else None
        return self.session.chunk(**{"poses": poses, "query": W2C[start : start + 4], **given})

    def go_on(self):
        with self.next() as chunk:
            taken = [step.index for step in chunk.steps(SIGMAS)]
        self.done += 1
        assert taken[0] == 0


def chunk(**given):
    return lambda loop: loop.next(**given)


def poses(change):
    return chunk(poses=change(POSES.clone()))


def steps(sigmas):
    def run(loop):
        with loop.next() as now:
            list(now.steps(sigmas))

    return run


def filled(value, *place):
    def change(cameras):
        cameras[place] = value
        return cameras

    return change


def after_it_closed(loop):
    loop.done += 1
    with loop.session.chunk(poses=POSES, query=QUERY) as now:
        list(now.steps(SIGMAS))
    list(now.steps(SIGMAS))


def entered_again(loop):
    loop.done += 1
    with loop.session.chunk(poses=POSES, query=QUERY) as now:
        pass
    with now:
        pass


def inside_of_itself(loop):
    with loop.next() as now, now:
        pass


def beside_an_open_one(loop):
    with loop.next():
        loop.next()


def without_its_block(loop):
    list(loop.next().steps(SIGMAS))


def entered_by_hand_and_interrupted(loop):
    now = loop.next()
    now.__enter__()
    try:
        loop.next()
    finally:
        now.close()  # as the message says


def made_twice(loop):
    first, second = loop.next(), loop.next()
    loop.done += 1
    with first:
        pass
    with second:
        pass


def of_a_closed_session(loop):
    other = Session(preset="all")
    made = other.chunk(poses=POSES, query=QUERY)
    other.close()
    with made:
        pass


def in_a_closed_session(loop):
    other = Session(preset="all")
    other.close()
    other.chunk(poses=POSES, query=QUERY)


def another_number_of_steps(loop):
    with loop.next() as now:
        list(now.steps(SIGMAS))
        list(now.steps((1.0, 0.0)))


def step_of_an_older_loop(loop):
    with loop.next() as now:
        older = list(now.steps(SIGMAS))
        for _ in now.steps(SIGMAS):
            with older[0]:
                pass


def shorter_history(loop):
    loop.session.chunk(poses=W2C[:2], query=W2C[2:6])


def no_history_again(loop):
    loop.session.chunk(query=W2C[:4])


def attend(**changed):
    q = torch.randn(1, 2, 16, 8)

    def run(loop):
        given = {"q": q, "segments": [("current", q, q, (1, 4, 4))], "site": "a", **changed}
        with loop.next():
            lipass.attend(given.pop("q"), given.pop("segments"), **given)

    return run


def keys(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def with_weights_of_nan(loop):
    model = torch.nn.Linear(4, 4)
    torch.nn.init.constant_(model.weight, NAN)
    fast = torch.compile(model, backend="eager")
    with torch.no_grad(), loop.next() as now:
        for _ in now.steps(SIGMAS):
            latents = fast(torch.randn(4, 4))
    loop.done += 1
    loop.next(latents=torch.cat([LATENTS.flatten(1)[:, :4], latents]))


T, V, L = TypeError, ValueError, LipassError
# name: what is done, what it raises, and words of its rule, its value and its remedy
KINDS = {
    # cameras
    "array as poses": (chunk(poses=POSES.numpy()), T, "floating-point tensor", "ndarray", "pass"),
    "list as poses": (chunk(poses=POSES.tolist()), T, "floating-point tensor", "list", "pass"),
    "words as poses": (chunk(poses="w-31"), T, "floating-point tensor", "str", "pass"),
    "poses of ints": (poses(torch.Tensor.long), T, "floating-point", "torch.int64", "pass"),
    "poses of bools": (poses(torch.Tensor.bool), T, "floating-point", "torch.bool", "pass"),
    "complex poses": (poses(torch.Tensor.cfloat), T, "floating-point", "complex64", "pass"),
    "one pose": (poses(lambda p: p[0]), V, "[latents, 4, 4]", "got [4, 4]", "without a batch"),
    "batch of poses": (poses(lambda p: p[None]), V, "[latents, 4, 4]", "[1, 8, 4, 4]", "batch"),
    "poses of 3 rows": (poses(lambda p: p[:, :3]), V, "[latents, 4, 4]", "[8, 3, 4]", "pass"),
    "quaternions": (
        chunk(poses=keys(8, 7)), V, "[latents, 4, 4]", "[8, 7]", "one world-to-camera",
    ),
    "empty poses": (
        poses(lambda p: p[:0]), V, "at least one camera", "got none", "None for a first",
    ),
    "NaN in a pose": (
        poses(filled(NAN, 3)), V, "finite", "NaN or infinity in latent 3", "inversion",
    ),
    "infinity in a pose": (poses(filled(INF, 5, 0, 3)), V, "finite", "in latent 5", "inversion"),
    "scaled poses": (poses(lambda p: p * 2), V, "must be rigid", "off by 7", "remove scale"),
    "mirrored poses": (poses(filled(-W2C[2, 0], 2, 0)), V, "rigid", "at latent 2", "remove"),
    "transposed poses": (
        poses(lambda p: filled(1.0, slice(None), slice(3), 3)(p).transpose(1, 2)),
        V, "last row 0 0 0 1", "at latent", "remove",
    ),
    "poses with intrinsics": (
        poses(lambda p: torch.diag(torch.tensor([500.0, 500.0, 1.0, 1.0])) @ p),
        V, "rigid", "off by 2.5e+05", "remove scale and intrinsics",
    ),
    "poses of zeros": (poses(torch.zeros_like), V, "rigid", "off by 1", "remove"),
    "poses without values": (
        chunk(poses=POSES.to("meta"), query=QUERY.to("meta")), V, "hold values", "meta", "pass",
    ),
    "poses elsewhere than query": (
        chunk(poses=POSES.to("meta")), V, "must", "meta", "pass",
    ),
    "query of None": (chunk(query=None), V, "query must hold", "got None", "pass [q, 4, 4]"),
    "nothing at all": (lambda loop: loop.session.chunk(), V, "query must", "None", "pass"),
    "array as query": (chunk(query=QUERY.numpy()), T, "query must be", "ndarray", "pass"),
    "empty query": (chunk(query=QUERY[:0]), V, "query must hold", "got none", "pass"),
    "query of two chunks": (
        chunk(query=W2C[8:16]), V, "chunk_latents", "got 8", "set chunk_latents to 8",
    ),
    # latents
    "array as latents": (
        chunk(latents=LATENTS.numpy()), T, "floating-point tensor", "ndarray", "from_numpy",
    ),
    "list as latents": (chunk(latents=list(LATENTS)), T, "floating-point tensor", "list", "pass"),
    "words as latents": (
        lambda loop: loop.session.chunk(latents="abc"), T, "floating-point", "str", "pass",
    ),
    "latents of ints": (chunk(latents=LATENTS.long()), T, "floating-point", "int64", "pass"),
    "latents of bytes": (chunk(latents=LATENTS.byte()), T, "floating-point", "uint8", "pass"),
    "complex latents": (chunk(latents=LATENTS.cfloat()), T, "floating-point", "complex", "pass"),
    "fewer latents than poses": (
        chunk(latents=LATENTS[:6]), V, "one entry a pose", "6 for 8", "oldest first",
    ),
    "latents with a batch": (
        chunk(latents=LATENTS.transpose(0, 1)[None]), V, "one entry a pose", "1 for 8", "[M, ...]",
    ),
    "one number as latents": (chunk(latents=torch.tensor(1.0)), V, "[M, ...]", "got []", "pass"),
    "latents of one number each": (chunk(latents=keys(8)), V, "an entry a latent", "[8]", "pass"),
    "latents of no numbers": (chunk(latents=keys(8, 0)), V, "[M, ...]", "[8, 0]", "pass"),
    "latents without values": (chunk(latents=LATENTS.to("meta")), V, "values", "meta", "pass"),
    "latents of NaN": (chunk(latents=LATENTS * NAN), V, "finite", "nan", "weights of the model"),
    "infinite latents": (chunk(latents=LATENTS / 0), V, "finite", "inf", "output of the chunk"),
    "weights of NaN": (with_weights_of_nan, V, "finite", "nan", "weights of the model"),
    # what a loop reads by itself
    "context outside": (chunk(own_context=[9]), V, "indices of the 8", "[9]", "count from 0"),
    "context from the end": (chunk(own_context=[-1]), V, "indices of", "[-1]", "count from 0"),
    "context twice": (chunk(own_context=[1, 1]), V, "each once", "[1, 1]", "count from 0"),
    "context of floats": (chunk(own_context=[1.5]), T, "list of ints", "[1.5]", "places"),
    "context of a word": (chunk(own_context="all"), T, "list of ints", "'all'", "places"),
    "context of one number": (chunk(own_context=3), T, "list of ints", "one number", "places"),
    "context as a mask": (
        chunk(own_context=[True] * 8), T, "indices", "[True", "where it is true",
    ),
    "held outside": (chunk(held=[9]), V, "held must hold indices", "[9]", "count from 0"),
    "held as a mask": (chunk(held=[True] * 8), T, "held must be", "[True", "where it is true"),
    "held of one number": (chunk(held=3), T, "held must be", "one number", "places"),
    "held of floats": (chunk(held=[0.5]), T, "held must be", "[0.5]", "places"),
    # streams
    "stream of None": (chunk(stream=None), T, "must have a name", "None", "pass a string"),
    "stream of a number": (chunk(stream=7), T, "must have a name", "7 of kind int", "as text"),
    "stream of a list": (chunk(stream=["a"]), T, "must have a name", "['a']", "pass a string"),
    "stream without a name": (chunk(stream=""), V, "must have a name", "''", "leave it out"),
    "branch of None": (
        lambda loop: loop.session.stream(None).__enter__(), T, "a name", "None", "a string",
    ),
    # steps
    "steps of None": (
        steps(None), T, "sigmas or a scheduler", "NoneType", "chunk.steps(scheduler)",
    ),
    "number of steps": (steps(4), T, "sigmas or a scheduler", "got int", "pass"),
    "steps of words": (steps("1,0"), T, "sigmas or a scheduler", "got str", "pass"),
    "steps of a generator": (
        steps(sigma for sigma in SIGMAS), T, "sigmas or a scheduler", "generator", "pass",
    ),
    "steps of a set": (steps(set(SIGMAS)), T, "sigmas or a scheduler", "got set", "pass"),
    "steps of a dict": (steps({1.0: 0, 0.0: 1}), T, "sigmas or a scheduler", "got dict", "pass"),
    "class of a scheduler": (
        steps(SimpleNamespace), T, "sigmas or a scheduler", "SimpleNamespace", "pass",
    ),
    "one sigma": (steps([1.0]), V, "at least two", "shape [1]", "include the last one"),
    "no sigma": (steps([]), V, "at least two", "shape [0]", "include the last one"),
    "table of sigmas": (steps(torch.ones(2, 3)), V, "a list", "shape [2, 3]", "include"),
    "sigma without an axis": (steps(np.array(1.0)), V, "a list", "shape []", "include"),
    "sigma of NaN": (steps([1.0, NAN, 0.0]), V, "finite", "nan at place 1", "check the schedule"),
    "infinite sigma": (steps([INF, 0.0]), V, "finite", "inf at place 0", "check the schedule"),
    "rising sigmas": (steps([0.0, 0.5, 1.0]), V, "must fall", "0 and then 0.5", "turn the list"),
    "rising tensor": (steps(torch.tensor([0.0, 1.0])), V, "must fall", "0 and then 1", "1 - t"),
    "rising array": (steps(np.array([0.0, 1.0])), V, "must fall", "0 and then 1", "1 - t"),
    "list of rising tensors": (
        steps([torch.tensor(0.0), torch.tensor(1.0)]), V, "must fall", "0 and then 1", "1 - t",
    ),
    "sigmas that turn": (steps([1.0, 0.5, 0.7, 0.0]), V, "must fall", "0.5 and then 0.7", "turn"),
    "duplicate sigmas": (
        steps([1.0, 0.5, 0.5, 0.0]), V, "must fall", "0.5 and then 0.5 at place 1", "drop one",
    ),
    "negative sigma": (steps([1.0, 0.5, -0.5]), V, "0 or more", "-0.5 at place 2", "end with 0"),
    "timesteps": (steps([1000, 750, 500]), V, "noise levels", "1000 .. 500", "chunk.steps(sched"),
    "sigmas of words": (steps(["1", "0"]), T, "must be numbers", "'1' at place 0", "pass"),
    "sigmas of None": (steps([None, 0.0]), T, "must be numbers", "None at place 0", "pass"),
    "sigmas of bools": (steps([True, False]), T, "must be numbers", "True at place 0", "pass"),
    "complex sigmas": (steps([1j, 0j]), T, "must be numbers", "1j at place 0", "pass"),
    "nested sigmas": (steps([[1.0], [0.0]]), T, "must be numbers", "[1.0] at place 0", "pass"),
    "array of words": (
        steps(np.array(["a", "b"])), T, "must be numbers", "'a' at place 0", "pass",
    ),
    "sigmas without values": (steps(torch.ones(4, device="meta")), V, "values", "meta", "pass"),
    "another number of steps": (another_number_of_steps, V, "one number", "1 after 4", "stream"),
    "step of an older loop": (step_of_an_older_loop, L, "one loop", "step 0", "finish a loop"),
    "no scheduler to follow": (
        lambda loop: loop.next().follow(None), T, "set_timesteps", "NoneType", "pipe.scheduler",
    ),
    # turns
    "chunk after it closed": (
        after_it_closed, L, "inside of their chunk", "chunk 2", "with session",
    ),
    "chunk entered again": (entered_again, L, "generated once", "chunk 2", "session.chunk(...)"),
    "chunk inside of itself": (inside_of_itself, L, "one chunk at a time", "'main'", "leave"),
    "chunk beside an open one": (
        beside_an_open_one, L, "one chunk at a time", "'main'", "another",
    ),
    "steps outside of a block": (without_its_block, L, "inside of their chunk", "chunk 2", "with"),
    "chunk entered by hand": (
        entered_by_hand_and_interrupted, L, "one chunk at a time", "'main'", "chunk.close()",
    ),
    "chunk made twice": (made_twice, L, "when its turn comes", "got chunk 2", "behind the one"),
    "chunk of a closed session": (
        of_a_closed_session, L, "an open session", "a closed", "new one",
    ),
    "closed session": (in_a_closed_session, L, "an open session", "a closed one", "make a new"),
    "shorter history": (shorter_history, V, "not become shorter", "2 latents after 4", "`held`"),
    "no history any more": (
        no_history_again, V, "not become shorter", "0 latents after 4", "begin",
    ),
    # sessions and options
    "preset as a config": (lambda loop: Session("all"), T, "a lipass.Config", "'all'", "preset="),
    "dict as a config": (
        lambda loop: Session({"preset": "all"}), T, "Config", "{'preset'", "write",
    ),
    "config and options": (
        lambda loop: Session(Config.resolve("all"), preset="off"), T, "or options", "both", "put",
    ),
    "unknown preset": (lambda loop: Session(preset="sparce"), V, "one of", "'sparce'", "'sparse'"),
    "unknown option": (
        lambda loop: Session(tile=4), V, "what can be told", "'tile'", "sparse.tile",
    ),
    "option of another kind": (
        lambda loop: Session(**{"sparse.budget": "0.3"}), T, "a number", "'0.3'", "without quotes",
    ),
    "option out of range": (
        lambda loop: Session(**{"sparse.budget": 3.0}), V, "(0, 1]", "got 3.0", "use 0.3",
    ),
    "option of what is off": (
        lambda loop: Session(preset="exact", **{"steps.form": "merge"}),
        V, "needs its section", "'steps.form'", "'steps': True",
    ),
    "angle in radians": (lambda loop: Session(hfov_deg=1.05), V, "degrees", "1.05", "write 60"),
    "unknown pass": (
        lambda loop: Session(disable=("share-block",)), V, "pass", "'share-block'", "mean",
    ),
    "unknown convention": (
        lambda loop: Session(convention="blender"), V, "w2c or c2w", "'blender'", "c2w-opengl",
    ),
    "convention of two directions": (
        lambda loop: Session(convention="c2w-w2c"), V, "w2c or c2w", "'c2w-w2c'", "write",
    ),
    "replay of a path": (
        lambda loop: Session.replay("a.json"), T, "chunk plans", "'a'", "from_json",
    ),
    "replay of dicts": (lambda loop: Session.replay([{}]), T, "chunk plans", "{} of kind", "make"),
    "plan that is cut short": (
        lambda loop: ChunkPlan.from_json('{"a": '), V, "JSON of", "'{\"a\": '", "record it again",
    ),
    "plan of a list": (lambda loop: ChunkPlan.from_json("[]"), T, "the dict", "list", "one plan"),
    "plan of another version": (
        lambda loop: ChunkPlan.from_json("{}"), V, "schema_version", "None", "record it again",
    ),
    "walk of no words": (lambda loop: parse_trajectory(None), V, "a string", "None", "try 'w-31"),
    "walk that is misspelt": (lambda loop: parse_trajectory("w31"), V, "<action>", "'w31'", "try"),
    # attention of one's own
    "queries without heads": (attend(q=keys(1, 16, 8)), V, "[B, H, L, D]", "[1, 16, 8]", "split"),
    "keys of another dtype": (
        attend(segments=[("current", *[keys(1, 2, 16, 8, dtype=torch.half)] * 2, (1, 4, 4))]),
        V, "torch.float32", "torch.float16", "convert",
    ),
    "keys of another batch": (
        attend(segments=[("current", *[keys(2, 2, 16, 8)] * 2, (1, 4, 4))]),
        V, "B = 1", "[2, 2, 16, 8]", "split",
    ),
    "segment of another role": (
        attend(segments=[("memory", *[keys(1, 2, 16, 8)] * 2)]),
        V, "roles", "['memory']", "join keys",
    ),
    "grid of other tokens": (
        attend(segments=[("current", *[keys(1, 2, 16, 8)] * 2, (1, 3, 3))]),
        V, "of 16 tokens", "(1, 3, 3)", "height and width",
    ),
    "site with a comma": (attend(site="a,b"), V, "without commas", "'a,b'", "name the layer"),
}  # fmt: skip


def test_kinds_are_many():
    assert len(KINDS) >= 80


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_told_and_the_session_goes_on(kind):
    does, error, rule, value, remedy = KINDS[kind]
    loop = Loop()
    with pytest.raises(error) as raised:
        does(loop)
    told = str(raised.value)
    said, _, advice = told.rpartition("; ")
    assert rule in said
    assert value in told
    assert remedy in told
    assert said, f"no remedy in {told!r}"
    assert advice
    loop.go_on()
    loop.go_on()


@pytest.mark.parametrize("scale", [100.0, 1e-3])
def test_latents_that_are_not_normalised_are_told_once(scale):
    loop = Loop()
    with pytest.warns(LipassWarning, match="mean square of about 1, got .*; divide by") as told:
        loop.next(latents=LATENTS * scale)
    assert len(told) == 1
    loop.next(latents=LATENTS * scale)
    with pytest.raises(LipassError, match="strict: latents must be normalised"):
        Session(preset="all", strict=True).chunk(poses=POSES, query=QUERY, latents=LATENTS * scale)


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 3.0])
def test_latents_as_models_have_them_are_not_told_of(scale):
    Loop().next(latents=LATENTS * scale)


@pytest.mark.parametrize(
    "given",
    [
        {"poses": POSES.half(), "query": QUERY.half()},
        {"poses": POSES.double()},
        {"poses": POSES.clone().requires_grad_()},
        {"own_context": torch.tensor([1, 2])},
        {"held": [3, 1]},
        {"held": []},
        {"held": torch.tensor([3, 1])},
        {"latents": LATENTS.bfloat16()},
    ],
    ids=str,
)
def test_what_only_looks_odd_is_taken(given):
    with Loop().next(**given) as chunk:
        assert set(chunk.context) <= set(range(8))
