"""What holds on every rank of a group; each check runs on all of them at once."""

import functools
import json
import traceback
import types
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import ulysses
from torch.nn import functional as F

import lipass
from lipass import LipassError
from lipass.examples import own_model
from lipass.examples.tinyworld import model as tinyworld
from lipass.examples.tinyworld.rollout import roll_out
from lipass.kernels import registry
from lipass.parallel import merge_over_ranks, over_heads
from lipass.policy.trajectory import parse_trajectory
from lipass.receipt import reset_report

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def near(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rank():
    return dist.get_rank()


def raised(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@check
def dense_attention_by_heads():
    for heads, groups in ((8, 8), (4, 2), (8, 2), (3, 3), (6, 2), (1, 1), (5, 5)):
        q = draw(2, heads, 24, 8)
        k, v = draw(2, groups, 40, 8, seed=1), draw(2, groups, 40, 8, seed=2)
        attend = functools.partial(F.scaled_dot_product_attention, enable_gqa=heads != groups)
        near(over_heads(attend, q, k, v), attend(q, k, v))


@check
def heads_come_back_as_projections_read_them():
    q = draw(1, 4, 24, 8)
    out = over_heads(F.scaled_dot_product_attention, q, q, q)
    assert out.transpose(1, 2).is_contiguous()


SPARSE = {"preset": "sparse", "sparse.budget_decode": 0.3, "sparse.dense_chunks": 0,
          "sparse.dense_tokens": 0, "sparse.tile": (4, 4, 4)}  # fmt: skip


def attend_sparse(q, text, history, own, **more):
    segments = [
        ("text", text, text, None),
        ("history", history, history * 0.5, (8, 8, 8)),
        ("current", own, own * 2, (4, 8, 8)),
    ]
    with registry.force("sparse", "both are to choose blocks"):
        return lipass.attend(q, segments, site="a", **more)


def tokens(heads):
    sizes = (256, 7, 512, 256)
    return [draw(1, heads, size, 16, seed=i) for i, size in enumerate(sizes)]


@check
def block_sparse_attention_by_heads():
    poses = parse_trajectory("left-11")
    for heads in (4, 3):
        given = tokens(heads)
        with lipass.Session(**SPARSE) as session, session.chunk(poses=poses[:8], query=poses[8:]):
            expected, log_sums = attend_sparse(*given, return_lse=True)
            attend = functools.partial(attend_sparse, return_lse=True)
            found, lse = over_heads(attend, *given)
        near(found, expected)
        near(lse, log_sums)
        dense = F.scaled_dot_product_attention(
            given[0], torch.cat(given[1:], 2),
            torch.cat([given[1], given[2] * 0.5, given[3] * 2], 2),
        )  # fmt: skip
        assert (expected - dense).abs().max() > 1e-3  # blocks were left out


def share(x, dim):
    return x.tensor_split(dist.get_world_size(), dim)[rank()]


@check
def dense_attention_by_keys():
    q, k, v = draw(2, 3, 24, 8), draw(2, 3, 40, 8, seed=1), draw(2, 3, 40, 8, seed=2)
    for keys in (40, dist.get_world_size(), 1):  # the last: only one rank holds a key
        own_k, own_v = share(k[:, :, :keys], 2), share(v[:, :, :keys], 2)
        out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf)
        if own_k.shape[2]:
            grid = (1, 1, own_k.shape[2])
            segments = [("history", own_k, own_v, grid, None)]
            out, lse = lipass.attend(q, segments, site="b", q_grid=(1, 1, 24), return_lse=True)
        found, total = merge_over_ranks(out, lse)
        near(found, F.scaled_dot_product_attention(q, k[:, :, :keys], v[:, :, :keys]))
        near(total, (q @ k[:, :, :keys].mT / 8**0.5).logsumexp(-1))


@check
def block_sparse_attention_by_keys():
    """One plan, of which each rank visits the blocks that it holds."""
    from lipass.kernels import BlockGrid, BlockPlan, KvLayout, Segment, block_sparse_attention

    q, k, v = draw(1, 2, 64, 16), draw(1, 2, 256, 16, seed=1), draw(1, 2, 256, 16, seed=2)
    q_grid, blocks = BlockGrid((1, 8, 8), (1, 4, 4)), 16
    chosen = draw(1, 2, 4, blocks, seed=3).topk(5).indices.sort(-1).values.int()

    def plan_of(first, count):
        inside = (chosen >= first) & (chosen < first + count)
        order = inside.int().sort(dim=-1, descending=True, stable=True).indices
        indices = (chosen.gather(-1, order) - first).clamp(0, count - 1).int().contiguous()
        layout = KvLayout((Segment("history", BlockGrid((count, 4, 4), (1, 4, 4))),))
        return BlockPlan(indices, inside.sum(-1).int(), q_grid, layout)

    def attend(first, count):
        rows = slice(first * 16, (first + count) * 16)
        own = plan_of(first, count)
        return block_sparse_attention(q, [k[:, :, rows]], [v[:, :, rows]], own, return_lse=True)

    own = blocks // dist.get_world_size()
    near(merge_over_ranks(*attend(rank() * own, own))[0], attend(0, blocks)[0])


WALK = parse_trajectory("left-15, right-16", step_deg=6.0)
BOTH = {"preset": "all", "inner": "eager", "hfov_deg": 75.0, "vfov_deg": 75.0}


@check
def what_the_first_rank_decides_holds_on_all():
    """Latents that have drifted apart would choose windows of other lengths."""
    calm, moving = torch.zeros(16, 4, 2, 2), draw(16, 4, 2, 2) * 10
    with lipass.Session(**BOTH, group=dist.group.WORLD) as session:
        latents = calm if rank() == 0 else moving
        found = session.chunk(poses=WALK[:16], query=WALK[16:20], latents=latents)
    own = [
        lipass.Session(**BOTH).chunk(poses=WALK[:16], query=WALK[16:20], latents=one).context
        for one in (calm, moving)
    ]
    assert own[0] != own[1]
    assert found.context == own[0]


@check
def a_rank_that_cannot_ask_stops_all():
    with lipass.Session(**BOTH, group=dist.group.WORLD) as session:
        last = dist.get_world_size() - 1
        query = WALK[16:20] if rank() != last else WALK[16:20] * float("nan")
        error = raised(session.chunk, poses=WALK[:16], query=query)
        if rank() == last:
            assert isinstance(error, ValueError)
            assert not isinstance(error, LipassError)
        else:
            assert isinstance(error, LipassError)
            assert f"got one that cannot, rank {last}: ValueError" in str(error)
        # Nothing is left over of it.
        session.chunk(poses=WALK[:16], query=WALK[16:20])


@check
def ranks_that_ask_for_different_things_are_told():
    more = {"context.overlap_min": 0.2} if rank() else {}
    with lipass.Session(**BOTH, **more, group=dist.group.WORLD) as session:
        error = raised(session.chunk, poses=WALK[:16], query=WALK[16:20])
    assert isinstance(error, LipassError)
    assert "all ranks must ask for the same, got options" in str(error)
    with lipass.Session(**BOTH, group=dist.group.WORLD) as session:
        history = 16 if rank() else 12
        error = raised(session.chunk, poses=WALK[:history], query=WALK[history : history + 4])
    assert "got history" in str(error)


@check
def prompts_change_on_all_ranks_alike():
    """Texts are objects of each rank; said again by one as a copy, they are the same to all."""
    day, night = draw(1, 6, 8, seed=4), draw(1, 6, 8, seed=5)
    said = {0: day, 3: night, 5: day.clone() if rank() else day}

    def plans(session):
        found = []
        with session:
            for index in range(8):
                if index in said:
                    session.steer([said[index]], 1, "hard")
                past, query = WALK[: 4 * index], WALK[4 * index : 4 * index + 4]
                with session.chunk(poses=past if index else None, query=query) as chunk:
                    list(chunk.steps((1.0, 0.75, 0.5, 0.25, 0.0)))
                found.append(chunk.plan)
        return found

    alone = plans(lipass.Session(**BOTH))
    assert plans(lipass.Session(**BOTH, group=dist.group.WORLD)) == alone


@check
def a_prompt_that_one_rank_was_not_told_is_told():
    with lipass.Session(**BOTH, group=dist.group.WORLD) as session:
        if rank() == 0:
            session.steer([draw(1, 6, 8, seed=4)])
        error = raised(session.chunk, query=WALK[:4])
    assert "all ranks must ask for the same, got prompts" in str(error)


@check
def a_fork_is_shared_by_the_ranks():
    with lipass.Session(**BOTH, group=dist.group.WORLD) as session, session.fork() as forked:
        if rank() == 0:
            forked.steer([draw(1, 6, 8, seed=4)])
        assert "all ranks must ask for the same" in str(raised(forked.chunk, query=WALK[:4]))
        with session.chunk(query=WALK[:4]) as chunk:
            assert chunk.index == 0


@check
def what_is_least_needed_is_one_answer():
    poses = WALK[:32]
    alone = lipass.Session(**BOTH).least_needed(poses)
    with lipass.Session(**BOTH, group=dist.group.WORLD) as session:
        assert session.least_needed(poses) == alone


def tiny_world():
    torch.manual_seed(0)
    config = tinyworld.ModelConfig(width=48, heads=3, blocks=2, rows=4, columns=4)
    world = tinyworld.TinyWorld(config)
    for parameter in world.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return world.eval().requires_grad_(False)


def tiny_rollout(world, call, session):
    text = world.text(tinyworld.tokenize("a room")[None])
    with session:
        return roll_out(call, text, draw(16, 16, 4, 4, seed=3), WALK, seed=0, session=session)


def attention_over_heads(model_code):
    """Let the code of a model call attention over all ranks, as its user would write it there."""
    functional = types.ModuleType("functional")
    functional.__dict__.update(F.__dict__)
    plain = F.scaled_dot_product_attention
    functional.scaled_dot_product_attention = lambda q, k, v: over_heads(plain, q, k, v)
    return mock.patch.object(model_code, "F", functional)


@check
def tinyworld_rolls_out_alike():
    """Context by poses and merged steps: the same latents are left out, the same steps skipped."""
    world = tiny_world()
    expected = tiny_rollout(world, world, lipass.Session(**BOTH))
    with attention_over_heads(tinyworld):
        found = tiny_rollout(world, world, lipass.Session(**BOTH, group=dist.group.WORLD))
    near(found.latents, expected.latents)
    assert [c.context for c in found.chunks] == [c.context for c in expected.chunks]
    assert min(c.steps_computed for c in found.chunks) < 4
    assert any(len(c.context) < c.start for c in found.chunks)


def own_rollout(model, call, group=None, **options):
    session = lipass.Session(**options, chunk_latents=4, group=group)
    with mock.patch.multiple(own_model, ROWS=4, COLUMNS=4), session:
        return own_model.roll_out(call, parse_trajectory("left-7, right-8"), session)


def both_worlds(depth=2):
    torch.manual_seed(1)
    plain = own_model.World(32, 4, depth).eval()
    split = ulysses.World(32, 4, depth).eval()
    split.load_state_dict(plain.state_dict())
    return plain, split


def compiled_rollout(model, **options):
    """Roll out compiled, by ranks that share the session; the receipt tells what was seen."""
    torch._dynamo.reset()
    reset_report()
    given = {**options, "inner": "eager", "chunk_latents": 4}
    call = torch.compile(model, backend="light_interaction", options=given, dynamic=True)
    return own_rollout(model, call, dist.group.WORLD, **options)


@check
def compiled_attention_by_heads():
    if dist.get_world_size() > 2:
        return
    plain, _ = both_worlds(depth=1)
    expected = own_rollout(plain, plain, preset="all")
    with attention_over_heads(own_model):
        near(compiled_rollout(plain, preset="all"), expected)
    assert any(chunk.steps_skipped for chunk in lipass.report().chunks)
    assert not lipass.report().graph_breaks


@check
def a_model_that_splits_itself_stays_right():
    plain, split = both_worlds()
    expected = own_rollout(plain, plain, preset="all")
    for by_list in (False, True):
        ulysses.Block.by_list = by_list
        near(own_rollout(split, split, dist.group.WORLD, preset="all"), expected)


@check
def a_compiled_model_that_splits_itself_stays_right():
    if dist.get_world_size() > 2:
        return
    plain, split = both_worlds(depth=1)
    # Whole graphs, of which no call may be answered from an earlier one, as the others would wait
    # for its exchange; and graphs that break at each exchange.
    for by_list, form in ((False, "lookup"), (True, "merge")):
        ulysses.Block.by_list = by_list
        options = {"preset": "all", "steps.form": form}
        near(compiled_rollout(split, **options), own_rollout(plain, plain, **options))
        told = lipass.report()
        assert bool(told.graph_breaks) == by_list
        # In which order ranks send their tokens is not for a graph to know.
        assert not {site.role for site in told.sites.values()} & {"decode", "prefill"}
        assert any(chunk.steps_skipped for chunk in told.chunks) == by_list


def run(own_rank, count, folder):
    """Run all checks on one rank, and write down how each went."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), count)
    dist.init_process_group(
        "gloo", store=store, rank=own_rank, world_size=count, timeout=timedelta(seconds=60)
    )
    told = {}
    with torch.no_grad():
        for name, function in CHECKS.items():
            try:
                function()
                told[name] = ""
            except Exception:
                told[name] = traceback.format_exc()
                break  # the others may wait for this rank in vain
    (Path(folder) / f"{own_rank}.json").write_text(json.dumps(told))
    dist.barrier() if all(one == "" for one in told.values()) else None
    dist.destroy_process_group()
