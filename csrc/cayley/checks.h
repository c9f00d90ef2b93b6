// What both implementations of the Cayley ops demand of their arguments, and the one batch dimension they work on.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

namespace vkd::cayley {

inline void check_weight(const at::Tensor& weight) {
  TORCH_CHECK_VALUE(weight.dim() >= 2 && weight.size(-2) >= weight.size(-1) && weight.size(-1) > 0,
                    "weight must have the shape (..., T, S) with T >= S >= 1; got ", weight.sizes());
  TORCH_CHECK_TYPE(weight.scalar_type() == at::kFloat || weight.scalar_type() == at::kDouble,
                   "weight must be float32 or float64; got ", weight.scalar_type());
  constexpr int64_t MOST_ROWS = int64_t(1) << 30;  // the kernels count rows, rounded up to whole tiles, with int
  TORCH_CHECK_VALUE(weight.size(-2) <= MOST_ROWS, "weight must have at most ", MOST_ROWS, " rows; got ",
                    weight.sizes());
}

// (..., S, S) for a weight (..., T, S)
inline std::vector<int64_t> r_sizes(const at::Tensor& weight) {
  auto sizes = weight.sizes().vec();
  sizes[sizes.size() - 2] = weight.size(-1);
  return sizes;
}

inline void check_gradient(const at::Tensor& grad_q, const at::Tensor& weight, const at::Tensor& r) {
  check_weight(weight);
  TORCH_CHECK_VALUE(grad_q.sizes() == weight.sizes(), "grad_q must have the weight's shape ", weight.sizes(), "; got ",
                    grad_q.sizes());
  const auto square = r_sizes(weight);
  TORCH_CHECK_VALUE(r.sizes() == at::IntArrayRef(square), "r must have the shape ", at::IntArrayRef(square), "; got ",
                    r.sizes());
  TORCH_CHECK_TYPE(grad_q.scalar_type() == weight.scalar_type(), "grad_q must be ", weight.scalar_type(),
                   " as the weight is; got ", grad_q.scalar_type());
  TORCH_CHECK_TYPE(r.scalar_type() == at::kDouble, "r must be float64; got ", r.scalar_type());
  TORCH_CHECK_VALUE(grad_q.device() == weight.device() && r.device() == weight.device(),
                    "grad_q and r must be on the weight's device ", weight.device(), "; got ", grad_q.device(), " and ",
                    r.device());
}

// (..., T, S) as (batch, T, S): a view where the strides allow it.
inline at::Tensor as_batch(const at::Tensor& x) { return x.dim() == 2 ? x.unsqueeze(0) : x.flatten(0, -3); }

}  // namespace vkd::cayley
