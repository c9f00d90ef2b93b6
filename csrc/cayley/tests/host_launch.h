// Runs the kernels of plan.h on CPU threads: teams of any thread grid, blocks in any order, memory poisoned.
#pragma once
#include <algorithm>
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "../cuda/plan.h"

namespace vkd::cayley::host {

constexpr double NaN = std::numeric_limits<double>::quiet_NaN();

#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::printf("%s:%d: failed: %s  (", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                            \
      std::printf(")\n");                                                  \
      std::exit(1);                                                        \
    }                                                                      \
  } while (0)

// Thread grids beside DeviceShape (32 to 256 threads): one thread, and two by two.
template <int TILE>
struct OneThread {
  using type = Shape<TILE, 1, 1>;
};
template <int TILE>
struct FourThreads {
  using type = Shape<TILE, 2, 2>;
};

struct Team {
  int id;
  std::barrier<>* barrier;
  int tid() const { return id; }
  void sync() {
    if (barrier) barrier->arrive_and_wait();
  }
};

enum class Order { forward, backward, shuffled };

struct HostLauncher {
  Order order = Order::forward;
  int teams = 1;  // that work at the same time, as the CTAs of a GPU do
  int launches = 0;

  template <class Kernel>
  void operator()(const Kernel& kernel, int64_t count) {
    ++launches;
    std::vector<unsigned> blocks(count);
    std::iota(blocks.begin(), blocks.end(), 0u);
    if (order == Order::backward) std::reverse(blocks.begin(), blocks.end());
    if (order == Order::shuffled) std::shuffle(blocks.begin(), blocks.end(), std::mt19937(unsigned(launches)));

    constexpr int threads = Kernel::S::THREADS;
    const auto work = [&](Team team, std::vector<double>& smem, int first) {
      for (size_t i = first; i < blocks.size(); i += teams) {
        if (team.tid() == 0) std::fill(smem.begin(), smem.end(), NaN);  // nothing is left from the block before
        team.sync();
        kernel(team, smem.data(), blocks[i]);
        team.sync();
      }
    };
    std::vector<std::vector<double>> smem(teams, std::vector<double>(Kernel::SMEM));
    if (threads * teams == 1) return work(Team{0, nullptr}, smem[0], 0);
    std::vector<std::unique_ptr<std::barrier<>>> barriers;
    std::vector<std::thread> pool;
    for (int team = 0; team < teams; ++team) barriers.push_back(std::make_unique<std::barrier<>>(threads));
    for (int team = 0; team < teams; ++team)
      for (int id = 0; id < threads; ++id)
        pool.emplace_back([&, team, id] { work(Team{id, barriers[team].get()}, smem[team], team); });
    for (auto& thread : pool) thread.join();
  }
};

// An output that starts as NaN, with a border that nobody may write to.
template <class T>
struct Output {
  static constexpr int BORDER = 64;
  std::vector<T> all;
  explicit Output(int64_t size) : all(size + 2 * BORDER, T(NaN)) {}
  T* data() { return all.data() + BORDER; }
  int64_t size() const { return int64_t(all.size()) - 2 * BORDER; }
  std::vector<T> values() const { return {all.begin() + BORDER, all.end() - BORDER}; }
  void check(const char* name, bool full) const {
    for (int i = 0; i < BORDER; ++i)
      CHECK(std::isnan(all[i]) && std::isnan(all[all.size() - 1 - i]), "%s: written outside, %d from the border", name,
            i);
    for (int64_t i = BORDER; full && i < int64_t(all.size()) - BORDER; ++i)
      CHECK(std::isfinite(all[i]), "%s: element %lld is missing or not finite", name,
            static_cast<long long>(i - BORDER));
  }
};

template <class T>
struct Result {
  std::vector<T> q, grad;
  std::vector<double> r;
  int forward_launches, backward_launches;
  bool operator==(const Result& other) const { return q == other.q && grad == other.grad && r == other.r; }
};

// weight and grad_q: (batch, t, s), contiguous. `transposed` hands them over as (batch, s, t) in memory instead.
template <template <int> class ShapeOf, class T>
Result<T> run(const std::vector<T>& weight, const std::vector<T>& grad_q, int64_t batch, int t, int s,
              HostLauncher launcher = {}, bool transposed = false) {
  std::vector<T> w = weight, g = grad_q;
  Strided<const T> ws{w.data(), int64_t(t) * s, s, 1}, gs{g.data(), int64_t(t) * s, s, 1};
  if (transposed) {
    for (int64_t z = 0; z < batch; ++z)
      for (int i = 0; i < t; ++i)
        for (int j = 0; j < s; ++j) {
          w[(z * s + j) * t + i] = weight[(z * t + i) * s + j];
          g[(z * s + j) * t + i] = grad_q[(z * t + i) * s + j];
        }
    ws.row = gs.row = 1;
    ws.col = gs.col = t;
  }
  Output<T> q(batch * t * s), grad(batch * t * s);
  Output<double> r(batch * s * s), forward_space(forward_workspace(batch, t, s)),
      backward_space(backward_workspace(batch, t, s));
  Result<T> result;
  launcher.launches = 0;
  forward<ShapeOf>(launcher, Forward<T>{ws, q.data(), r.data(), nullptr, nullptr, t, s, 0}, forward_space.data(),
                   batch);
  result.forward_launches = launcher.launches;
  launcher.launches = 0;
  backward<ShapeOf>(launcher, Backward<T>{gs, ws, r.data(), grad.data(), nullptr, nullptr, nullptr, t, s, 0},
                    backward_space.data(), batch);
  result.backward_launches = launcher.launches;
  q.check("q", true);
  r.check("r", true);
  grad.check("grad_weight", true);
  forward_space.check("forward workspace", false);
  backward_space.check("backward workspace", false);
  result.q = q.values();
  result.r = r.values();
  result.grad = grad.values();
  return result;
}

// Normal entries: U scaled by u_scale, column j of V by a factor that runs from v_low to v_high over the columns.
template <class T>
std::vector<T> random_weight(int64_t batch, int t, int s, double u_scale, double v_low, double v_high, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  std::vector<T> w(batch * t * s);
  for (int64_t z = 0; z < batch; ++z)
    for (int i = 0; i < t; ++i)
      for (int j = 0; j < s; ++j) {
        const double at = s > 1 ? double(j) / (s - 1) : 1.0;
        const double scale = i < s ? u_scale : v_low * std::pow(v_high / v_low, at);
        w[(z * t + i) * s + j] = T(scale * normal(generator));
      }
  return w;
}

template <class T>
std::vector<T> random_weight(int64_t batch, int t, int s, unsigned seed = 1) {
  const double scale = 1.0 / std::sqrt(double(s));
  return random_weight<T>(batch, t, s, scale, scale, scale, seed);
}

}  // namespace vkd::cayley::host
