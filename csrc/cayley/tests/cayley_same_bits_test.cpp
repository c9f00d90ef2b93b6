// The same bits from every team size, every order of the blocks and every layout of the weight, and the launches that
// plan.h promises. A block that read what another block of its launch writes would show here.

#include "host_launch.h"

using namespace vkd::cayley::host;
namespace cayley = vkd::cayley;

template <class T>
void same_bits(int64_t batch, int t, int s, bool device_teams = false) {
  const auto w = random_weight<T>(batch, t, s, 1), g = random_weight<T>(batch, t, s, 2);
  const auto expected = run<OneThread>(w, g, batch, t, s);
  const auto same = [&](const char* what, const Result<T>& got) {
    CHECK(got == expected, "%s: other bits at batch %lld t %d s %d", what, static_cast<long long>(batch), t, s);
  };
  same("blocks backward", run<OneThread>(w, g, batch, t, s, {Order::backward}));
  same("blocks shuffled", run<OneThread>(w, g, batch, t, s, {Order::shuffled}));
  same("three teams of one", run<OneThread>(w, g, batch, t, s, {Order::shuffled, 3}));
  same("transposed weight", run<OneThread>(w, g, batch, t, s, {}, true));
  same("team of 4", run<FourThreads>(w, g, batch, t, s, {Order::backward}));
  if constexpr (std::is_same_v<T, float>)
    if (device_teams) same("the GPU's teams", run<cayley::DeviceShape>(w, g, batch, t, s, {Order::shuffled, 2}));
}

// A batch gives what its matrices give one by one, where both take the same way.
void batch_is_a_loop(int64_t batch, int t, int s) {
  const auto w = random_weight<double>(batch, t, s, 1), g = random_weight<double>(batch, t, s, 2);
  const auto all = run<OneThread>(w, g, batch, t, s);
  const int64_t size = int64_t(t) * s;
  for (int64_t z = 0; z < batch; ++z) {
    const auto one = run<OneThread>(std::vector<double>(w.begin() + z * size, w.begin() + (z + 1) * size),
                                    std::vector<double>(g.begin() + z * size, g.begin() + (z + 1) * size), 1, t, s);
    CHECK(std::equal(one.q.begin(), one.q.end(), all.q.begin() + z * size), "q of matrix %d, t %d s %d", int(z), t, s);
    CHECK(std::equal(one.grad.begin(), one.grad.end(), all.grad.begin() + z * size), "grad of matrix %d", int(z));
  }
}

void launches(int64_t batch, int t, int s, int forward, int backward) {
  const auto w = random_weight<float>(batch, t, s), g = random_weight<float>(batch, t, s);
  const auto got = run<OneThread>(w, g, batch, t, s);
  CHECK(got.forward_launches == forward && got.backward_launches == backward,
        "t %d s %d: %d and %d launches, not %d and %d", t, s, got.forward_launches, got.backward_launches, forward,
        backward);
}

int main() {
  for (int s : {1, 7, 16, 17, 32, 33, 64}) {
    same_bits<float>(2, s + 5, s, true);
    same_bits<double>(1, s + 300, s);
  }
  for (int s : {65, 96, 100}) {
    same_bits<double>(1, s, s);
    same_bits<float>(2, s + 40, s, s == 96);
  }
  same_bits<float>(1, 70 + 300, 70, true);  // V^T V in parts
  same_bits<float>(130, 9, 5);              // a batch that fills the GPU
  same_bits<float>(12, 200, 130);           // wide tiles
  same_bits<double>(1, 300, 250);
  same_bits<float>(1, 3024, 192);

  batch_is_a_loop(3, 20, 12);
  batch_is_a_loop(3, 90, 70);
  batch_is_a_loop(2, 128, 128);

  launches(1, 64, 64, 1, 1);
  launches(1, 64 + 256, 64, 1, 1);
  launches(1, 64 + 257, 64, 3, 4);
  launches(128, 64 + 257, 64, 1, 1);
  launches(6, 256, 256, 9, 2);
  launches(1, 3024, 192, 9, 4);
  launches(1, 1024, 1000, 35, 4);
}
