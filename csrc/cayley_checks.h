// What both implementations of the Cayley ops demand of a weight.
#pragma once
#include <ATen/core/Tensor.h>

#include <limits>

namespace vkd::cayley {

inline void check_weight(const at::Tensor& weight) {
  TORCH_CHECK_VALUE(weight.dim() >= 2 && weight.size(-2) >= weight.size(-1) && weight.size(-1) > 0,
                    "weight must have the shape (..., T, S) with T >= S >= 1; got ", weight.sizes());
  TORCH_CHECK_TYPE(weight.scalar_type() == at::kFloat || weight.scalar_type() == at::kDouble,
                   "weight must be float32 or float64; got ", weight.scalar_type());
  TORCH_CHECK_VALUE(weight.size(-2) <= std::numeric_limits<int>::max(), "weight has too many rows: ", weight.sizes());
}

}  // namespace vkd::cayley
