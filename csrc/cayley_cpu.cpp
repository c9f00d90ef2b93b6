// The Cayley transform on the CPU, on PyTorch's matrix products (vkd_kernels/cayley/reference.py is the definition).
//
//   forward    M = I + U - U^T + V^T V,  R = M^-1,  Q = [2R - I; -2 V R]          all in float64
//   backward   dR = 2 (G1 - V^T G2),     dM = -R^T dR R^T                          S x S, float64
//              dU = dM - dM^T,           dV = -2 G2 R^T + V (dM + dM^T)            products in the weight's dtype
//
// The forward stays in float64 to the end: with a badly scaled V the product V R loses in float32 what the float64
// inverse has gained. Gradients need no such care.
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_inv_ex.h>
#include <ATen/ops/matmul.h>
#include <torch/library.h>

#include <tuple>

#include "cayley_checks.h"

namespace {

using at::Tensor;

// Autocast would turn the products below into 16-bit ones; the transform always keeps its own precision.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

// One matrix as 2-D, a batch as 3-D: the layouts whose products take no detour.
Tensor flat(const Tensor& x) {
  Tensor y = x.dim() > 3 ? x.flatten(0, -3) : x;
  return y.dim() == 3 && y.size(0) == 1 ? y[0] : y;
}

// r <- r^-1 for r (S, S) or (B, S, S). sym(M) >= I: never singular, so there is no status to check. LAPACK pivots, and
// must: with fewer than 2S rows of very different scale, elimination without pivoting loses everything in float64 too.
// One matrix at a time: PyTorch's batched LU (seen with 2.14 and MKL) can hang when it has more than one thread.
void invert_(const Tensor& r) {
  if (r.dim() == 2) {
    r.copy_(std::get<0>(at::linalg_inv_ex(r)));
    return;
  }
  for (int64_t b = 0; b < r.size(0); ++b) invert_(r[b]);
}

std::tuple<Tensor, Tensor> cayley_forward(const Tensor& weight) {
  vkd::cayley::check_weight(weight);
  NoAutocast no_autocast;
  const int64_t t = weight.size(-2), s = weight.size(-1);
  const Tensor w = flat(weight).to(at::kDouble);
  const Tensor u = w.narrow(-2, 0, s), v = w.narrow(-2, s, t - s);
  Tensor r = (u - u.mT()).contiguous();
  if (t > s) r += at::matmul(v.mT(), v);
  r.diagonal(0, -2, -1).add_(1.0);
  invert_(r);
  Tensor q = at::empty(w.sizes(), weight.options().memory_format(at::MemoryFormat::Contiguous));
  Tensor q1 = q.narrow(-2, 0, s);
  q1.copy_(r * 2.0);
  q1.diagonal(0, -2, -1).sub_(1.0);
  if (t > s) q.narrow(-2, s, t - s).copy_(at::matmul(v, r * -2.0));
  auto r_sizes = weight.sizes().vec();
  r_sizes[weight.dim() - 2] = s;
  return {q.view(weight.sizes()), r.view(r_sizes)};
}

Tensor cayley_backward(const Tensor& grad_q, const Tensor& weight, const Tensor& r_saved) {
  vkd::cayley::check_weight(weight);
  NoAutocast no_autocast;
  const int64_t t = weight.size(-2), s = weight.size(-1);
  const Tensor g = flat(grad_q), r = flat(r_saved), v = flat(weight).narrow(-2, s, t - s);
  const Tensor g1 = g.narrow(-2, 0, s), g2 = g.narrow(-2, s, t - s);
  Tensor d_r = g1.to(at::kDouble);
  if (t > s) d_r = d_r - at::matmul(v.mT(), g2);
  const Tensor minus_d_m = at::matmul(at::matmul(r.mT(), d_r), (r * 2.0).mT());
  Tensor grad = at::empty(g.sizes(), weight.options().memory_format(at::MemoryFormat::Contiguous));
  grad.narrow(-2, 0, s).copy_(minus_d_m.mT() - minus_d_m);
  if (t > s) {
    const auto dtype = weight.scalar_type();
    Tensor d_v = at::matmul(g2, (r.mT() * -2.0).to(dtype));
    d_v -= at::matmul(v, (minus_d_m + minus_d_m.mT()).to(dtype));
    grad.narrow(-2, s, t - s).copy_(d_v);
  }
  return grad.view(weight.sizes());
}

}  // namespace

TORCH_LIBRARY_IMPL(vkd_kernels, CPU, m) {
  m.impl("cayley_forward", &cayley_forward);
  m.impl("cayley_backward", &cayley_backward);
}
