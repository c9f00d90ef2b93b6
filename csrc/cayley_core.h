// Tile algebra of the batched Cayley transform, for CUDA threads and CPU threads alike; cayley_plan.h builds the kernels from it.
//
// A `Ctx` is one team of threads (a CTA, or CPU threads in csrc/tests): tid() and sync(). Everything is float64 and every
// rounding is written out (fma, *, /), in an order that depends on neither the number of threads nor the order of the
// CTAs: the same bits everywhere. Build with floating-point contraction off (-ffp-contract=off, -fmad=false).
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
  static constexpr int LD = TILE + 1;                   // row pitch in shared memory: odd, so columns spread over the banks
  static constexpr int K_SLICE = TILE == 32 ? 16 : 8;   // rows of an operand staged at a time by accumulate()
  static constexpr int GEMM_SMEM = 4 * K_SLICE * LD;    // doubles: two operands, two buffers
  static constexpr int INVERT_SMEM = 8 * TILE;          // doubles: two rows and two columns, two buffers
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
    VKD_UNROLL for (int r = 0; r < S::TM; ++r)
      VKD_UNROLL for (int c = 0; c < S::TN; ++c) f(r * S::TY + ty, c * S::TX + tx, v[r][c]);
  }

  VKD_HD void zero() {
    VKD_UNROLL for (int r = 0; r < S::TM; ++r)
      VKD_UNROLL for (int c = 0; c < S::TN; ++c) v[r][c] = 0.0;
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
    VKD_UNROLL for (int r = 0; r < S::TM; ++r)
      VKD_UNROLL for (int c = 0; c < S::TN; ++c) tile.v[r][c] = fma(a[r], b[c], tile.v[r][c]);
  }
}

// The index that neighbouring threads walk along when they load an operand: the one with the unit stride in memory.
enum class Walk { k, tile };

// tile += sum over k in [k_begin, k_end) of a(i, k) b(k, j): the operands come from anywhere, staged K_SLICE rows at a time.
// The next slice is fetched into registers while the current one is multiplied; one sync per slice (two buffers).
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
      VKD_UNROLL for (int r = 0; r < S::TM; ++r)
        VKD_UNROLL for (int c = 0; c < S::TN; ++c) tile.v[r][c] = fma(x[r], y[c], tile.v[r][c]);
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

// In place: tile <- tile^-1 by Gauss-Jordan elimination without pivoting, the tile in registers.
//
// Two pivots at a time: with P the 2 x 2 pivot block, C and R the two columns and rows through it,
//     A <- A - C P^-1 R      R <- P^-1 R      C <- -C P^-1      P <- P^-1.
// No pivoting is needed: the symmetric part of M and of all its Schur complements is >= I, so det P >= 1.
// Latency decides here. Model per pair on one SM: publish, barrier, read (~80 cycles), determinant and reciprocal (~110),
// two dependent fma twice (~35), plus TILE^2 · 4 / 64 issue cycles of float64 work; against twice (80 + 80 + 25) + the same
// issue cycles for single pivots: about a third less, at TILE = 32. Pairs of pairs lose it again: every thread would
// invert the 4 x 4 block itself.
template <class S, class Ctx>
VKD_HD void invert(Ctx& ctx, double* smem, Tile<S>& tile) {
  constexpr int N = S::TILE, TX = S::TX, TY = S::TY;
  // Register rows (columns) of the pair's two pivots: the same one, unless a single thread row (column) holds all.
  constexpr int ROW1 = TY == 1 ? 1 : 0, COL1 = TX == 1 ? 1 : 0;
  auto& a = tile.v;
  const int tx = unsigned(ctx.tid()) % TX, ty = unsigned(ctx.tid()) / TX;
  int buffer = 0;
  VKD_UNROLL for (int rk = 0; rk < S::TM; rk += 1 + ROW1) {
    const int sk = rk * TY / TX;
    VKD_ROLLED for (int q = 0; q < TY; q += 2) {
      const int k = rk * TY + q;  // the pivots are k and k + 1
      double* rows = smem + buffer * 4 * N;
      double* cols = rows + 2 * N;
      VKD_UNROLL for (int h = 0; h < 2; ++h) {
        if (ty == (k + h) % TY) VKD_UNROLL for (int c = 0; c < S::TN; ++c) rows[h * N + c * TX + tx] = a[rk + h * ROW1][c];
        if (tx == (k + h) % TX) VKD_UNROLL for (int r = 0; r < S::TM; ++r) cols[h * N + r * TY + ty] = a[r][sk + h * COL1];
      }
      ctx.sync();  // the only one: the next pair goes to the other buffer
      const double p00 = rows[k], p01 = rows[k + 1], p10 = rows[N + k], p11 = rows[N + k + 1];
      const double scale = 1.0 / determinant(p00, p01, p10, p11);
      const double inv[2][2] = {{p11 * scale, -(p01 * scale)}, {-(p10 * scale), p00 * scale}};
      double x[2][S::TM], y[2][S::TN];  // a <- a + x0 y0 + x1 y1, with x = -C P^-1 and y = R
      VKD_UNROLL for (int c = 0; c < S::TN; ++c) {
        y[0][c] = rows[c * TX + tx];
        y[1][c] = rows[N + c * TX + tx];
      }
      VKD_UNROLL for (int r = 0; r < S::TM; ++r) {
        const double c0 = -cols[r * TY + ty], c1 = -cols[N + r * TY + ty];
        x[0][r] = fma(c0, inv[0][0], c1 * inv[1][0]);
        x[1][r] = fma(c0, inv[0][1], c1 * inv[1][1]);
      }
      VKD_UNROLL for (int h = 0; h < 2; ++h) {
        if (tx == (k + h) % TX) {  // the pivot columns: 0 + x · unit row
          const int c = sk + h * COL1;
          y[0][c] = h == 0 ? 1.0 : 0.0;
          y[1][c] = h == 0 ? 0.0 : 1.0;
          VKD_UNROLL for (int r = 0; r < S::TM; ++r) a[r][c] = 0.0;
        }
        if (ty == (k + h) % TY) {  // the pivot rows: 0 + P^-1 R
          const int r = rk + h * ROW1;
          x[0][r] = inv[h][0];
          x[1][r] = inv[h][1];
          VKD_UNROLL for (int c = 0; c < S::TN; ++c) a[r][c] = 0.0;
        }
      }
      VKD_UNROLL for (int r = 0; r < S::TM; ++r)
        VKD_UNROLL for (int c = 0; c < S::TN; ++c) a[r][c] = fma(x[0][r], y[0][c], fma(x[1][r], y[1][c], a[r][c]));
      buffer ^= 1;
    }
  }
  ctx.sync();  // the caller may reuse the shared memory
}

// Step k of block Gauss-Jordan on a matrix of `blocks` x `blocks` tiles; this team makes tile (bi, bj) of the result:
//     pivot D = A_kk^-1      A_kj <- D A_kj      A_ik <- -A_ik D      A_ij <- A_ij - A_ik (D A_kj)
// load(i, j) reads the matrix before the step, store(i, j, value) writes it after: different buffers, so that no team ever
// reads what another one writes. The team that makes the next pivot block inverts it before it stores it (nobody needs
// the block itself any more); only for k = 0 every team inverts the pivot on its own, which saves a launch.
template <class S>
struct PanelStep {
  static constexpr int SMEM = 3 * S::TILE * S::LD + S::INVERT_SMEM;  // doubles

  template <class Ctx, class Load, class Store>
  VKD_HD static void run(Ctx& ctx, double* smem, int k, int bi, int bj, Load load, Store store) {
    constexpr int B = S::TILE;
    double* D = smem;               // the pivot's inverse
    double* left = D + B * S::LD;   // A_ik
    double* above = left + B * S::LD;  // A_kj, then D A_kj
    double* scratch = above + B * S::LD;
    const bool pivot_row = bi == k, pivot_col = bj == k;
    Tile<S> out, work;
    work.each(ctx, [&](int i, int j, double& v) { v = load(k * B + i, k * B + j); });
    const auto load_out = [&](int i, int j, double& v) { v = pivot_row || pivot_col ? 0.0 : load(bi * B + i, bj * B + j); };
    if (k > 0) out.each(ctx, load_out);  // early, to hide its latency
    Tile<S> piece;
    if (!pivot_row) {
      piece.each(ctx, [&](int i, int j, double& v) { v = load(bi * B + i, k * B + j); });
      piece.each(ctx, [&](int i, int j, double& v) { left[i * S::LD + j] = v; });
    }
    if (!pivot_col) {
      piece.each(ctx, [&](int i, int j, double& v) { v = load(k * B + i, bj * B + j); });
      piece.each(ctx, [&](int i, int j, double& v) { above[i * S::LD + j] = v; });
    }
    if (k == 0) {
      invert<S>(ctx, scratch, work);
      out.each(ctx, load_out);
    }
    work.each(ctx, [&](int i, int j, double& v) { D[i * S::LD + j] = v; });
    ctx.sync();
    if (pivot_row && pivot_col) {
      out = work;
    } else if (pivot_row) {
      multiply_add<S>(ctx, out, 1.0, D, above);
    } else if (pivot_col) {
      multiply_add<S>(ctx, out, -1.0, left, D);
    } else {
      work.zero();
      multiply_add<S>(ctx, work, 1.0, D, above);
      ctx.sync();
      work.each(ctx, [&](int i, int j, double& v) { above[i * S::LD + j] = v; });
      ctx.sync();
      multiply_add<S>(ctx, out, -1.0, left, above);
    }
    if (bi == k + 1 && bj == k + 1) invert<S>(ctx, scratch, out);
    out.each(ctx, [&](int i, int j, double& v) { store(bi * B + i, bj * B + j, v); });
  }
};

}  // namespace vkd::cayley
