// Strided matrices for the Cayley transform on the CPU, their products by PyTorch, and work shared among its threads.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>

namespace vkd::cayley {

template <class T>
struct Matrix {
  T* data;
  int64_t rows, cols, row, col;  // sizes, and strides in elements

  T& operator()(int64_t i, int64_t j) const { return data[i * row + j * col]; }
  Matrix block(int64_t i, int64_t height, int64_t j, int64_t width) const {
    return {data + i * row + j * col, height, width, row, col};
  }
  Matrix transposed() const { return {data, cols, rows, col, row}; }
  operator Matrix<const T>() const { return {data, rows, cols, row, col}; }
};

template <class T>
Matrix<T> contiguous(T* data, int64_t rows, int64_t cols) {
  return {data, rows, cols, cols, 1};
}

// Matrix z of a tensor (batch, rows, cols).
template <class T>
Matrix<const T> matrix(const at::Tensor& x, int64_t z) {
  return {x.const_data_ptr<T>() + z * x.stride(0), x.size(1), x.size(2), x.stride(1), x.stride(2)};
}
template <class T>
Matrix<T> mutable_matrix(const at::Tensor& x, int64_t z) {
  return {x.mutable_data_ptr<T>() + z * x.stride(0), x.size(1), x.size(2), x.stride(1), x.stride(2)};
}

// to <- from
template <class From, class To>
void copy(Matrix<From> from, Matrix<To> to) {
  for (int64_t i = 0; i < to.rows; ++i) {
    From* x = from.data + i * from.row;
    To* y = to.data + i * to.row;
    if (from.col == 1 && to.col == 1)
      for (int64_t j = 0; j < to.cols; ++j) y[j] = To(x[j]);
    else
      for (int64_t j = 0; j < to.cols; ++j) y[j * to.col] = To(x[j * from.col]);
  }
}

template <class T>
at::Tensor tensor(Matrix<T> x) {
  using Plain = std::remove_const_t<T>;
  const std::array<int64_t, 2> sizes{x.rows, x.cols}, strides{x.row, x.col};
  return at::from_blob(const_cast<Plain*>(x.data), sizes, strides, c10::CppTypeToScalarType<Plain>::value);
}

// out <- beta out + alpha a b
template <class T>
void multiply(Matrix<T> out, Matrix<const std::type_identity_t<T>> a, Matrix<const std::type_identity_t<T>> b,
              double beta = 0.0, double alpha = 1.0) {
  constexpr int64_t WORTH_A_CALL = 1000;  // multiplications
  if (out.rows * out.cols * a.cols >= WORTH_A_CALL) {
    at::Tensor result = tensor(out);
    at::addmm_out(result, result, tensor(a), tensor(b), beta, alpha);
    return;
  }
  for (int64_t i = 0; i < out.rows; ++i)
    for (int64_t j = 0; j < out.cols; ++j) {
      double sum = 0.0;
      for (int64_t k = 0; k < a.cols; ++k) sum += double(a(i, k)) * double(b(k, j));
      out(i, j) = T((beta == 0.0 ? 0.0 : beta * double(out(i, j))) + alpha * sum);
    }
}

// Are there enough pieces of work to give each thread its own? If not, the threads share each product.
inline bool enough_for_threads(int64_t pieces) { return 2 * pieces > at::get_num_threads(); }

// work(begin, end) for all of [0, pieces): a range for each of PyTorch's threads, or one with the threads inside.
template <class Work>
void share(int64_t pieces, int64_t multiplications, bool side_by_side, Work work) {
  constexpr int64_t WORTH_THREADS = 1 << 17;
  const auto run = [&](int64_t begin, int64_t end) {
    // Each thread has its own: autocast would turn the products into 16-bit ones, and autograd has no business here.
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    if (begin < pieces) work(begin, std::min(end, pieces));
  };
  // A single piece has one thread to itself, as each of many has, only inside a parallel region: of two, one empty.
  if (side_by_side && pieces * multiplications >= WORTH_THREADS)
    at::parallel_for(0, std::max<int64_t>(pieces, 2), 1, run);
  else
    run(0, pieces);
}

}  // namespace vkd::cayley
