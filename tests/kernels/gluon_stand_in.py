"""Run a Gluon kernel's own code on the host: its parts in turns, its loads as late as they may be.

Parts that run on warps of their own are threads of which one goes on at a time, chosen at random
at each barrier. Loads of the TMA unit land at any time after they were asked for, in memory that
holds NaN before. Products are computed twice, where they are begun and where they are waited for,
and must be equal: nothing may be written under them. Where nobody can go on, that is an error.

It knows no layouts, warps or instructions, so what it cannot see is whether the compiler keeps the
order of what the code says.
"""

import random
import threading
from types import FunctionType, SimpleNamespace

import torch


class Deadlock(AssertionError):
    """Nobody can go on."""


class Scheduler:
    """Let one part of a program go on at a time."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.hurry = {}  # some parts are slow, so that others go on as far as they can
        self.coming = []  # loads that have not landed
        self.here = threading.local()
        self.waiting = {}
        self.failure = None

    def wait_until(self, ready):
        """Called by a part: give way until it holds."""
        if not hasattr(self.here, "name"):  # alone, before the parts begin
            assert ready()
            return
        self.waiting[self.here.name] = ready
        self.control.set()
        self.here.turn.wait()
        self.here.turn.clear()
        if self.failure is not None:
            raise SystemExit

    def run(self, parts):
        """Run parts to their ends."""
        self.control, turns, threads = threading.Event(), {}, {}
        for name, part in parts.items():
            turns[name] = threading.Event()
            threads[name] = threading.Thread(target=self._part, args=(name, part, turns[name]))
            self.waiting[name] = lambda: True
            threads[name].start()
        while self.waiting and self.failure is None:
            able = [name for name, ready in self.waiting.items() if ready()]
            choices = able + ["a load"] * bool(self.coming)
            if not choices:
                self.failure = Deadlock(f"nobody can go on: {sorted(self.waiting)} wait")
                break
            pace = [self.hurry.setdefault(one, self.random.choice((1, 9, 99))) for one in choices]
            (one,) = self.random.choices(choices, pace)
            if one == "a load":
                self.coming.pop(self.random.randrange(len(self.coming)))()
                continue
            del self.waiting[one]
            self.control.clear()
            turns[one].set()
            self.control.wait()
        for turn in turns.values():
            turn.set()
        for thread in threads.values():
            thread.join()
        if self.failure is not None:
            raise self.failure
        assert not self.coming  # a load that lands after the end would write over others

    def _part(self, name, part, turn):
        self.here.name, self.here.turn, self.here.begun = name, turn, []
        turn.wait()
        turn.clear()
        try:
            if self.failure is None:
                with torch.inference_mode():
                    part()
        except SystemExit:
            pass
        except BaseException as error:
            self.failure = error
        self.control.set()


class Barrier:
    """Counts arrivals and bytes; each time all are there, a phase is over."""

    def __init__(self):
        self.expected = self.arrived = self.bytes = self.phases = 0

    def add(self, arrivals=0, count=0):
        self.arrived += arrivals
        self.bytes += count
        assert self.arrived <= self.expected, "more have arrived than a phase waits for"
        if self.arrived == self.expected and self.bytes == 0:
            self.arrived = 0
            self.phases += 1


class Barriers:
    """Barriers in shared memory."""

    def __init__(self, made):
        self.made = made

    def index(self, n):
        return Barriers([self.made[n]])

    @property
    def one(self):
        (found,) = self.made
        return found


class Memory:
    """A view of shared memory."""

    def __init__(self, held):
        self.held, self.dtype = held, held.dtype

    def index(self, n):
        return Memory(self.held[n])

    def reshape(self, shape):
        return Memory(self.held.view(*shape))

    def permute(self, axes):
        return Memory(self.held.permute(*axes))

    def store(self, value):
        self.held.copy_(value)


class Pointer:
    """An address in the memory of a tensor."""

    def __init__(self, tensor, at=0):
        self.flat, self.at = tensor.view(-1), at

    def __add__(self, other):
        return Pointer(self.flat, self.at + other)


class Int(int):
    """A number of a program, which can be made wider."""

    def to(self, dtype):
        return int(self)


class Product:
    """A product that runs while its warps go on."""

    def __init__(self, a, b, acc):
        self.given, self.begun = (a, b, acc), self._compute_of(a, b, acc)
        self.done = None

    @staticmethod
    def _compute_of(a, b, acc):
        a, b = (x.held if isinstance(x, Memory) else x for x in (a, b))
        return a.float() @ b.float() + (0 if acc is None else acc)

    def finish(self):
        self.done = self._compute_of(*self.given)
        assert torch.equal(self.done, self.begun), "memory was written under a product"
        assert not self.done.isnan().any(), "a product read what had not landed"


class Kernel:
    """Stands for a compiled kernel: `kernel[programs](*args, **constants)`."""

    def __init__(self, kernel, module, seed=0):
        self.kernel, self.module, self.seed = kernel, module, seed
        self.programs = 0

    def __getitem__(self, grid):
        return lambda *args, **options: self._launch(grid, args, options)

    def _launch(self, grid, args, options):
        assert options.pop("num_warps") == 4
        names = [parameter.name for parameter in self.kernel.params]
        given = dict(zip(names, args, strict=False)) | options
        assert set(given) == set(names)  # nothing is left out, nothing is given twice
        assert len(args) + len(options) == len(names)
        for name, x in given.items():
            if name.endswith("_ptr"):
                given[name] = Pointer(x)
            if name.endswith("_desc"):
                given[name] = SimpleNamespace(**vars(x), dtype=x.base.dtype)
        for first in range(grid[0]):
            for second in range(grid[1]):
                self.programs += 1
                scheduler = Scheduler(f"{self.seed} {first} {second}")
                run = self._functions(scheduler, (first, second))[self.kernel.__name__]
                run(**given)

    def _functions(self, scheduler, program):
        language = _language(scheduler, program)
        names = dict(vars(self.module)) | language
        for name, found in vars(self.module).items():
            if hasattr(found, "fn"):
                names[name] = FunctionType(found.fn.__code__, names, name)
        return names


def _language(scheduler, program):
    """Make what the kernel calls of Gluon, for one program."""

    def load(pointer, mask=None, other=None):
        if isinstance(pointer.at, torch.Tensor):
            found = pointer.flat[pointer.at.clamp(max=pointer.flat.numel() - 1)]
            return found if mask is None else torch.where(mask, found, other)
        return int(pointer.flat[int(pointer.at)])

    def store(pointer, value, mask):
        pointer.flat[pointer.at[mask]] = value[mask]

    def allocate(dtype, shape, layout):
        if dtype == torch.int64:
            return Barriers([Barrier() for _ in range(shape[0])])
        return Memory(torch.full(shape, torch.nan, dtype=dtype))

    def specialize(parts, warps, registers):
        assert (warps, registers) == ([4, 1], [240, 24])
        scheduler.run(
            {n: lambda f=f, given=given: f(*given) for n, (f, given) in enumerate(parts)}
        )

    def box(descriptor, at):
        """Where a box meets its tensor, in both."""
        spans = zip(at, descriptor.block_shape, descriptor.shape, strict=True)
        clipped = [(first, max(0, min(first + size, most) - first)) for first, size, most in spans]
        view = descriptor.base.as_strided(
            descriptor.shape, descriptor.strides, descriptor.base.storage_offset()
        )
        return view[tuple(slice(a, a + n) for a, n in clipped)], tuple(
            slice(n) for _, n in clipped
        )

    def fetch(descriptor, at, barrier, memory):
        assert list(memory.held.shape) == list(descriptor.block_shape)

        def land():
            found, inside = box(descriptor, at)
            memory.held.zero_()
            memory.held[inside] = found
            barrier.one.add(count=-2 * memory.held.numel())

        scheduler.coming.append(land)
        scheduler.wait_until(lambda: True)

    def leave(descriptor, at, memory):
        found, inside = box(descriptor, at)
        found.copy_(memory.held.view(*descriptor.block_shape)[inside])

    def wait(barrier, parity, pred=True):
        if pred:
            scheduler.wait_until(lambda: barrier.one.phases & 1 != parity)

    def begin(a, b, acc, use_acc=True, is_async=False):
        assert is_async
        made = Product(a, b, acc if use_acc else None)
        scheduler.here.begun.append(made)
        scheduler.wait_until(lambda: True)
        return made

    def end(outstanding, deps):
        scheduler.wait_until(lambda: True)
        begun = scheduler.here.begun
        while len(begun) > outstanding:
            begun.pop(0).finish()
        found = tuple(x.done if isinstance(x, Product) else x for x in deps)
        assert all(x is not None for x in found), "a product is used that was not waited for"
        return found if len(found) > 1 else found[0]

    layout = lambda *_, **__: None  # noqa: E731
    gl = SimpleNamespace(
        program_id=lambda axis: Int(program[axis]), cdiv=lambda a, b: -(-a // b),
        load=load, store=store, allocate_shared_memory=allocate, warp_specialize=specialize,
        static_range=range, where=torch.where, exp2=torch.exp2, log2=torch.log2,
        maximum=torch.maximum, max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis),
        arange=lambda first, end, layout: torch.arange(first, end),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        convert_layout=lambda x, layout: x, NVMMADistributedLayout=layout, SliceLayout=layout,
        DotOperandLayout=layout, BlockedLayout=layout, NVMMASharedLayout=layout,
        float32=torch.float32, int32=torch.int32, int64=torch.int64,
    )  # fmt: skip
    return {
        "gl": gl,
        "mbarrier": SimpleNamespace(
            wait=wait, MBarrierLayout=layout,
            init=lambda barrier, count: setattr(barrier.one, "expected", count),
            expect=lambda barrier, count: barrier.one.add(1, count),
            arrive=lambda barrier, count: barrier.one.add(count),
        ),
        "tma": SimpleNamespace(
            async_copy_global_to_shared=fetch, async_copy_shared_to_global=leave,
            store_wait=lambda pendings: None,
        ),
        "fence_async_shared": lambda: None,
        "warpgroup_mma": begin,
        "warpgroup_mma_wait": end,
    }  # fmt: skip
