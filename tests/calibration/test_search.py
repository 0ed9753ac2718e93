import pytest

from lipass.calibration.costs import fit
from lipass.calibration.frontier import Cost
from lipass.calibration.ladders import choice_of, ladders, nearest
from lipass.calibration.search import Tried, around, frontier, search, thinned
from lipass.calibration.subject import Took
from lipass.config import Config
from lipass.errors import LipassError

# Nothing is as good.
NO_DEFAULT = 1e9


def whole(choice, ms, db):
    return Tried(choice, (ms,), (db,))


def test_the_frontier_is_what_nothing_is_both_faster_and_closer_than():
    one, two, three = whole((0,), 90.0, 50.0), whole((1,), 60.0, 40.0), whole((2,), 30.0, 30.0)
    slow, part = whole((3,), 95.0, 45.0), Tried((4,), (1.0,), (60.0,), whole=False)
    assert frontier([three, slow, one, part, two]) == [one, two, three]


def test_of_equal_results_the_first_rung_stays():
    assert [one.choice for one in frontier([whole((1,), 5, 30), whole((0,), 5, 30)])] == [(0,)]


class Model:
    """Three ladders of four rungs; the second costs no quality down to its third rung."""

    rungs = (4, 4, 4)

    def __init__(self):
        self.asked = []

    def measure(self, choice, walk):
        self.asked.append((choice, walk))
        dear = 100.0 - 10 * choice[0] - 15 * choice[1] - 5 * choice[2]
        lost = 3.0 * choice[0] + 2.0 * choice[2] + (12.0 if choice[1] == 3 else 0.0)
        return dear, 50.0 - lost - 0.5 * walk


def test_a_search_finds_what_costs_no_quality_without_trying_all():
    model = Model()
    tried = search(model.rungs, [(0, 0, 0), (3, 3, 3)], 3, model.measure, 40, NO_DEFAULT)
    found = [one.choice for one in frontier(tried)]
    assert len(tried) <= 40
    assert found[0] == (0, 2, 0)
    assert all(choice[1] == 2 for choice in found[:-3])


def test_what_is_clearly_beaten_is_given_up_after_two_walks():
    model = Model()
    tried = search(model.rungs, [(0, 2, 0)], 5, model.measure, 40, NO_DEFAULT)
    given_up = [one for one in tried if not one.whole]
    assert given_up
    assert {len(one.ms) for one in given_up} == {2}
    assert not {one.choice for one in given_up} & {one.choice for one in frontier(tried)}


def test_a_search_stops_where_nothing_is_left_to_try():
    tried = search(
        (2, 2), [(0, 0)], 1, lambda choice, walk: (1.0 / (1 + sum(choice)), 30.0), 99, NO_DEFAULT
    )
    assert len(tried) <= 4
    assert [one.choice for one in frontier(tried)] == [(1, 1)]


def test_no_more_is_tried_than_was_allowed():
    model, noted = Model(), []
    tried = search(
        model.rungs, [(0, 0, 0), (3, 3, 3)], 1, model.measure, 5, NO_DEFAULT, noted.append
    )
    assert len(tried) == len(noted) == 5
    assert len(search(model.rungs, [(0, 0, 0), (3, 3, 3)], 1, model.measure, 1, NO_DEFAULT)) == 1


def test_around_a_choice_each_ladder_moves_by_one():
    assert list(around((0, 1), (2, 2))) == [(1, 1), (0, 0)]


def test_thinning_keeps_both_ends_and_what_lies_apart():
    found = [whole((n,), ms, 50 - n) for n, ms in enumerate((100.0, 98.0, 60.0, 58.0, 30.0))]
    kept = [one.time for one in thinned(found, 3, NO_DEFAULT)]
    assert kept[0] == 100.0
    assert kept[-1] == 30.0
    assert kept[1] in (58.0, 60.0)
    assert thinned(found[:2], 3, NO_DEFAULT) == found[:2]


def test_thinning_keeps_what_would_be_the_default():
    found = [whole((n,), ms, 50 - n) for n, ms in enumerate((100.0, 98.0, 60.0, 58.0, 30.0))]
    for default in found:
        assert default in thinned(found, 3, default.db)


def test_every_other_try_is_next_to_the_default():
    """Costs rise with quality on both ladders, so that all choices are on the frontier."""

    def measure(choice, walk):
        return 100.0 - 2 * choice[0] - 3.1 * choice[1], 50.0 - choice[0] - 1.5 * choice[1]

    noted = []
    search((12, 12), [(0, 0), (11, 11), (6, 6)], 1, measure, 30, 40.0, noted.append)
    near = 0
    for number in range(3, len(noted)):
        front = [one for one in frontier(noted[:number]) if one.db >= 40.0]
        near += noted[number].choice in set(around(front[-1].choice, (12, 12)))
    assert near >= 10


def took(cost, pairs, factor=1.0):
    return [Took(n, steps, cost.ms(n, steps) * factor) for n, steps in pairs]


PAIRS = [(n, steps) for n in (4, 8, 12, 20) for steps in (2, 4)]


def test_a_cost_is_found_again():
    cost = Cost(5.0, 1.0, 4.0, 0.5)
    found = fit(took(cost, PAIRS))
    assert all(abs(found.ms(*pair) / cost.ms(*pair) - 1) < 1e-4 for pair in PAIRS)


def test_a_cost_of_few_kinds_of_chunks_is_never_negative():
    for pairs in ([(8, 4)], [(8, 4), (20, 4)], [(0, 4), (8, 2)]):
        found = fit(took(Cost(5.0, 1.0, 4.0, 0.5), pairs))
        assert min(vars(found).values()) >= 0
        assert found.ms(20, 4) >= found.ms(8, 2)


def test_chunks_in_which_something_was_compiled_do_not_count():
    cost = Cost(5.0, 1.0, 4.0, 0.5)
    odd = [Took(8, 4, 9e4, compiled=True)]
    assert abs(fit(took(cost, PAIRS) + odd).ms(8, 4) / cost.ms(8, 4) - 1) < 1e-4
    with pytest.raises(LipassError, match="chunks in which nothing is compiled, got none"):
        fit(odd)


HALF = "window of 2 latents"


def labels(config, name, most=20, steps=4):
    return [one.label for one in ladders(config, most, steps).get(name, ())]


def test_ladders_go_from_dear_to_cheap_and_no_further_than_the_dense_loop():
    config = Config.resolve("all")
    assert labels(config, "memory", most=8) == [
        "memory 4", "memory 3", "memory 2", "memory 1", "memory 0",
    ]  # fmt: skip
    assert labels(config, "window") == ["window 4", "window 3", "window 2", "window 1", HALF]
    assert labels(config, "window", most=8) == ["window 2", "window 1", HALF]
    assert labels(config, "steps") == [
        "all steps", "2 steps on revisits from 0.8", "2 steps on revisits from 0.65", "3 steps",
        "2 steps",
    ]  # fmt: skip


def test_many_steps_are_spread_evenly():
    ladder = ladders(Config.resolve("all"), 20, 30)["steps"]
    assert [one.label for one in ladder[3:]] == ["22 steps", "15 steps", "10 steps", "2 steps"]
    reused = ladder[5].options["steps.reuse"]
    assert len(reused) == 20
    assert not {0, 29} & {*reused}
    Config.resolve("all", dict(ladder[5].options))


def test_what_is_off_or_fixed_has_no_ladder():
    assert "steps" not in ladders(Config.resolve("context"), 20, 4)
    assert "steps" not in ladders(Config.resolve("all"), 20, 2)
    assert set(ladders(Config.resolve("cache"), 20, 4)) == {"steps"}
    assert not ladders(Config.resolve("reference"), 20, 4)
    fixed = Config.resolve("all", {"context.window_latents": 4})
    assert "window" not in ladders(fixed, 20, 4)


def test_caches_by_chunk_are_calibrated_by_chunk():
    config = Config.resolve("all", {"context.memory_chunks": 8})
    assert labels(config, "memory", most=80)[0] == "memory chunks 16"


def test_every_rung_is_an_option_that_sessions_take():
    for ladder in ladders(Config.resolve("all"), 20, 4).values():
        for one in ladder:
            Config.resolve("all", dict(one.options))


def test_a_search_begins_at_the_rung_of_the_options():
    config = Config.resolve("all", {"context.memory_latents": 7})
    found = ladders(config, 20, 4)
    assert found["memory"][nearest(found["memory"], config)].label in ("memory 8", "memory 6")
    assert found["steps"][nearest(found["steps"], config)].label == "2 steps on revisits from 0.8"


def test_a_point_stands_on_its_own_rungs():
    found = ladders(Config.resolve("all"), 20, 4)
    for place in range(5):
        choice = tuple(min(place, len(ladder) - 1) for ladder in found.values())
        rungs = zip(found.values(), choice, strict=True)
        options = {key: value for ladder, i in rungs for key, value in ladder[i].options.items()}
        assert choice_of(found, {"preset": "all"}, options) == choice


def test_a_point_between_rungs_stands_on_the_nearest():
    found = ladders(Config.resolve("all"), 20, 4)
    choice = choice_of(found, {"preset": "all"}, {"context.memory_latents": 14})
    assert found["memory"][dict(zip(found, choice, strict=True))["memory"]].label in (
        "memory 16", "memory 12",
    )  # fmt: skip
