// Binds the launchers of cuda/kernels.cu to the ops of module.cpp: checks, outputs, workspace, device and stream.
//
// Everything is enqueued on the current stream of the weight's device and nothing is read back, so that the ops can be
// captured in a CUDA graph. plan.h counts the launches.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "cayley.h"
#include "checks.h"

namespace {

using at::Tensor;
namespace cayley = vkd::cayley;

cayley::MatrixBatch strided(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

Tensor empty_float64(at::IntArrayRef sizes, const Tensor& like) {
  return at::empty(sizes, like.options().dtype(at::kDouble));
}

std::tuple<Tensor, Tensor> cayley_forward(const Tensor& weight) {
  cayley::check_weight(weight);
  const c10::cuda::CUDAGuard guard(weight.device());
  const Tensor w = cayley::as_batch(weight);
  const int64_t batch = w.size(0);
  const int t = int(w.size(1)), s = int(w.size(2));
  Tensor q = at::empty(weight.sizes(), weight.options().memory_format(at::MemoryFormat::Contiguous));
  Tensor r = empty_float64(cayley::r_sizes(weight), weight);
  if (batch == 0) return {q, r};
  const Tensor workspace = empty_float64({cayley::forward_workspace_cuda(batch, t, s)}, weight);
  const auto run = [&](auto* q_data) {
    C10_CUDA_CHECK(cayley::forward_cuda(strided(w), q_data, r.mutable_data_ptr<double>(),
                                        workspace.mutable_data_ptr<double>(), batch, t, s,
                                        c10::cuda::getCurrentCUDAStream()));
  };
  if (weight.scalar_type() == at::kFloat)
    run(q.mutable_data_ptr<float>());
  else
    run(q.mutable_data_ptr<double>());
  return {q, r};
}

Tensor cayley_backward(const Tensor& grad_q, const Tensor& weight, const Tensor& r) {
  cayley::check_gradient(grad_q, weight, r);
  const c10::cuda::CUDAGuard guard(weight.device());
  const Tensor w = cayley::as_batch(weight), g = cayley::as_batch(grad_q), inverse = r.contiguous();
  const int64_t batch = w.size(0);
  const int t = int(w.size(1)), s = int(w.size(2));
  Tensor grad = at::empty(weight.sizes(), weight.options().memory_format(at::MemoryFormat::Contiguous));
  if (batch == 0) return grad;
  const Tensor workspace = empty_float64({cayley::backward_workspace_cuda(batch, t, s)}, weight);
  const auto run = [&](auto* grad_data) {
    C10_CUDA_CHECK(cayley::backward_cuda(strided(g), strided(w), inverse.const_data_ptr<double>(), grad_data,
                                         workspace.mutable_data_ptr<double>(), batch, t, s,
                                         c10::cuda::getCurrentCUDAStream()));
  };
  if (weight.scalar_type() == at::kFloat)
    run(grad.mutable_data_ptr<float>());
  else
    run(grad.mutable_data_ptr<double>());
  return grad;
}

}  // namespace

TORCH_LIBRARY_IMPL(vkd_kernels, CUDA, m) {
  m.impl("cayley_forward", &cayley_forward);
  m.impl("cayley_backward", &cayley_backward);
}
