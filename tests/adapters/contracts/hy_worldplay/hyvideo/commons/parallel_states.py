"""How many processes share a sequence; made at the first call, on CUDA."""


class ParallelDims:
    def __init__(self, sp=1):
        self.sp, self.world_size = sp, 1
        raise RuntimeError("no mesh of CUDA devices on this machine")

    @property
    def sp_enabled(self):
        return self.sp > 1


__parallel_dims = None


def get_parallel_state():
    global __parallel_dims
    if __parallel_dims is None:
        __parallel_dims = ParallelDims()
    return __parallel_dims
