"""The renderer is the truth of every figure, so its geometry is checked by hand arithmetic."""

import dataclasses

import pytest
import torch

from lipass.examples.tinyworld import world
from lipass.examples.tinyworld.camera import camera_to_world, invert, relative_to
from lipass.examples.tinyworld.world import AIRS, Attributes, is_free, make_room, place, render
from lipass.policy.trajectory import parse_trajectory


def look(x: float, z: float, yaw_deg: float) -> torch.Tensor:
    position = torch.tensor([x, -1.5, z])
    return invert(camera_to_world(position, torch.tensor(yaw_deg), torch.tensor(0.0)))


def empty_room(seed: int = 1) -> world.Room:
    room = make_room(seed)
    return dataclasses.replace(room, boxes=room.boxes[:0], surfaces=room.surfaces[:6])


def test_room_of_a_seed_is_always_the_same():
    a, b = make_room(9003), make_room(9003)
    assert torch.equal(a.surfaces, b.surfaces)
    assert torch.equal(a.boxes, b.boxes)


def test_every_layout_is_drawn_and_leaves_room_to_stand():
    rooms = [make_room(seed) for seed in range(9000, 9030)]
    assert {room.layout for room in rooms} == set(world.LAYOUTS)
    for room in rooms:
        free = [is_free(room, x * 0.5, z * 0.5) for x in range(18) for z in range(18)]
        assert any(free)


def test_wall_ahead_is_hit_at_its_distance():
    room = empty_room()
    ray = torch.tensor([[0.0, 0.0, 1.0]])
    distance, axis, surface = world.cast(room, torch.tensor([2.0, -1.5, 1.0]), ray)
    assert distance.item() == pytest.approx(room.size_m[2].item() - 1.0)
    assert (axis.item(), surface.item()) == (2, 5)


def test_box_hides_the_wall_behind_it():
    room = empty_room()
    box = torch.tensor([[[1.0, -2.0, 3.0], [3.0, 0.0, 3.5]]])
    room = dataclasses.replace(room, boxes=box, surfaces=room.surfaces[[0, 1, 2, 3, 4, 5, 0]])
    ray = torch.tensor([[0.0, 0.0, 1.0]])
    distance, _, surface = world.cast(room, torch.tensor([2.0, -1.5, 1.0]), ray)
    assert distance.item() == pytest.approx(2.0)
    assert surface.item() == 6


def test_bare_room_shows_the_walls_of_a_room_and_nothing_else():
    room = make_room(9001)
    plain = world.bare(room)
    assert torch.equal(plain.size_m, room.size_m)
    poses = torch.stack([look(2.0, 2.0, yaw) for yaw in (0.0, 45.0)])
    frames = render(plain, poses, [Attributes()], 16)[0]
    grey = frames.amax(1) - frames.amin(1)
    assert grey.max() < 0.01
    # Wall ahead, floor below and ceiling above differ; a wall is one shade from side to side.
    floor, wall, ceiling = frames[0, 0, -1, 8], frames[0, 0, 8, 8], frames[0, 0, 0, 8]
    assert floor < wall - 0.2 < ceiling - 0.4
    assert frames[0, 0, 8].max() - frames[0, 0, 8].min() < 0.15


@pytest.mark.parametrize("seed", [9001, 9004])
def test_bare_walls_are_rendered_to_the_bit_in_one_go(seed):
    plain = world.bare(make_room(seed))
    poses = torch.stack([look(2.0 + 0.1 * i, 2.5, 80.0 * i) for i in range(5)])
    whole = render(plain, poses, [Attributes()], 16, samples=1)[0]
    assert torch.equal(world.render_walls(plain, poses, 16), whole)


def test_same_pose_gives_the_same_picture():
    room = make_room(9001)
    frames = render(room, torch.stack([look(2, 2, 30.0)] * 2), [Attributes()], 16)[0]
    assert torch.equal(frames[0], frames[1])


def test_turning_right_moves_the_picture_left():
    room = empty_room(9003)
    poses = torch.stack([look(3, 3, 0.0), look(3, 3, 4.0)])
    before, after = render(room, poses, [Attributes()], 64)[0]
    # Only in the middle of the picture does a turn move all columns alike.
    middle = after[..., 16:48]
    shifted = (middle - before[..., 19:51]).square().mean()
    assert shifted < 0.1 * (middle - before[..., 16:48]).square().mean()


def test_fog_hides_and_night_darkens_without_moving_anything():
    room = make_room(9001)
    day, fog, night = (
        frames[0]
        for frames in render(
            room,
            look(3, 3, 0.0)[None],
            [Attributes(), Attributes(air="fog"), Attributes(time="night")],
            32,
        )
    )
    assert fog.std() < day.std()
    assert night.mean() < 0.7 * day.mean()
    assert AIRS["clear"] < AIRS["haze"] < AIRS["fog"]


def test_supersampling_converges():
    room, pose = make_room(9002), look(3, 3, 45.0)[None]
    coarse, fine, finest = (
        render(room, pose, [Attributes()], 32, samples)[0] for samples in (1, 2, 4)
    )
    assert (fine - finest).square().mean() < (coarse - finest).square().mean()


def test_placed_trajectory_keeps_its_shape_and_stays_inside():
    room = make_room(9004)
    path = parse_trajectory("left-31, right-32", step_deg=6.0)
    placed = place(room, path, torch.Generator().manual_seed(0))
    assert torch.allclose(relative_to(placed, placed[0]), path, atol=1e-5)
    for pose in invert(placed):
        assert is_free(room, float(pose[0, 3]), float(pose[2, 3]))


def test_random_walk_never_enters_furniture():
    room = make_room(9005)
    walk = invert(world.random_walk(room, 64, torch.Generator().manual_seed(1)))
    assert all(is_free(room, float(pose[0, 3]), float(pose[2, 3])) for pose in walk)
