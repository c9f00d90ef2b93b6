// The inverse of one matrix on one thread: block elimination with row exchanges, on PyTorch's matrix products.
//
// For the matrices of a batch, side by side on PyTorch's threads. LAPACK can't do that: MKL's LU (seen with
// PyTorch 2.14) may hang inside a parallel region. On one thread it is also slower than this; where one large matrix
// has all threads to itself it is faster.
#pragma once
#include <ATen/ops/empty.h>

#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include "matrix.h"

namespace vkd::cayley {

class Inverse {
public:
  explicit Inverse(int64_t n)
      : n_(n),
        panel_(std::min<int64_t>(n, 32)),
        memory_(at::empty({n * n + 2 * n * panel_ + 2 * panel_ * panel_}, at::kDouble)),
        order_(n) {
    double* next = memory_.mutable_data_ptr<double>();
    const auto take = [&](int64_t rows, int64_t cols) {
      return contiguous(std::exchange(next, next + rows * cols), rows, cols);
    };
    lower_ = take(n, n);
    rows_ = take(panel_, n);
    columns_ = take(n, panel_);
    upper_kk_ = take(panel_, panel_);
    lower_kk_ = take(panel_, panel_);
  }

  // out <- a^-1, both (n, n) and contiguous; a is destroyed.
  //
  // With P A = L U, step k leaves U^-1 on and above the diagonal of panel k and L^-1 below it (without its unit
  // diagonal), as cuda/core.h does for the GPU:
  //     i < k and j < k   untouched               i = k, j < k   T
  //     i = k, j > k      U_kk^-1 T               i < k, j = k   -C
  //     i > k, j = k      -C L_kk^-1              elsewhere      A_ij - C T
  // where T = L_kk^-1 A_kj and C = A_ik U_kk^-1.
  void operator()(Matrix<double> a, Matrix<double> out) {
    std::iota(order_.begin(), order_.end(), 0);
    for (int64_t k = 0; k < n_; k += panel_) {
      const int64_t width = std::min(panel_, n_ - k);
      factor(a, k, k + width);
      invert_factors(a.block(k, width, k, width));
      eliminate(a, k, k + width);
    }
    // A^-1 = U^-1 (L^-1 P)
    std::fill_n(lower_.data, n_ * n_, 0.0);
    for (int64_t i = 0; i < n_; ++i) {
      for (int64_t j = 0; j < i; ++j) lower_(i, order_[j]) = std::exchange(a(i, j), 0.0);
      lower_(i, order_[i]) = 1.0;
    }
    constexpr int64_t HEIGHT = 64;
    for (int64_t i = 0; i < n_; i += HEIGHT) {
      const int64_t height = std::min(HEIGHT, n_ - i), rest = n_ - i;
      multiply(out.block(i, height, 0, n_), a.block(i, height, i, rest), lower_.block(i, rest, 0, n_));
    }
  }

private:
  // row <- row - factor · other, in columns [begin, end)
  static void subtract(double* __restrict row, double factor, const double* __restrict other, int64_t begin,
                       int64_t end) {
    for (int64_t j = begin; j < end; ++j) row[j] -= factor * other[j];
  }

  // Columns [begin, end) of the rows from `begin` on <- L and U, a few columns at a time; whole rows change places.
  void factor(Matrix<double> a, int64_t begin, int64_t end) {
    constexpr int64_t FEW = 16;
    if (end - begin > FEW) {
      const int64_t middle = begin + FEW, below = n_ - middle, right = end - middle;
      factor(a, begin, middle);
      for (int64_t i = begin + 1; i < middle; ++i)
        for (int64_t k = begin; k < i; ++k) subtract(&a(i, 0), a(i, k), &a(k, 0), middle, end);
      multiply(a.block(middle, below, middle, right), a.block(middle, below, begin, FEW),
               a.block(begin, FEW, middle, right), 1.0, -1.0);
      factor(a, middle, end);
      return;
    }
    for (int64_t k = begin; k < end; ++k) {
      int64_t pivot = k;
      for (int64_t i = k + 1; i < n_; ++i)
        if (std::fabs(a(i, k)) > std::fabs(a(pivot, k))) pivot = i;
      if (pivot != k) {
        std::swap_ranges(&a(k, 0), &a(k, 0) + n_, &a(pivot, 0));
        std::swap(order_[k], order_[pivot]);
      }
      const double inverse = 1.0 / a(k, k);
      for (int64_t i = k + 1; i < n_; ++i) subtract(&a(i, 0), a(i, k) *= inverse, &a(k, 0), k + 1, end);
    }
  }

  // Of a panel's factors: upper_kk_ <- U_kk^-1, lower_kk_ <- L_kk^-1.
  void invert_factors(Matrix<const double> factors) {
    const int64_t n = factors.rows;
    std::fill_n(upper_kk_.data, panel_ * panel_, 0.0);
    std::fill_n(lower_kk_.data, panel_ * panel_, 0.0);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t k = 0; k < i; ++k) subtract(&lower_kk_(i, 0), factors(i, k), &lower_kk_(k, 0), 0, k + 1);
      lower_kk_(i, i) = 1.0;
    }
    for (int64_t i = n - 1; i >= 0; --i) {
      for (int64_t k = i + 1; k < n; ++k) subtract(&upper_kk_(i, 0), factors(i, k), &upper_kk_(k, 0), k, n);
      const double inverse = 1.0 / factors(i, i);
      for (int64_t j = i + 1; j < n; ++j) upper_kk_(i, j) *= inverse;
      upper_kk_(i, i) = inverse;
    }
  }

  void eliminate(Matrix<double> a, int64_t begin, int64_t end) {
    const int64_t width = end - begin, rest = n_ - end;
    const Matrix<double> upper = upper_kk_.block(0, width, 0, width), lower = lower_kk_.block(0, width, 0, width);
    const Matrix<double> rows = rows_.block(0, width, 0, n_), right = rows.block(0, width, end, rest);
    if (width < n_) multiply(rows, lower, a.block(begin, width, 0, n_));  // T
    copy(lower, rows.block(0, width, begin, width));
    if (rest > 0) {
      const Matrix<double> below = a.block(end, rest, begin, width), c = columns_.block(0, rest, 0, width);
      copy(below, c);
      for (int64_t i = 0; i < rest; ++i) std::fill_n(&below(i, 0), width, 0.0);
      multiply(a.block(end, rest, 0, n_), c, rows, 1.0, -1.0);
      multiply(a.block(begin, width, end, rest), upper, right);
    }
    if (begin > 0) {
      const Matrix<double> above = a.block(0, begin, begin, width), minus_c = columns_.block(0, begin, 0, width);
      multiply(minus_c, above, upper, 0.0, -1.0);
      copy(minus_c, above);
      if (rest > 0) multiply(a.block(0, begin, end, rest), minus_c, right, 1.0, 1.0);
      copy(rows.block(0, width, 0, begin), a.block(begin, width, 0, begin));
    }
    for (int64_t i = 0; i < width; ++i)
      for (int64_t j = 0; j < width; ++j) a(begin + i, begin + j) = i <= j ? upper(i, j) : lower(i, j);
  }

  int64_t n_, panel_;
  at::Tensor memory_;
  Matrix<double> lower_, rows_, columns_, upper_kk_, lower_kk_;
  std::vector<int64_t> order_;  // row i of P A is row order_[i] of A
};

}  // namespace vkd::cayley
