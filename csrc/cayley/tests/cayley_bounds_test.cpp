// Reads and writes stay inside the tensors and the workspace: every buffer is a heap block of its exact size, and
// AddressSanitizer watches. One thread per team: which thread touches an element makes no difference here.
#include "host_launch.h"

using namespace vkd::cayley::host;

int main() {
  for (int s : {1, 15, 16, 17, 31, 33, 63, 64, 65, 97})
    for (int m : {0, 1, 30, 290}) {
      const auto w = random_weight<float>(2, s + m, s, 1), g = random_weight<float>(2, s + m, s, 2);
      const auto got = run<OneThread>(w, g, 2, s + m, s);
      CHECK(run<OneThread>(w, g, 2, s + m, s, {}, true) == got, "transposed weight: other bits at s %d m %d", s, m);
    }
}
