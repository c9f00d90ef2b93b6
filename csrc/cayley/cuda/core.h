// Tile algebra of the batched Cayley transform, for CUDA threads and CPU threads alike; team.h builds the products
// from it, plan.h the kernels.
//
// A `Ctx` is one team of threads (a CTA, or CPU threads in csrc/cayley/tests): tid() and sync(). Everything is float64
// and every rounding is written out (fma, *, /), in an order that depends on neither the number of threads nor the
// order of the CTAs: the same bits everywhere. Build with floating-point contraction off (-ffp-contract=off,
// -fmad=false).
#pragma once
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define VKD_HD __host__ __device__ __forceinline__
#define VKD_UNROLL _Pragma("unroll")
#define VKD_ROLLED _Pragma("unroll 1")
#else
#define VKD_HD inline
#define VKD_UNROLL
#define VKD_ROLLED
#endif

namespace vkd::cayley {

// A TILE x TILE tile spread over a TY x TX thread grid: thread (ty, tx) holds the elements (r·TY + ty, c·TX + tx).
template <int TILE_, int TX_, int TY_>
struct Shape {
  static constexpr int TILE = TILE_, TX = TX_, TY = TY_, THREADS = TX * TY;
  static constexpr int TM = TILE / TY, TN = TILE / TX;  // elements of one thread
  static constexpr int LD = TILE + 1;                   // odd row pitch: a column spreads over the banks
  static constexpr int K_SLICE = TILE == 32 ? 16 : 8;   // rows of an operand staged at a time by accumulate()
  static constexpr int GEMM_SMEM = 4 * K_SLICE * LD;    // doubles: two operands, two buffers
  static constexpr int FACTOR_SMEM = 8 * TILE;          // doubles: two rows and two columns, two buffers
  static constexpr int INVERT_SMEM = FACTOR_SMEM + TILE * LD;
  static_assert(TX % TY == 0 && TILE % TX == 0, "the pivot's register index must be a compile-time constant");
  static_assert(TY == 1 || TY % 2 == 0, "a pair of pivot rows must not straddle two register rows");
};

template <class S>
struct Tile {
  double v[S::TM][S::TN];

  // f(i, j, value&) for every element of this thread, (i, j) its place in the tile.
  template <class Ctx, class F>
  VKD_HD void each(const Ctx& ctx, F f) {
    const int tx = unsigned(ctx.tid()) % S::TX, ty = unsigned(ctx.tid()) / S::TX;
    VKD_UNROLL for (int r = 0; r < S::TM; ++r) VKD_UNROLL for (int c = 0; c < S::TN; ++c)
        f(r * S::TY + ty, c * S::TX + tx, v[r][c]);
  }

  VKD_HD void zero() {
    VKD_UNROLL for (int r = 0; r < S::TM; ++r) VKD_UNROLL for (int c = 0; c < S::TN; ++c) v[r][c] = 0.0;
  }
};

// tile += sign · A B with A (TILE, TILE) and B (TILE, TILE) in shared memory, row pitch S::LD.
template <class S, class Ctx>
VKD_HD void multiply_add(const Ctx& ctx, Tile<S>& tile, double sign, const double* A, const double* B) {
  const int tx = unsigned(ctx.tid()) % S::TX, ty = unsigned(ctx.tid()) / S::TX;
#if defined(__CUDACC__)
#pragma unroll 4
#endif
  for (int k = 0; k < S::TILE; ++k) {
    double a[S::TM], b[S::TN];
    VKD_UNROLL for (int r = 0; r < S::TM; ++r) a[r] = sign * A[(r * S::TY + ty) * S::LD + k];
    VKD_UNROLL for (int c = 0; c < S::TN; ++c) b[c] = B[k * S::LD + c * S::TX + tx];
    VKD_UNROLL for (int r = 0; r < S::TM; ++r) VKD_UNROLL for (int c = 0; c < S::TN; ++c) tile.v[r][c] =
        fma(a[r], b[c], tile.v[r][c]);
  }
}

// The index that neighboring threads walk along when they load an operand: the one with the unit stride in memory.
enum class Walk { k, tile };

// tile += sum over k in [k_begin, k_end) of a(i, k) b(k, j): the operands come from anywhere, staged K_SLICE rows at a
// time. The next slice is fetched into registers while the current one is multiplied; one sync per slice (two buffers).
template <class S, Walk A_WALK, Walk B_WALK, class Ctx, class LoadA, class LoadB>
VKD_HD void accumulate(Ctx& ctx, double* smem, Tile<S>& tile, int k_begin, int k_end, LoadA a, LoadB b) {
  constexpr int K = S::K_SLICE, EACH = S::TILE * K / S::THREADS;
  const int tx = unsigned(ctx.tid()) % S::TX, ty = unsigned(ctx.tid()) / S::TX;
  double next_a[EACH], next_b[EACH];
  const auto place = [&](Walk walk, int e, int& i, int& k) {
    const unsigned at = unsigned(e) * S::THREADS + unsigned(ctx.tid());
    i = int(walk == Walk::k ? at / unsigned(K) : at % unsigned(S::TILE));
    k = int(walk == Walk::k ? at % unsigned(K) : at / unsigned(S::TILE));
  };
  const auto fetch = [&](int k0) {
    VKD_UNROLL for (int e = 0; e < EACH; ++e) {
      int i, k;
      place(A_WALK, e, i, k);
      next_a[e] = k0 + k < k_end ? a(i, k0 + k) : 0.0;
      place(B_WALK, e, i, k);
      next_b[e] = k0 + k < k_end ? b(k0 + k, i) : 0.0;
    }
  };
  fetch(k_begin);
  int buffer = 0;
  VKD_ROLLED for (int k0 = k_begin; k0 < k_end; k0 += K) {
    double* A = smem + buffer * 2 * K * S::LD;
    double* B = A + K * S::LD;
    VKD_UNROLL for (int e = 0; e < EACH; ++e) {
      int i, k;
      place(A_WALK, e, i, k);
      A[k * S::LD + i] = next_a[e];
      place(B_WALK, e, i, k);
      B[k * S::LD + i] = next_b[e];
    }
    ctx.sync();
    if (k0 + K < k_end) fetch(k0 + K);
#if defined(__CUDACC__)
#pragma unroll 2
#endif
    for (int k = 0; k < K; ++k) {
      double x[S::TM], y[S::TN];
      VKD_UNROLL for (int r = 0; r < S::TM; ++r) x[r] = A[k * S::LD + r * S::TY + ty];
      VKD_UNROLL for (int c = 0; c < S::TN; ++c) y[c] = B[k * S::LD + c * S::TX + tx];
      VKD_UNROLL for (int r = 0; r < S::TM; ++r) VKD_UNROLL for (int c = 0; c < S::TN; ++c) tile.v[r][c] =
          fma(x[r], y[c], tile.v[r][c]);
    }
    buffer ^= 1;
  }
  ctx.sync();  // the caller may reuse the shared memory
}

// a d - b c to one and a half units in the last place (Kahan): two badly scaled products may cancel.
VKD_HD double determinant(double a, double b, double c, double d) {
  const double w = b * c;
  return fma(a, d, -w) + fma(-b, c, w);
}

// In place: tile <- the inverses of its triangular factors, A = L U without pivoting: U^-1 on and above the diagonal,
// L^-1 (unit diagonal, not stored) below. The tile stays in registers. Sync before using smem again.
//
// The symmetric part of M and of all its Schur complements is >= I, so every pivot is >= 1 and no pivoting is needed.
// But the inverse of a block must never be applied as a whole: with a V of low rank and entries of 1e3,
// A_ik (A_kk^-1 A_kj) loses every digit, while (A_ik U^-1)(L^-1 A_kj) stays within ten times of pivoted LU. For the
// same reason pivots are single.
//
// One step of Gauss-Jordan elimination at pivot p, with column C and row R through it, applied where the mask allows:
//     rows below                     A <- A - C p^-1 R     C <- -C p^-1       U to the right, L^-1 to the left
//     rows above, columns after      A <- A - C p^-1 R     C <- -C p^-1       U^-1
//     pivot row, columns after       R <- p^-1 R           p <- p^-1
// Two steps share a barrier: with the 2 x 2 block [a b; c d] at hand, every thread takes the second row and column
// through the first step itself. The second pivot d - c b / a is det / a, so that both reciprocals run side by side.
//
// Latency decides here. Model per pair on one SM: publish, barrier, read (80 cycles), determinant and reciprocal (110),
// five dependent operations (40), and TILE^2 · 4 / 64 cycles to issue the float64 work; against twice (80 + 80 + 25)
// and the same work for one pivot a barrier: a third less at TILE = 32.
template <class S, class Ctx>
VKD_HD void factor(Ctx& ctx, double* smem, Tile<S>& tile) {
  constexpr int N = S::TILE, TX = S::TX, TY = S::TY;
  // Register rows (columns) of the two pivots: the same one, unless a single thread row (column) holds all.
  constexpr int ROW1 = TY == 1 ? 1 : 0, COL1 = TX == 1 ? 1 : 0;
  const int tx = unsigned(ctx.tid()) % TX, ty = unsigned(ctx.tid()) / TX;
  int buffer = 0;
  VKD_UNROLL for (int rk = 0; rk < S::TM; rk += 1 + ROW1) {
    const int ck = rk * TY / TX;
    VKD_ROLLED for (int first = 0; first < TY; first += 2) {
      const int k = rk * TY + first;  // the pivots are k and k + 1
      double* rows = smem + buffer * 4 * N;
      double* cols = rows + 2 * N;
      VKD_UNROLL for (int h = 0; h < 2; ++h) {
        if (ty == (k + h) % TY)
          VKD_UNROLL for (int c = 0; c < S::TN; ++c) rows[h * N + c * TX + tx] = tile.v[rk + h * ROW1][c];
        if (tx == (k + h) % TX)
          VKD_UNROLL for (int r = 0; r < S::TM; ++r) cols[h * N + r * TY + ty] = tile.v[r][ck + h * COL1];
      }
      ctx.sync();  // the only one: the next pair goes to the other buffer
      const double a = rows[k], b = rows[k + 1], c = rows[N + k], d = rows[N + k + 1];
      const double inv_a = 1.0 / a, inv_d = a * (1.0 / determinant(a, b, c, d));  // of the two pivots
      const double below = c * inv_a, right = inv_a * b;

      // A <- A + x0 y0 + x1 y1: the columns, times minus the inverse pivots, and the rows. Unit columns at the pivots.
      double y0[S::TN], y1[S::TN];
      VKD_UNROLL for (int q = 0; q < S::TN; ++q) {
        const int j = q * TX + tx;
        y0[q] = j == k ? 1.0 : j == k + 1 ? 0.0 : rows[j];
        y1[q] = j == k ? -below : j == k + 1 ? 1.0 : fma(-below, rows[j], rows[N + j]);
      }
      VKD_UNROLL for (int r = 0; r < S::TM; ++r) {
        const int i = r * TY + ty;
        const double c0 = cols[i], c1 = fma(-c0, right, cols[N + i]);
        const double x0 = i == k ? inv_a : i == k + 1 ? 0.0 : -c0 * inv_a;
        const double x1 = i == k ? -right * inv_d : -c1 * inv_d;
        VKD_UNROLL for (int q = 0; q < S::TN; ++q) {
          const int j = q * TX + tx;
          const bool pivot = i == k || i == k + 1 || j == k || j == k + 1;
          const double x = i == k + 1 ? (j <= k ? 1.0 : inv_d) : x1;  // row k + 1 is below the first pivot
          const double y = i <= k && j == k ? 0.0 : y1[q];
          // The first pivot's term goes in first: it is the one that cancels.
          const double value = fma(x, y, fma(x0, y0[q], pivot ? 0.0 : tile.v[r][q]));
          tile.v[r][q] = i <= k && j < k ? tile.v[r][q] : value;
        }
      }
      buffer ^= 1;
    }
  }
}

// Elements of the factors' inverses, from where factor() and the elimination keep them; (i, j) in the whole matrix.
template <class Load>
VKD_HD double upper_inverse(int i, int j, Load packed) {
  return i <= j ? packed(i, j) : 0.0;
}
template <class Load>
VKD_HD double lower_inverse(int i, int j, Load packed) {
  return i > j ? packed(i, j) : i == j ? 1.0 : 0.0;
}

// tile <- tile^-1 = U^-1 L^-1, for a matrix of one tile. smem: S::INVERT_SMEM. Sync before using it again.
template <class S, class Ctx>
VKD_HD void invert(Ctx& ctx, double* smem, Tile<S>& tile) {
  double* kept = smem + S::FACTOR_SMEM;
  factor<S>(ctx, smem, tile);
  tile.each(ctx, [&](int i, int j, double value) { kept[i * S::LD + j] = value; });
  ctx.sync();
  tile.zero();
  const auto packed = [&](int i, int j) { return kept[i * S::LD + j]; };
#if defined(__CUDACC__)
#pragma unroll 2
#endif
  for (int k = 0; k < S::TILE; ++k)
    tile.each(ctx, [&](int i, int j, double& value) {
      value = fma(upper_inverse(i, k, packed), lower_inverse(k, j, packed), value);
    });
}

// Step k of the same elimination on a matrix of tiles; this team makes tile (bi, bj) of the result. With U^-1 and L^-1
// of the pivot block, T = L^-1 A_kj and C = A_ik U^-1:
//     i < k and j < k   untouched               i = k, j < k   T (L^-1 of the matrix)
//     i = k, j > k      U^-1 T                  i < k, j = k   -C (U^-1 of the matrix)
//     i > k, j = k      -C L^-1 (its L^-1)      elsewhere      A_ij - C T
// load(i, j) reads the matrix before the step, store(i, j, value) writes it after: different buffers, so that no team
// ever reads what another one writes. The team that makes the next pivot block factors it before it stores it (nobody
// needs the block itself any more); only for k = 0 every team factors the pivot on its own, which saves a launch.
template <class S>
struct PanelStep {
  static constexpr int SMEM = 4 * S::TILE * S::LD + S::FACTOR_SMEM;  // doubles

  template <class Ctx, class Load, class Store>
  VKD_HD static void run(Ctx& ctx, double* smem, int k, int bi, int bj, Load load, Store store) {
    constexpr int B = S::TILE;
    double* upper = smem;               // U^-1
    double* lower = upper + B * S::LD;  // L^-1
    double* left = lower + B * S::LD;   // A_ik, then C
    double* above = left + B * S::LD;   // A_kj, then T
    double* scratch = above + B * S::LD;
    const bool pivot_row = bi == k, pivot_col = bj == k;
    const bool finished = (bi < k && bj < k) || (pivot_row && pivot_col && k > 0);
    const auto load_out = [&](int i, int j, double& v) { v = load(bi * B + i, bj * B + j); };
    const auto keep = [&](Tile<S>& tile, double* where) {
      tile.each(ctx, [&](int i, int j, double v) { where[i * S::LD + j] = v; });
    };
    Tile<S> out, work;
    if (k > 0) out.each(ctx, load_out);  // early, to hide its latency
    if (!finished) {
      if (!pivot_row) {
        work.each(ctx, [&](int i, int j, double& v) { v = load(bi * B + i, k * B + j); });
        keep(work, left);
      }
      if (!pivot_col) {
        work.each(ctx, [&](int i, int j, double& v) { v = load(k * B + i, bj * B + j); });
        keep(work, above);
      }
      work.each(ctx, [&](int i, int j, double& v) { v = load(k * B + i, k * B + j); });
      if (k == 0) {
        factor<S>(ctx, scratch, work);
        out.each(ctx, load_out);
      }
      work.each(ctx, [&](int i, int j, double v) {
        upper[i * S::LD + j] = upper_inverse(i, j, [&](int, int) { return v; });
        lower[i * S::LD + j] = lower_inverse(i, j, [&](int, int) { return v; });
      });
      ctx.sync();
      if (pivot_row && pivot_col) {
        out = work;
      } else {
        if (!pivot_col) multiply(ctx, work, lower, above), ctx.sync(), keep(work, above);
        if (!pivot_row) multiply(ctx, work, left, upper), ctx.sync(), keep(work, left);
        ctx.sync();
        if (pivot_row && bj < k)
          out = work;
        else if (pivot_row)
          multiply(ctx, out, upper, above);
        else if (pivot_col && bi < k)
          out.each(ctx, [&](int i, int j, double& v) { v = -left[i * S::LD + j]; });
        else if (pivot_col)
          out.zero(), multiply_add<S>(ctx, out, -1.0, left, lower);
        else
          multiply_add<S>(ctx, out, -1.0, left, above);
      }
    }
    if (bi == k + 1 && bj == k + 1) factor<S>(ctx, scratch, out);
    out.each(ctx, [&](int i, int j, double& v) { store(bi * B + i, bj * B + j, v); });
  }

  template <class Ctx>
  VKD_HD static void multiply(const Ctx& ctx, Tile<S>& tile, const double* A, const double* B) {
    tile.zero();
    multiply_add<S>(ctx, tile, 1.0, A, B);
  }
};

}  // namespace vkd::cayley
