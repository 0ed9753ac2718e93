// Refuse tensors that would be read past their end: kernels go by the sizes of queries and grids.

#pragma once

#include <ATen/core/Tensor.h>

namespace {

// Check that `x` has these sizes; -1 is any.
inline void check_sizes(const char* name, const at::Tensor& x, at::IntArrayRef sizes) {
  bool fits = x.dim() == static_cast<int64_t>(sizes.size());
  for (size_t n = 0; fits && n < sizes.size(); ++n) fits = sizes[n] == -1 || x.size(n) == sizes[n];
  TORCH_CHECK(fits, name, " must be ", sizes, ", got ", x.sizes(),
              "; pass what belongs to these queries and grids");
}

}  // namespace
