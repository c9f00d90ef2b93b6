// What one team of threads computes of the batched Cayley transform: a tile of each of its products. plan.h has the
// formulas, and the kernels that give every team its tile.
#pragma once
#include "core.h"

namespace vkd::cayley {

// A batch of matrices with any strides, counted in elements.
template <class T>
struct Strided {
  T* data;
  int64_t batch, row, col;

  VKD_HD double operator()(int64_t z, int64_t i, int64_t j) const {
    return double(data[z * batch + i * row + j * col]);
  }
};

template <class T>
struct Forward {
  Strided<const T> weight;  // (batch, t, s)
  T* q;                     // (batch, t, s), contiguous
  double* r;                // (batch, s, s), contiguous
  double* gram;             // (batch, parts, s, s) parts of V^T V, summed by whoever reads them
  double* other;            // (batch, s, s), takes turns with r during the elimination
  int t, s, parts;

  VKD_HD int m() const { return t - s; }
  VKD_HD double u(int64_t z, int i, int j) const { return weight(z, i, j); }
  VKD_HD double v(int64_t z, int i, int j) const { return weight(z, int64_t(s) + i, j); }

  // M = I + (U - U^T) + V^T V without the parts of V^T V that are not there yet; the identity outside (s, s).
  VKD_HD double matrix(int64_t z, int i, int j) const {
    const double unit = i == j ? 1.0 : 0.0;
    if (i >= s || j >= s) return unit;
    double sum = 0.0;
    for (int part = 0; part < parts; ++part) sum += gram[((z * parts + part) * s + i) * s + j];
    return unit + (u(z, i, j) - u(z, j, i)) + sum;
  }

  VKD_HD void store_inverse(int64_t z, int i, int j, double value) const {
    if (i >= s || j >= s) return;
    r[(z * s + i) * s + j] = value;
    q[(z * t + i) * s + j] = T(2.0 * value - (i == j ? 1.0 : 0.0));
  }
};

template <class T>
struct Backward {
  Strided<const T> grad_q, weight;  // (batch, t, s)
  const double* r;                  // (batch, s, s), contiguous
  T* grad_weight;                   // (batch, t, s), contiguous
  double* gram;                     // (batch, parts, s, s) parts of V^T G2
  double* left;                     // (batch, s, s) R^T dR
  double* sym;                      // (batch, s, s) dM + dM^T
  int t, s, parts;

  VKD_HD int m() const { return t - s; }
  VKD_HD double v(int64_t z, int i, int j) const { return weight(z, int64_t(s) + i, j); }
  VKD_HD double g2(int64_t z, int i, int j) const { return grad_q(z, int64_t(s) + i, j); }
  VKD_HD double R(int64_t z, int i, int j) const { return r[(z * s + i) * s + j]; }
  VKD_HD double L(int64_t z, int i, int j) const { return left[(z * s + i) * s + j]; }

  VKD_HD double grad_r(int64_t z, int i, int j) const {
    double sum = 0.0;
    for (int part = 0; part < parts; ++part) sum += gram[((z * parts + part) * s + i) * s + j];
    return 2.0 * (grad_q(z, i, j) - sum);
  }
};

VKD_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- What one team computes: tile (ti, tj), or part `part` of it, of matrix z ----

// Rows of V that one part of V^T V or V^T G2 sums over.
VKD_HD int part_rows(int m, int parts) { return int(ceil_div(ceil_div(m, parts), 16) * 16); }

// V^T V, upper tiles; the lower ones are their mirror images, to the bit.
template <class S, class T, class Ctx>
VKD_HD void gram_tile(Ctx& ctx, double* smem, const Forward<T>& f, int64_t z, int part, int ti, int tj) {
  const int rows = part_rows(f.m(), f.parts), begin = part * rows, end = begin + rows < f.m() ? begin + rows : f.m();
  const int i0 = ti * S::TILE, j0 = tj * S::TILE;
  Tile<S> tile;
  tile.zero();
  accumulate<S, Walk::tile, Walk::tile>(
      ctx, smem, tile, begin, end, [&](int i, int k) { return i0 + i < f.s ? f.v(z, k, i0 + i) : 0.0; },
      [&](int k, int j) { return j0 + j < f.s ? f.v(z, k, j0 + j) : 0.0; });
  double* out = f.gram + (z * f.parts + part) * f.s * f.s;
  tile.each(ctx, [&](int i, int j, double value) {
    if (i0 + i >= f.s || j0 + j >= f.s) return;
    out[int64_t(i0 + i) * f.s + j0 + j] = value;
    if (ti != tj) out[int64_t(j0 + j) * f.s + i0 + i] = value;
  });
}

// Q2 = -2 V R
template <class S, class T, class Ctx>
VKD_HD void q2_tile(Ctx& ctx, double* smem, const Forward<T>& f, int64_t z, int ti, int tj) {
  const int i0 = ti * S::TILE, j0 = tj * S::TILE;
  Tile<S> tile;
  tile.zero();
  accumulate<S, Walk::k, Walk::tile>(
      ctx, smem, tile, 0, f.s, [&](int i, int k) { return i0 + i < f.m() ? f.v(z, i0 + i, k) : 0.0; },
      [&](int k, int j) { return j0 + j < f.s ? f.r[(z * f.s + k) * f.s + j0 + j] : 0.0; });
  tile.each(ctx, [&](int i, int j, double value) {
    if (i0 + i < f.m() && j0 + j < f.s) f.q[(z * f.t + f.s + i0 + i) * f.s + j0 + j] = T(-2.0 * value);
  });
}

// V^T G2
template <class S, class T, class Ctx>
VKD_HD void grad_gram_tile(Ctx& ctx, double* smem, const Backward<T>& b, int64_t z, int part, int ti, int tj) {
  const int rows = part_rows(b.m(), b.parts), begin = part * rows, end = begin + rows < b.m() ? begin + rows : b.m();
  const int i0 = ti * S::TILE, j0 = tj * S::TILE;
  Tile<S> tile;
  tile.zero();
  accumulate<S, Walk::tile, Walk::tile>(
      ctx, smem, tile, begin, end, [&](int i, int k) { return i0 + i < b.s ? b.v(z, k, i0 + i) : 0.0; },
      [&](int k, int j) { return j0 + j < b.s ? b.g2(z, k, j0 + j) : 0.0; });
  double* out = b.gram + (z * b.parts + part) * b.s * b.s;
  tile.each(ctx, [&](int i, int j, double value) {
    if (i0 + i < b.s && j0 + j < b.s) out[int64_t(i0 + i) * b.s + j0 + j] = value;
  });
}

// L = R^T dR
template <class S, class T, class Ctx>
VKD_HD void left_tile(Ctx& ctx, double* smem, const Backward<T>& b, int64_t z, int ti, int tj) {
  const int i0 = ti * S::TILE, j0 = tj * S::TILE;
  Tile<S> tile;
  tile.zero();
  accumulate<S, Walk::tile, Walk::tile>(
      ctx, smem, tile, 0, b.s, [&](int i, int k) { return i0 + i < b.s ? b.R(z, k, i0 + i) : 0.0; },
      [&](int k, int j) { return j0 + j < b.s ? b.grad_r(z, k, j0 + j) : 0.0; });
  tile.each(ctx, [&](int i, int j, double value) {
    if (i0 + i < b.s && j0 + j < b.s) b.left[(z * b.s + i0 + i) * b.s + j0 + j] = value;
  });
}

// dU = dM - dM^T and dM + dM^T with dM = -L R^T: tiles (ti, tj) and (tj, ti) at once, ti <= tj.
template <class S, class T, class Ctx>
VKD_HD void grad_u_tiles(Ctx& ctx, double* smem, const Backward<T>& b, int64_t z, int ti, int tj) {
  const int i0 = ti * S::TILE, j0 = tj * S::TILE;
  Tile<S> direct, mirror;  // (L R^T)_ij and (L R^T)_ji
  direct.zero();
  mirror.zero();
  accumulate<S, Walk::k, Walk::k>(
      ctx, smem, direct, 0, b.s, [&](int i, int k) { return i0 + i < b.s ? b.L(z, i0 + i, k) : 0.0; },
      [&](int k, int j) { return j0 + j < b.s ? b.R(z, j0 + j, k) : 0.0; });
  accumulate<S, Walk::k, Walk::k>(
      ctx, smem, mirror, 0, b.s, [&](int i, int k) { return i0 + i < b.s ? b.R(z, i0 + i, k) : 0.0; },
      [&](int k, int j) { return j0 + j < b.s ? b.L(z, j0 + j, k) : 0.0; });
  mirror.each(ctx, [&](int, int, double& value) { value = -value; });
  VKD_UNROLL for (int r = 0; r < S::TM; ++r) VKD_UNROLL for (int c = 0; c < S::TN; ++c) {
    const double forth = -direct.v[r][c], back = mirror.v[r][c];  // dM_ij, dM_ji
    direct.v[r][c] = forth - back;
    mirror.v[r][c] = forth + back;
  }
  direct.each(ctx, [&](int i, int j, double value) {
    if (i0 + i >= b.s || j0 + j >= b.s) return;
    b.grad_weight[(z * b.t + i0 + i) * b.s + j0 + j] = T(value);
    if (ti != tj) b.grad_weight[(z * b.t + j0 + j) * b.s + i0 + i] = T(-value);
  });
  if (b.m() == 0) return;
  mirror.each(ctx, [&](int i, int j, double value) {
    if (i0 + i >= b.s || j0 + j >= b.s) return;
    b.sym[(z * b.s + i0 + i) * b.s + j0 + j] = value;
    if (ti != tj) b.sym[(z * b.s + j0 + j) * b.s + i0 + i] = value;
  });
}

// dV = [G2 V] [-2 R^T; dM + dM^T]
template <class S, class T, class Ctx>
VKD_HD void grad_v_tile(Ctx& ctx, double* smem, const Backward<T>& b, int64_t z, int ti, int tj) {
  const int i0 = ti * S::TILE, j0 = tj * S::TILE;
  Tile<S> tile;
  tile.zero();
  accumulate<S, Walk::k, Walk::k>(
      ctx, smem, tile, 0, b.s, [&](int i, int k) { return i0 + i < b.m() ? b.g2(z, i0 + i, k) : 0.0; },
      [&](int k, int j) { return j0 + j < b.s ? -2.0 * b.R(z, j0 + j, k) : 0.0; });
  accumulate<S, Walk::k, Walk::tile>(
      ctx, smem, tile, 0, b.s, [&](int i, int k) { return i0 + i < b.m() ? b.v(z, i0 + i, k) : 0.0; },
      [&](int k, int j) { return j0 + j < b.s ? b.sym[(z * b.s + k) * b.s + j0 + j] : 0.0; });
  tile.each(ctx, [&](int i, int j, double value) {
    if (i0 + i < b.m() && j0 + j < b.s) b.grad_weight[(z * b.t + b.s + i0 + i) * b.s + j0 + j] = T(value);
  });
}

}  // namespace vkd::cayley
