// The GPU's own teams (32, 128 and 256 threads), two at a time, as real threads. Built with ThreadSanitizer, which
// reports any access to shared or global memory that no barrier orders: a missing sync, or a block that meddles with
// another.

#include "host_launch.h"

using namespace vkd::cayley::host;

struct Case {
  int64_t batch;
  int t, s;
};

int main() {
  // One launch for everything in each tile size, split V^T V, t = s, panels, both tile sizes of the products.
  const Case cases[] = {{2, 20, 9}, {2, 40, 30}, {1, 70, 50}, {1, 300, 20}, {1, 66, 66}, {1, 110, 70}};
  for (const Case& c : cases) {
    const auto w = random_weight<float>(c.batch, c.t, c.s, 1), g = random_weight<float>(c.batch, c.t, c.s, 2);
    const auto expected = run<OneThread>(w, g, c.batch, c.t, c.s);
    const auto got = run<vkd::cayley::DeviceShape>(w, g, c.batch, c.t, c.s, {Order::shuffled, 2});
    CHECK(got == expected, "other bits at t %d s %d", c.t, c.s);
  }
}
