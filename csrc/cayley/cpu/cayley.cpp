// The Cayley transform on the CPU, on PyTorch's matrix products (vkd_kernels/ops/cayley/reference.py is the
// definition).
//
//   forward    M = I + U - U^T + V^T V,  R = M^-1,  Q = [2R - I; -2 V R]          all in float64
//   backward   dR = 2 (G1 - V^T G2),     dM = -R^T dR R^T                          S x S, float64
//              dU = dM - dM^T,           dV = -2 G2 R^T + V (dM + dM^T)            products in the weight's dtype
//
// The forward stays in float64 to the end: with a badly scaled V the product V R loses in float32 what the float64
// inverse has gained. Gradients need no such care.
//
// V is cut into parts of some hundred rows, by its shape alone. The parts of all matrices of a batch go through their
// products side by side on PyTorch's threads, and so do the S x S matrices in between: a small product is done sooner
// on one thread than shared by several. ROWS and ONE_THREAD were chosen by measuring with two threads.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_inv_ex.h>
#include <torch/library.h>

#include <tuple>

#include "../checks.h"
#include "inverse.h"
#include "matrix.h"

namespace vkd::cayley {
namespace {

using at::Tensor;

constexpr int64_t ROWS = 512;        // of V in a part, at least
constexpr int64_t MOST_PARTS = 32;   // of one V: each has its own S x S sum
constexpr int64_t ONE_THREAD = 256;  // the largest S x S matrix that stays on one thread also when others idle

struct Sizes {
  int64_t batch, t, s, parts, part_rows;

  explicit Sizes(const Tensor& weight) : batch(weight.size(0)), t(weight.size(1)), s(weight.size(2)) {
    const int64_t m = t - s, least = std::max(ROWS, s);
    parts = std::min((m + least - 1) / least, MOST_PARTS);
    part_rows = parts > 0 ? (m + parts - 1) / parts : 0;
  }

  bool matrices_side_by_side() const { return s <= ONE_THREAD || enough_for_threads(batch); }

  // The rows of a part, from x (t, s).
  template <class T>
  Matrix<T> part(Matrix<T> x, int64_t index) const {
    const int64_t begin = s + index * part_rows;
    return x.block(begin, std::min(part_rows, t - begin), 0, s);
  }
};

// work(begin, end) for all batch · parts parts.
template <class Work>
void share_parts(const Sizes& sizes, Work work) {
  const int64_t count = sizes.batch * sizes.parts;
  share(count, sizes.part_rows * sizes.s * sizes.s, enough_for_threads(count), work);
}

// f(i, j) for all i <= j < n, in an order that is kind to the cache when f also touches (j, i).
template <class F>
void pairs(int64_t n, F f) {
  constexpr int64_t TILE = 32;
  for (int64_t i0 = 0; i0 < n; i0 += TILE)
    for (int64_t j0 = i0; j0 < n; j0 += TILE)
      for (int64_t i = i0; i < std::min(n, i0 + TILE); ++i)
        for (int64_t j = std::max(i, j0); j < std::min(n, j0 + TILE); ++j) f(i, j);
}

Tensor empty_float64(at::IntArrayRef sizes) { return at::empty(sizes, at::kDouble); }

// sum <- V^T V for some rows of V, on and above the diagonal.
void gram(Matrix<const double> v, Matrix<double> sum) {
  constexpr int64_t HEIGHT = 96;
  for (int64_t i = 0; i < v.cols; i += HEIGHT) {
    const int64_t height = std::min(HEIGHT, v.cols - i), width = v.cols - i;
    multiply(sum.block(i, height, i, width), v.block(0, v.rows, i, height).transposed(), v.block(0, v.rows, i, width));
  }
}

template <class T>
void forward(const Tensor& weight, const Tensor& q, const Tensor& r) {
  const Sizes sizes(weight);
  const int64_t s = sizes.s, parts = sizes.parts;
  const Tensor sums = empty_float64({sizes.batch * parts, s, s});

  share_parts(sizes, [&](int64_t i, int64_t end) {
    const Tensor memory = empty_float64({sizes.part_rows, s});
    for (; i < end; ++i) {
      const Matrix<const T> v = sizes.part(matrix<T>(weight, i / parts), i % parts);
      const Matrix<double> v64 = contiguous(memory.mutable_data_ptr<double>(), v.rows, s);
      copy(v, v64);
      gram(v64, mutable_matrix<double>(sums, i));
    }
  });

  const bool side_by_side = sizes.matrices_side_by_side();
  share(sizes.batch, s * s * s, side_by_side, [&](int64_t z, int64_t end) {
    const Tensor memory = empty_float64({s, s});
    const Matrix<double> m = contiguous(memory.mutable_data_ptr<double>(), s, s);
    Inverse inverse(side_by_side ? s : 0);
    for (; z < end; ++z) {
      const Matrix<const T> w = matrix<T>(weight, z);
      const Matrix<double> inverted = mutable_matrix<double>(r, z);
      std::fill_n(m.data, s * s, 0.0);
      for (int64_t part = 0; part < parts; ++part) {
        const Matrix<const double> sum = matrix<double>(sums, z * parts + part);
        for (int64_t i = 0; i < s; ++i)
          for (int64_t j = i; j < s; ++j) m(i, j) += sum(i, j);
      }
      pairs(s, [&](int64_t i, int64_t j) {
        const double skew = double(w(i, j)) - double(w(j, i)), sum = m(i, j);
        m(j, i) = sum - skew;
        m(i, j) = (i == j ? 1.0 : 0.0) + sum + skew;  // on the diagonal the skew is 0, or NaN
      });
      // sym(M) >= I: never singular, so LAPACK's status needs no look.
      if (side_by_side)
        inverse(m, inverted);
      else
        r[z].copy_(std::get<0>(at::linalg_inv_ex(memory)));
      const Matrix<T> q1 = mutable_matrix<T>(q, z);
      for (int64_t i = 0; i < s; ++i)
        for (int64_t j = 0; j < s; ++j) q1(i, j) = T(2.0 * inverted(i, j) - (i == j ? 1.0 : 0.0));
    }
  });

  share_parts(sizes, [&](int64_t i, int64_t end) {
    const Tensor memory = empty_float64({2, sizes.part_rows, s});
    for (; i < end; ++i) {
      const Matrix<const T> v = sizes.part(matrix<T>(weight, i / parts), i % parts);
      const Matrix<double> v64 = contiguous(memory.mutable_data_ptr<double>(), v.rows, s);
      const Matrix<double> product = contiguous(v64.data + sizes.part_rows * s, v.rows, s);
      copy(v, v64);
      multiply(product, v64, matrix<double>(r, i / parts), 0.0, -2.0);
      copy(product, sizes.part(mutable_matrix<T>(q, i / parts), i % parts));
    }
  });
}

template <class T>
void backward(const Tensor& grad_q, const Tensor& weight, const Tensor& r, const Tensor& grad) {
  const Sizes sizes(weight);
  const int64_t s = sizes.s, parts = sizes.parts;
  const Tensor sums = at::empty({sizes.batch * parts, s, s}, grad.options());
  const Tensor r_rounded = at::empty({parts > 0 ? sizes.batch : 0, s, s}, grad.options());
  const Tensor sym = at::empty_like(r_rounded);  // dM + dM^T

  share_parts(sizes, [&](int64_t i, int64_t end) {
    for (; i < end; ++i)
      multiply(mutable_matrix<T>(sums, i), sizes.part(matrix<T>(weight, i / parts), i % parts).transposed(),
               sizes.part(matrix<T>(grad_q, i / parts), i % parts));
  });

  share(sizes.batch, s * s * s, sizes.matrices_side_by_side(), [&](int64_t z, int64_t end) {
    const Tensor memory = empty_float64({2, s, s});
    const Matrix<double> x = contiguous(memory.mutable_data_ptr<double>(), s, s);
    const Matrix<double> left = contiguous(x.data + s * s, s, s);
    for (; z < end; ++z) {
      const Matrix<const double> inverse = matrix<double>(r, z);
      copy(matrix<T>(grad_q, z).block(0, s, 0, s), x);
      for (int64_t part = 0; part < parts; ++part) {
        const Matrix<const T> sum = matrix<T>(sums, z * parts + part);
        for (int64_t i = 0; i < s * s; ++i) x.data[i] -= double(sum.data[i]);
      }
      multiply(left, inverse.transposed(), x);
      multiply(x, left, inverse.transposed(), 0.0, -2.0);  // dM
      const Matrix<T> grad_u = mutable_matrix<T>(grad, z);
      pairs(s, [&](int64_t i, int64_t j) {
        const T difference = T(x(i, j) - x(j, i));
        grad_u(j, i) = -difference;
        grad_u(i, j) = difference;
      });
      if (parts == 0) continue;
      const Matrix<T> both = mutable_matrix<T>(sym, z);
      pairs(s, [&](int64_t i, int64_t j) { both(i, j) = both(j, i) = T(x(i, j) + x(j, i)); });
      copy(inverse, mutable_matrix<T>(r_rounded, z));
    }
  });

  share_parts(sizes, [&](int64_t i, int64_t end) {
    for (; i < end; ++i) {
      const int64_t z = i / parts, part = i % parts;
      const Matrix<T> grad_v = sizes.part(mutable_matrix<T>(grad, z), part);
      multiply(grad_v, sizes.part(matrix<T>(grad_q, z), part), matrix<T>(r_rounded, z).transposed(), 0.0, -2.0);
      multiply(grad_v, sizes.part(matrix<T>(weight, z), part), matrix<T>(sym, z), 1.0, 1.0);
    }
  });
}

std::tuple<Tensor, Tensor> cayley_forward(const Tensor& weight) {
  check_weight(weight);
  const Tensor w = as_batch(weight);
  const Tensor q = at::empty(w.sizes(), w.options().memory_format(at::MemoryFormat::Contiguous));
  const Tensor r = empty_float64({w.size(0), w.size(2), w.size(2)});
  if (w.scalar_type() == at::kFloat)
    forward<float>(w, q, r);
  else
    forward<double>(w, q, r);
  return {q.view(weight.sizes()), r.view(r_sizes(weight))};
}

Tensor cayley_backward(const Tensor& grad_q, const Tensor& weight, const Tensor& r) {
  check_gradient(grad_q, weight, r);
  const Tensor w = as_batch(weight);
  const Tensor grad = at::empty(w.sizes(), w.options().memory_format(at::MemoryFormat::Contiguous));
  if (w.scalar_type() == at::kFloat)
    backward<float>(as_batch(grad_q), w, as_batch(r), grad);
  else
    backward<double>(as_batch(grad_q), w, as_batch(r), grad);
  return grad.view(weight.sizes());
}

}  // namespace
}  // namespace vkd::cayley

TORCH_LIBRARY_IMPL(vkd_kernels, CPU, m) {
  m.impl("cayley_forward", &vkd::cayley::cayley_forward);
  m.impl("cayley_backward", &vkd::cayley::cayley_backward);
}
