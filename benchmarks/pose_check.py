"""Count how often the plausibility check of poses speaks, on right walks and on wrong ones.

    python -m benchmarks.pose_check

prints, for each kind of walk, false alarms of rightly written cameras and, for each mistake, how
many walks were told of. Every walk is given to a session's check chunk by chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from lipass.options import ViewOptions
from lipass.policy.convention import Convention
from lipass.policy.plausibility import PoseCheck
from lipass.policy.trajectory import parse_trajectory

WALKS, LATENTS, CHUNK = 40, 64, 4
FLIP = np.diag([1.0, -1.0, -1.0, 1.0])
VIEW = ViewOptions(chunk_latents=CHUNK, hfov_deg=60.0, vfov_deg=35.0, near=0.5, far=8.0)

Random = np.random.Generator
Poses = np.ndarray


def keys(random: Random, moves: dict[str, float], step_m: float = 0.08, deg: float = 3.0) -> Poses:
    """Hold keys down for 3 to 12 latents each."""
    names, weights = list(moves), np.array(list(moves.values()))
    items, left = [], LATENTS
    while left > 0:
        many = int(random.integers(3, 13))
        items.append(f"{random.choice(names, p=weights / weights.sum())}-{many}")
        left -= many
    return parse_trajectory(", ".join(items), step_m=step_m, step_deg=deg).numpy()[:LATENTS]


def looking(position: Poses, forward: Poses, roll: Poses | float = 0.0) -> Poses:
    """World-to-camera matrices from centres and directions of view, y down."""
    forward = forward / np.linalg.norm(forward, axis=1, keepdims=True)
    right = np.cross(np.array([0.0, 1.0, 0.0]), forward)
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    down = np.cross(forward, right)
    c, s = np.cos(roll), np.sin(roll)
    c, s = np.broadcast_to(c, len(right))[:, None], np.broadcast_to(s, len(right))[:, None]
    right, down = c * right + s * down, c * down - s * right
    w2c = np.tile(np.eye(4), (len(position), 1, 1))
    w2c[:, :3, :3] = np.stack([right, down, forward], 1)
    w2c[:, :3, 3] = -(w2c[:, :3, :3] @ position[:, :, None])[:, :, 0]
    return w2c


def _yaw(angle: Poses) -> Poses:
    return np.stack([np.sin(angle), 0 * angle, np.cos(angle)], 1)


def _smooth(random: Random, size: int, scale: float) -> Poses:
    """Smooth noise `[LATENTS, size]` of about that standard deviation."""
    knots = random.normal(size=(LATENTS // 8 + 2, size)) * scale
    at = np.linspace(0, len(knots) - 1.001, LATENTS)
    low = at.astype(int)
    part = (1 - np.cos(np.pi * (at - low)))[:, None] / 2
    return knots[low] * (1 - part) + knots[low + 1] * part


def stick(random: Random) -> Poses:
    """A game pad: direction of motion and of view change smoothly, apart from each other."""
    yaw = np.cumsum(_smooth(random, 1, 0.05)[:, 0])
    aside, ahead = _smooth(random, 2, 0.07).T
    right = _yaw(yaw + math.pi / 2)
    steps = right * aside[:, None] + _yaw(yaw) * ahead[:, None]
    return looking(np.cumsum(steps, 0), _yaw(yaw))


def analog(random: Random) -> Poses:
    """Forward with the mouse turning the view: speed and turn are smooth."""
    yaw = np.cumsum(_smooth(random, 1, 0.06)[:, 0])
    speed = 0.08 + _smooth(random, 1, 0.02)
    return looking(np.cumsum(_yaw(yaw) * speed, 0), _yaw(yaw))


def orbit(random: Random) -> Poses:
    """Round a thing, looking at it, sometimes nearer or farther; its middle may be the origin."""
    nearer = _smooth(random, 1, 0.3) * (random.random() < 0.5)
    radius = np.maximum(0.2, random.uniform(0.5, 4) + nearer)
    angle = np.cumsum(np.full(LATENTS, random.choice([-1, 1]) * random.uniform(0.02, 0.12)))
    height = random.uniform(-1, 1)
    place = _yaw(angle) * radius
    place[:, 1] += height
    return looking(place, -place)


def orbit_and_zoom(random: Random) -> Poses:
    """A turntable: turns about the origin and moves to and from it, one at a time."""
    angle, radius, angles, radii = 0.0, random.uniform(1.0, 3.0), [], []
    while len(angles) < LATENTS:
        turn, zoom = random.choice([-0.1, 0.1]), random.choice([-0.1, 0.1])
        mode = random.random() < 0.5
        for _ in range(int(random.integers(3, 12))):
            angle += turn * mode
            radius = max(0.5, radius + zoom * (not mode))
            angles.append(angle)
            radii.append(radius)
    place = _yaw(np.array(angles[:LATENTS])) * np.array(radii[:LATENTS])[:, None]
    return looking(place, -place)


def outward(random: Random) -> Poses:
    """A swinging arm: round a middle, looking away from it."""
    angle = np.cumsum(np.full(LATENTS, random.choice([-1, 1]) * random.uniform(0.02, 0.12)))
    place = _yaw(angle) * random.uniform(0.1, 3)
    return looking(place, place)


def flight(random: Random) -> Poses:
    """Along a smooth path, looking ahead, rolling in curves."""
    speed = np.stack([*_smooth(random, 2, 0.06).T, 0.1 + _smooth(random, 1, 0.03)[:, 0]], 1)
    return looking(np.cumsum(speed, 0), speed, _smooth(random, 1, 0.2)[:, 0])


def watching_flight(random: Random) -> Poses:
    """Along a smooth path, looking at one thing."""
    place = np.cumsum(_smooth(random, 3, 0.08), 0)
    return looking(place, random.normal(size=3) * 3 + np.array([0, 0, 8.0]) - place)


def train(random: Random) -> Poses:
    """Along a line, while the head turns now and then."""
    yaw, moved, yaws, way = random.uniform(-3, 3), 0.0, [], []
    both = random.random() < 0.5
    while len(yaws) < LATENTS:
        turn, rides = random.uniform(-0.12, 0.12), random.random() < 0.6
        for _ in range(int(random.integers(3, 10))):
            yaw += turn if both or not rides else 0
            moved += 0.1 if both or rides else 0
            yaws.append(yaw)
            way.append(moved)
    line = np.array([[0.0, 0, 1.0]]) * np.array(way[:LATENTS])[:, None]
    return looking(line, _yaw(np.array(yaws[:LATENTS])))


def still(random: Random) -> Poses:
    """Stand, with a hand that trembles or a chest that breathes, and perhaps look about."""
    shake = random.normal(size=(LATENTS, 3)) * random.choice([0, 0.001, 0.005])
    breath = 0.004 * np.sin(np.arange(LATENTS) * random.uniform(0.1, 0.5))
    shake[:, 1] += breath * random.integers(0, 2)
    yaw = np.cumsum(_smooth(random, 1, random.choice([0.0, 0.06]))[:, 0])
    return looking(shake, _yaw(yaw))


def on_the_spot(random: Random) -> Poses:
    """Turn and look up and down, anywhere."""
    return keys(random, {"left": 1, "right": 1, "up": 0.5, "down": 0.5})


def trembling_turn(random: Random) -> Poses:
    """Turn on the spot, away from the origin, with a hand that trembles."""
    yaw = np.cumsum(_smooth(random, 1, 0.08)[:, 0])
    shake = random.normal(size=(LATENTS, 3)) * random.choice([1e-6, 0.001, 0.01])
    return looking(shake + random.normal(size=3) * 2, _yaw(yaw))


def trackball(random: Random) -> Poses:
    """Round the origin over all of a ball, nearer and farther."""
    yaw, pitch, away = np.cumsum(_smooth(random, 3, 0.08), 0).T
    place = np.stack([np.sin(yaw) * np.cos(pitch), np.sin(pitch), np.cos(yaw) * np.cos(pitch)], 1)
    place[:, 1] = np.clip(place[:, 1], -0.95, 0.95)
    return looking(place * np.maximum(0.5, 2 + away)[:, None], -place)


def car(random: Random) -> Poses:
    """A car with a camera that looks ahead, back or aside: up to 3 m a latent."""
    yaw = np.cumsum(_smooth(random, 1, 0.03)[:, 0])
    speed = random.uniform(0.5, 2.5) + np.clip(_smooth(random, 1, 0.2), -0.4, 0.4)
    where = yaw + random.choice([0, 0, math.pi / 2, math.pi / 6])
    return looking(np.cumsum(_yaw(yaw) * speed, 0), _yaw(where))


def slow(random: Random) -> Poses:
    """A dolly, 1 to 2 cm a latent, forward or along an arc."""
    yaw = np.arange(LATENTS) * random.choice([0, 0.01, 0.03])
    return looking(np.cumsum(_yaw(yaw) * random.uniform(0.01, 0.02), 0), _yaw(yaw))


def pulling_back(random: Random) -> Poses:
    """Backwards all the way, once round a corner at most."""
    turn, way = int(random.integers(1, 21)), random.integers(10, 30)
    text = f"s-{way}, {random.choice(['left', 'right'])}-{turn}, s-{LATENTS}"
    return parse_trajectory(text).numpy()[:LATENTS]


def paper(random: Random) -> Poses:
    """The walks of the paper's protocols, HY-WorldPlay's and Matrix-Game's."""
    text, options = [
        ("left-30, right-33", {}),
        ("w-30, s-33", {}),
        ("left-31, right-32", {}),
        ("w-31, s-32", {}),
        ("left-176, right-160", {"step_m": 0.1235, "step_deg": 1.5}),
        ("w-176, s-160", {"step_m": 0.1235, "step_deg": 1.5}),
    ][int(random.integers(0, 6))]
    return parse_trajectory(text, **options).numpy()


def tinyworld(random: Random) -> Poses:
    """What TinyWorld is trained on: a person in a room that turns where a wall is."""
    from lipass.examples.tinyworld.world import make_room, random_walk

    seed = int(random.integers(0, 9000))
    generator = torch.Generator().manual_seed(seed)
    return random_walk(make_room(seed), LATENTS, generator).numpy()


def tinyworld_paths(random: Random) -> Poses:
    """The walks of TinyWorld's demo."""
    from lipass.examples.tinyworld.scenario import PATHS, REGIMES, camera_path
    from lipass.examples.tinyworld.world import make_room

    room = make_room(9000 + int(random.integers(0, 50)))
    return camera_path(str(random.choice(PATHS)), str(random.choice(REGIMES)), room)[0].numpy()


ALL = {"w": 1, "s": 1, "a": 1, "d": 1, "left": 1, "right": 1, "up": 0.3, "down": 0.3}
PERSON = {"w": 6, "s": 0.5, "a": 1, "d": 1, "left": 2, "right": 2, "up": 0.3, "down": 0.3}
EXPLORER = {"w": 3, "left": 1, "right": 1}
KINDS: dict[str, Callable[[Random], Poses]] = {
    "paper": paper,
    "tinyworld": tinyworld,
    "tinyworld-demo": tinyworld_paths,
    "keys": lambda random: keys(random, ALL),
    "keys-1.5deg": lambda random: keys(random, ALL, 0.1235, 1.5),
    "person": lambda random: keys(random, PERSON),
    "explorer": lambda random: keys(random, EXPLORER, 0.12, 6.0),
    "strafing": lambda random: keys(random, {"a": 1, "d": 1, "left": 1, "right": 1}),
    "no-forward": lambda random: keys(random, {"s": 2, "a": 1, "d": 1, "left": 1, "right": 1}),
    "mouse": analog,
    "stick": stick,
    "flight": flight,
    "watching": watching_flight,
    "orbit": orbit,
    "turntable": orbit_and_zoom,
    "outward": outward,
    "train": train,
    "still": still,
    "on-the-spot": on_the_spot,
    "trembling-turn": trembling_turn,
    "trackball": trackball,
    "car": car,
    "slow": slow,
    "pulling-back": pulling_back,
}


def placed(w2c: Poses, random: Random) -> Poses:
    """Leave the world as it is, or put its origin and axes elsewhere."""
    how = random.integers(0, 3)
    if how == 0:
        return w2c
    if how == 1:
        return w2c @ np.linalg.inv(w2c[0])
    turn, _ = np.linalg.qr(random.normal(size=(3, 3)))
    move = np.eye(4)
    move[:3, :3] = turn * np.sign(np.linalg.det(turn))
    move[:3, 3] = random.normal(size=3) * random.choice([1.0, 10.0])
    return w2c @ move


def scaled(by: float) -> Callable[[Poses], Poses]:
    """Change the unit."""

    def change(w2c: Poses) -> Poses:
        w2c = w2c.copy()
        w2c[:, :3, 3] *= by
        return w2c

    return change


MISTAKES: dict[str, Callable[[Poses], Poses]] = {
    "right": lambda w2c: w2c,
    "c2w": np.linalg.inv,
    "w2c-opengl": lambda w2c: FLIP @ w2c,
    "c2w-opengl": lambda w2c: np.linalg.inv(FLIP @ w2c),
    "mm": scaled(1000.0),
    "cm": scaled(100.0),
    "x0.05": scaled(0.05),
    "x0.001": scaled(0.001),
}


def said(w2c: Poses, view: ViewOptions = VIEW, convention: str = "w2c-opencv") -> str | None:
    """Give a walk to a check, chunk by chunk; return what it says."""
    check = PoseCheck(view, Convention.parse(convention))
    cameras = torch.from_numpy(np.ascontiguousarray(w2c, dtype=np.float64))
    for start in range(0, len(cameras), CHUNK):
        new = cameras[start : start + CHUNK]
        if (told := check.look("main", cameras[:start], new)) is not None:
            return told
    return None


def walks(kind: str, count: int = WALKS) -> Iterator[Poses]:
    """Make walks of a kind, the same ones each time."""
    random = np.random.default_rng([ord(letter) for letter in kind])
    for _ in range(count):
        yield placed(KINDS[kind](random), random)


def main() -> None:
    """Print the table."""
    print(f"{'walk':16}" + "".join(f"{name:>12}" for name in MISTAKES))
    for kind in KINDS:
        counts = [
            sum(said(wrong(one)) is not None for one in walks(kind)) for wrong in MISTAKES.values()
        ]
        print(f"{kind:16}" + "".join(f"{count:>9}/{WALKS}" for count in counts))


if __name__ == "__main__":
    main()
