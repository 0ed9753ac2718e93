"""Find writes to a cache that each step of a loop makes anew, in the same place.

A step may be skipped although it writes, if the step behind it writes over the same tokens before
anything reads them: what the last computed step wrote then stands, as its output does.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from lipass.passes.attention.cache_writes import Place, place_read, written
from lipass.passes.graph.compat import known_true, value
from lipass.passes.graph.region import Region
from lipass.passes.graph.writes import memory_written, storage


def overwrites(region: Region) -> dict[Node, Node]:
    """Return the writes of a region that its next run makes undone, and the input of each.

    A write counts if it fills a slice of an input whose ends are sizes that the region is given,
    and nothing has read the slice before it. Whether the ends are those of the run before, and
    whether others have written to the input since, shows when the region is about to be skipped.
    """
    order = {node: i for i, node in enumerate(region.nodes)}
    inputs = {storage(value(node)): node for node in region.inputs}
    inputs.pop(None, None)
    found: dict[Node, Node] = {}
    for node in region.nodes:
        given = [inputs[at] for at in memory_written(node) if at in inputs]
        place = written(node) if len(given) == 1 else None
        if place is None or place[0].cache is not given[0]:
            continue
        if _is_given(place[0]) and not _is_read_before(place[0], node, order):
            found[node] = given[0]
    return found


def _is_given(place: Place) -> bool:
    """Whether both ends of a place are numbers, or computed from sizes alone."""
    todo = [end for end in (place.start, place.stop) if isinstance(end, Node)]
    while todo:
        node = todo.pop()
        if not isinstance(value(node), (int, torch.SymInt)):
            return False
        todo += [
            above for above in node.all_input_nodes if not isinstance(value(above), torch.Tensor)
        ]
    return True


def _is_read_before(place: Place, write: Node, order: dict[Node, int]) -> bool:
    """Whether anything may have read the tokens of a place, or written them, before the write."""
    for user in place.cache.users:
        if user is write or user in write.all_input_nodes or order.get(user, -1) > order[write]:
            continue
        read = place_read(user, place.axis)
        if read is None or read.cache is not place.cache:
            return True
        if not known_true(read.last() <= place.first()):
            return True
    return False
