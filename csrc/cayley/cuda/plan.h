// The batched Cayley transform as a list of kernels: what each team of threads computes and which kernels run in which
// order. cuda/kernels.cu launches them on a GPU; csrc/cayley/tests runs the same plan on CPU threads.
//
// For W = [U; V] (t, s), with m = t - s rows in V:
//   forward    M = I + (U - U^T) + V^T V     R = M^-1     Q = [2R - I; -2 V R]
//   backward   dR = 2 (G1 - V^T G2)     dM = -R^T dR R^T     dU = dM - dM^T     dV = -2 G2 R^T + V (dM + dM^T)
//
// Launches, whatever the batch:
//                                       forward                             backward
//   s <= 64, V short or batch large     1                                   1
//   s <= 64, otherwise                  3 (V^T V, inverse, V R)             4
//   s > 64, t > s                       3 + ceil(s / 32)                    4 (V^T G2, R^T dR, dU and dM + dM^T, dV)
//                                       (V^T V, panels, U^-1 L^-1, V R)
//   s > 64, t = s                       1 + ceil(s / 32)                    2 (R^T dR, dU)
//
// Model, not measurements, for 3024 x 192 in float32 on an H200 (2 us a launch, 64 float64 FMA a cycle and SM): V^T V 9
// us, 6 panels of 7, U^-1 L^-1 6, V R 9; backward 13 + 8 + 8 + 17: 66 and 46 us. A panel is 2 us of launch, 1 of loads,
// 1.3 of products and 3 for the 16 pairs of pivots that factor the next pivot block. Panels of 64 would halve the
// launches, but a lone team spends 5 us on their products; factoring the pivot in every team would save that team's
// wait and cost all of a large batch's teams 3 us more.
//
// Why own products instead of cuBLAS: at::matmul needs V and R cast to and from float64 and slices made contiguous,
// three launches or so for each of the six products, and the host takes about as long over those calls as the GPU over
// the work. cuBLAS would win on its float64 tensor cores (twice the rate) where the products are large: a batch of
// twelve 768 x 384 is 5 GFMA forward and backward, 0.4 ms against 0.2 ms in the same model.
//
// Work is split by shapes alone, never by the device: the same bits on every GPU, and on the CPU.
#pragma once
#include <algorithm>

#include "team.h"

namespace vkd::cayley {

// Where panel k of the elimination goes: r and `other` take turns, and the last panel goes to `other`.
VKD_HD double* panel_buffer(double* r, double* other, int tiles, int k) { return (tiles - 1 - k) % 2 == 0 ? other : r; }

// ---- Kernels: operator()(ctx, smem, block) is the work of one team of S::THREADS with SMEM doubles of shared memory.
// ---- RESIDENT threads must fit one SM together (512: at most 128 registers each), so that a second team hides the
// latency of the first.

// Tile `index` of the upper triangle (diagonal included) of a `tiles` x `tiles` grid, row by row.
VKD_HD void upper_tile(int index, int tiles, int& ti, int& tj) {
  ti = 0;
  while (index >= tiles - ti) index -= tiles - ti++;
  tj = ti + index;
}

template <class S_, class T>
struct GramKernel {
  using S = S_;
  static constexpr int SMEM = S::GEMM_SMEM;
  static constexpr int RESIDENT = 512;
  Forward<T> f;

  template <class Ctx>
  VKD_HD void operator()(Ctx& ctx, double* smem, unsigned block) const {
    const int tiles = int(ceil_div(f.s, S::TILE)), upper = tiles * (tiles + 1) / 2;
    int ti, tj;
    upper_tile(int(block % upper), tiles, ti, tj);
    const unsigned rest = block / upper;
    gram_tile<S>(ctx, smem, f, rest / f.parts, int(rest % f.parts), ti, tj);
  }
};

// s <= TILE: the whole inverse in one team, and with `all` also V^T V before and V R after it.
template <class S_, class T>
struct SmallForwardKernel {
  using S = S_;
  static constexpr int SMEM = S::GEMM_SMEM > S::INVERT_SMEM ? S::GEMM_SMEM : S::INVERT_SMEM;
  static constexpr int RESIDENT = 512;
  Forward<T> f;
  bool all;

  template <class Ctx>
  VKD_HD void operator()(Ctx& ctx, double* smem, unsigned block) const {
    const int64_t z = block;
    Tile<S> tile;
    tile.each(ctx, [&](int i, int j, double& value) { value = f.matrix(z, i, j); });
    if (all && f.m() > 0)
      accumulate<S, Walk::tile, Walk::tile>(
          ctx, smem, tile, 0, f.m(), [&](int i, int k) { return i < f.s ? f.v(z, k, i) : 0.0; },
          [&](int k, int j) { return j < f.s ? f.v(z, k, j) : 0.0; });
    invert<S>(ctx, smem, tile);
    tile.each(ctx, [&](int i, int j, double value) { f.store_inverse(z, i, j, value); });
    if (!all) return;
    ctx.sync();  // r is read back by the whole team
    for (int ti = 0; ti * S::TILE < f.m(); ++ti) q2_tile<S>(ctx, smem, f, z, ti, 0);
  }
};

// The first panel of the elimination: reads M, writes to one of the two buffers.
template <class S_, class T>
struct FirstPanelKernel {
  using S = S_;
  static constexpr int SMEM = PanelStep<S>::SMEM;
  static constexpr int RESIDENT = 512;
  Forward<T> f;

  template <class Ctx>
  VKD_HD void operator()(Ctx& ctx, double* smem, unsigned block) const {
    const unsigned tiles = unsigned(ceil_div(f.s, S::TILE));
    const int64_t z = block / (tiles * tiles);
    double* out = panel_buffer(f.r, f.other, tiles, 0) + z * f.s * f.s;
    PanelStep<S>::run(
        ctx, smem, 0, int(block / tiles % tiles), int(block % tiles), [&](int i, int j) { return f.matrix(z, i, j); },
        [&](int i, int j, double value) {
          if (i < f.s && j < f.s) out[int64_t(i) * f.s + j] = value;
        });
  }
};

// Any later panel, from one buffer to the other.
template <class S_>
struct PanelKernel {
  using S = S_;
  static constexpr int SMEM = PanelStep<S>::SMEM;
  static constexpr int RESIDENT = 512;
  double *r, *other;
  int s, k;

  template <class Ctx>
  VKD_HD void operator()(Ctx& ctx, double* smem, unsigned block) const {
    const unsigned tiles = unsigned(ceil_div(s, S::TILE));
    const int64_t z = block / (tiles * tiles);
    const double* in = panel_buffer(r, other, tiles, k - 1) + z * s * s;
    double* out = panel_buffer(r, other, tiles, k) + z * s * s;
    PanelStep<S>::run(
        ctx, smem, k, int(block / tiles % tiles), int(block % tiles),
        // M padded with the identity stays padded with the identity, so the padding is never stored.
        [&](int i, int j) { return i < s && j < s ? in[int64_t(i) * s + j]
                                   : i == j       ? 1.0
                                                  : 0.0; },
        [&](int i, int j, double value) {
          if (i < s && j < s) out[int64_t(i) * s + j] = value;
        });
  }
};

// R = U^-1 L^-1 and Q1 = 2R - I, from the factors' inverses in `other`.
template <class S_, class T>
struct InverseKernel {
  using S = S_;
  static constexpr int SMEM = S::GEMM_SMEM;
  static constexpr int RESIDENT = 512;
  Forward<T> f;

  template <class Ctx>
  VKD_HD void operator()(Ctx& ctx, double* smem, unsigned block) const {
    const unsigned tiles = unsigned(ceil_div(f.s, S::TILE));
    const int64_t z = block / (tiles * tiles);
    const int i0 = int(block / tiles % tiles) * S::TILE, j0 = int(block % tiles) * S::TILE;
    const auto packed = [&](int i, int j) { return f.other[(z * f.s + i) * f.s + j]; };
    Tile<S> tile;
    tile.zero();
    accumulate<S, Walk::k, Walk::tile>(
        ctx, smem, tile, i0 > j0 ? i0 : j0, f.s,
        [&](int i, int k) { return i0 + i < f.s ? upper_inverse(i0 + i, k, packed) : 0.0; },
        [&](int k, int j) { return j0 + j < f.s ? lower_inverse(k, j0 + j, packed) : 0.0; });
    tile.each(ctx, [&](int i, int j, double value) { f.store_inverse(z, i0 + i, j0 + j, value); });
  }
};

template <class S_, class T>
struct Q2Kernel {
  using S = S_;
  static constexpr int SMEM = S::GEMM_SMEM;
  static constexpr int RESIDENT = 512;
  Forward<T> f;

  template <class Ctx>
  VKD_HD void operator()(Ctx& ctx, double* smem, unsigned block) const {
    const unsigned cols = unsigned(ceil_div(f.s, S::TILE)), tiles = cols * unsigned(ceil_div(f.m(), S::TILE));
    q2_tile<S>(ctx, smem, f, block / tiles, int(block % tiles / cols), int(block % cols));
  }
};

template <class S_, class T>
struct GradGramKernel {
  using S = S_;
  static constexpr int SMEM = S::GEMM_SMEM;
  static constexpr int RESIDENT = 512;
  Backward<T> b;

  template <class Ctx>
  VKD_HD void operator()(Ctx& ctx, double* smem, unsigned block) const {
    const unsigned tiles = unsigned(ceil_div(b.s, S::TILE)), rest = block / (tiles * tiles);
    const int ti = int(block / tiles % tiles), tj = int(block % tiles);
    grad_gram_tile<S>(ctx, smem, b, rest / b.parts, int(rest % b.parts), ti, tj);
  }
};

template <class S_, class T>
struct LeftKernel {
  using S = S_;
  static constexpr int SMEM = S::GEMM_SMEM;
  static constexpr int RESIDENT = 512;
  Backward<T> b;

  template <class Ctx>
  VKD_HD void operator()(Ctx& ctx, double* smem, unsigned block) const {
    const unsigned tiles = unsigned(ceil_div(b.s, S::TILE));
    left_tile<S>(ctx, smem, b, block / (tiles * tiles), int(block / tiles % tiles), int(block % tiles));
  }
};

template <class S_, class T>
struct GradUKernel {
  using S = S_;
  static constexpr int SMEM = S::GEMM_SMEM;
  static constexpr int RESIDENT = 512;
  Backward<T> b;

  template <class Ctx>
  VKD_HD void operator()(Ctx& ctx, double* smem, unsigned block) const {
    const int tiles = int(ceil_div(b.s, S::TILE)), upper = tiles * (tiles + 1) / 2;
    int ti, tj;
    upper_tile(int(block % upper), tiles, ti, tj);
    grad_u_tiles<S>(ctx, smem, b, block / upper, ti, tj);
  }
};

template <class S_, class T>
struct GradVKernel {
  using S = S_;
  static constexpr int SMEM = S::GEMM_SMEM;
  static constexpr int RESIDENT = 512;
  Backward<T> b;

  template <class Ctx>
  VKD_HD void operator()(Ctx& ctx, double* smem, unsigned block) const {
    const unsigned cols = unsigned(ceil_div(b.s, S::TILE)), tiles = cols * unsigned(ceil_div(b.m(), S::TILE));
    grad_v_tile<S>(ctx, smem, b, block / tiles, int(block % tiles / cols), int(block % cols));
  }
};

// s <= TILE: the whole backward in one team, stage after stage.
template <class S_, class T>
struct SmallBackwardKernel {
  using S = S_;
  static constexpr int SMEM = S::GEMM_SMEM;
  static constexpr int RESIDENT = 384;
  Backward<T> b;

  template <class Ctx>
  VKD_HD void operator()(Ctx& ctx, double* smem, unsigned block) const {
    const int64_t z = block;
    for (int part = 0; part < b.parts; ++part) grad_gram_tile<S>(ctx, smem, b, z, part, 0, 0);
    ctx.sync();
    left_tile<S>(ctx, smem, b, z, 0, 0);
    ctx.sync();
    grad_u_tiles<S>(ctx, smem, b, z, 0, 0);
    ctx.sync();
    for (int ti = 0; ti * S::TILE < b.m(); ++ti) grad_v_tile<S>(ctx, smem, b, z, ti, 0);
  }
};

// ---- The plan ----

constexpr int PANEL = 32;      // pivots per launch of the elimination, and the smaller tile of the products
constexpr int WIDE = 64;       // the larger tile: fewer reads per flop, for when there are enough tiles to fill the GPU
constexpr int SMALL_MAX = 64;  // the widest matrix that one team inverts alone
constexpr int FILL = 128;      // teams that fill a GPU (108 to 148 SMs); a constant, for the same bits everywhere

// The thread grids of the GPU. 16: one warp; 32: 4 warps; 64: 8 warps, whose threads hold 4 x 4 elements each.
template <int TILE>
struct DeviceShape {
  using type = Shape<TILE, (TILE > 16 ? 16 : 8), (TILE == 16 ? 4 : TILE == 32 ? 8 : 16)>;
};

// One launch for everything? Then a single team sums over the rows of V: fine if they are few, or the batch fills the
// GPU.
inline bool in_one_launch(int64_t batch, int t, int s) {
  return s <= SMALL_MAX && (t - s <= 4 * WIDE || batch >= FILL);
}

inline bool use_wide(int64_t wide_tiles) { return wide_tiles >= FILL; }

// Tiles of the product V^T X, (s, s): all of them, or the upper triangle.
inline int64_t square_tiles(int s, int tile, bool upper) {
  const int64_t n = ceil_div(s, tile);
  return upper ? n * (n + 1) / 2 : n * n;
}

// Parts to split the m rows of V^T X into: enough teams to fill the GPU, at least 128 rows for each.
inline int row_parts(int64_t batch, int t, int s, bool upper) {
  const int m = t - s;
  if (m == 0) return 0;
  if (in_one_launch(batch, t, s) || use_wide(batch * square_tiles(s, WIDE, upper))) return 1;
  return int(std::max<int64_t>(1, std::min(ceil_div(FILL, batch * square_tiles(s, PANEL, upper)), ceil_div(m, 128))));
}

// Doubles of workspace, and how forward() and backward() cut it up.
inline int64_t forward_workspace(int64_t batch, int t, int s) {
  const int64_t parts = in_one_launch(batch, t, s) ? 0 : row_parts(batch, t, s, true);
  return batch * s * s * (parts + (s > SMALL_MAX ? 1 : 0));
}

inline int64_t backward_workspace(int64_t batch, int t, int s) {
  return batch * s * s * (row_parts(batch, t, s, false) + (t > s ? 2 : 1));
}

// launch(kernel, blocks) runs kernel(ctx, smem, block) for every block < blocks, after everything launched before.
// ShapeOf<TILE> is the thread grid of a tile.
template <template <int> class ShapeOf, class T, class Launch>
void forward(Launch&& launch, Forward<T> f, double* workspace, int64_t batch) {
  using Narrow = typename ShapeOf<PANEL>::type;
  using Wide = typename ShapeOf<WIDE>::type;
  using Tiny = typename ShapeOf<16>::type;
  const int s = f.s, m = f.m();
  const bool all = in_one_launch(batch, f.t, s);
  f.parts = all ? 0 : row_parts(batch, f.t, s, true);
  f.gram = workspace;
  f.other = workspace + batch * f.parts * s * s;

  if (f.parts > 0) {
    const int64_t wide = batch * f.parts * square_tiles(s, WIDE, true);
    if (use_wide(wide))
      launch(GramKernel<Wide, T>{f}, wide);
    else
      launch(GramKernel<Narrow, T>{f}, batch * f.parts * square_tiles(s, PANEL, true));
  }
  if (s <= 16) {
    launch(SmallForwardKernel<Tiny, T>{f, all}, batch);
  } else if (s <= PANEL) {
    launch(SmallForwardKernel<Narrow, T>{f, all}, batch);
  } else if (s <= SMALL_MAX) {
    launch(SmallForwardKernel<Wide, T>{f, all}, batch);
  } else {
    const int64_t blocks = batch * square_tiles(s, PANEL, false);
    launch(FirstPanelKernel<Narrow, T>{f}, blocks);
    for (int k = 1; k < ceil_div(s, PANEL); ++k) launch(PanelKernel<Narrow>{f.r, f.other, s, k}, blocks);
    const int64_t wide = batch * square_tiles(s, WIDE, false);
    if (use_wide(wide))
      launch(InverseKernel<Wide, T>{f}, wide);
    else
      launch(InverseKernel<Narrow, T>{f}, blocks);
  }
  if (m > 0 && !all) {
    const int64_t wide = batch * ceil_div(m, WIDE) * ceil_div(s, WIDE);
    if (use_wide(wide))
      launch(Q2Kernel<Wide, T>{f}, wide);
    else
      launch(Q2Kernel<Narrow, T>{f}, batch * ceil_div(m, PANEL) * ceil_div(s, PANEL));
  }
}

template <template <int> class ShapeOf, class T, class Launch>
void backward(Launch&& launch, Backward<T> b, double* workspace, int64_t batch) {
  using Narrow = typename ShapeOf<PANEL>::type;
  using Wide = typename ShapeOf<WIDE>::type;
  using Tiny = typename ShapeOf<16>::type;
  const int s = b.s, m = b.m();
  b.parts = row_parts(batch, b.t, s, false);
  b.left = workspace;
  b.gram = b.left + batch * s * s;
  b.sym = b.gram + batch * b.parts * s * s;

  if (in_one_launch(batch, b.t, s)) {
    if (s <= 16)
      launch(SmallBackwardKernel<Tiny, T>{b}, batch);
    else if (s <= PANEL)
      launch(SmallBackwardKernel<Narrow, T>{b}, batch);
    else
      launch(SmallBackwardKernel<Wide, T>{b}, batch);
    return;
  }
  const int64_t wide = batch * square_tiles(s, WIDE, false), narrow = batch * square_tiles(s, PANEL, false);
  if (b.parts > 0) {
    if (use_wide(wide * b.parts))
      launch(GradGramKernel<Wide, T>{b}, wide * b.parts);
    else
      launch(GradGramKernel<Narrow, T>{b}, narrow * b.parts);
  }
  if (use_wide(wide))
    launch(LeftKernel<Wide, T>{b}, wide);
  else
    launch(LeftKernel<Narrow, T>{b}, narrow);
  const int64_t wide_pairs = batch * square_tiles(s, WIDE, true);
  if (use_wide(wide_pairs))
    launch(GradUKernel<Wide, T>{b}, wide_pairs);
  else
    launch(GradUKernel<Narrow, T>{b}, batch * square_tiles(s, PANEL, true));
  if (m > 0) {
    const int64_t wide_rows = batch * ceil_div(m, WIDE) * ceil_div(s, WIDE);
    if (use_wide(wide_rows))
      launch(GradVKernel<Wide, T>{b}, wide_rows);
    else
      launch(GradVKernel<Narrow, T>{b}, batch * ceil_div(m, PANEL) * ceil_div(s, PANEL));
  }
}

}  // namespace vkd::cayley
