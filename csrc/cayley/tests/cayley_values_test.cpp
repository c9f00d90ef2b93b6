// The values of the Cayley kernels on one CPU thread: against long double, against finite differences, and by what must
// hold (M R = I, Q^T Q = I) for sizes and scales where a reference costs too much.
#include <chrono>
#include <cmath>

#include "host_launch.h"

using namespace vkd::cayley::host;
using Wide = long double;

struct Matrix {
  int rows, cols;
  std::vector<Wide> data;
  Matrix(int r, int c) : rows(r), cols(c), data(size_t(r) * c, 0.0L) {}
  Wide& operator()(int i, int j) { return data[size_t(i) * cols + j]; }
  Wide operator()(int i, int j) const { return data[size_t(i) * cols + j]; }
};

Matrix operator*(const Matrix& a, const Matrix& b) {
  Matrix c(a.rows, b.cols);
  for (int i = 0; i < a.rows; ++i)
    for (int k = 0; k < a.cols; ++k)
      for (int j = 0; j < b.cols; ++j) c(i, j) += a(i, k) * b(k, j);
  return c;
}

Matrix transpose(const Matrix& a) {
  Matrix b(a.cols, a.rows);
  for (int i = 0; i < a.rows; ++i)
    for (int j = 0; j < a.cols; ++j) b(j, i) = a(i, j);
  return b;
}

// Gauss-Jordan with partial pivoting.
Matrix inverse(Matrix a) {
  const int n = a.rows;
  Matrix b(n, n);
  for (int i = 0; i < n; ++i) b(i, i) = 1;
  for (int k = 0; k < n; ++k) {
    int p = k;
    for (int i = k + 1; i < n; ++i)
      if (std::fabs(a(i, k)) > std::fabs(a(p, k))) p = i;
    for (int j = 0; j < n; ++j) {
      std::swap(a(k, j), a(p, j));
      std::swap(b(k, j), b(p, j));
    }
    const Wide pivot = a(k, k);
    for (int j = 0; j < n; ++j) {
      a(k, j) /= pivot;
      b(k, j) /= pivot;
    }
    for (int i = 0; i < n; ++i) {
      const Wide factor = a(i, k);
      if (i == k || factor == 0) continue;
      for (int j = 0; j < n; ++j) {
        a(i, j) -= factor * a(k, j);
        b(i, j) -= factor * b(k, j);
      }
    }
  }
  return b;
}

Matrix part(const double* data, int row0, int rows, int cols) {
  Matrix m(rows, cols);
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < cols; ++j) m(i, j) = data[size_t(row0 + i) * cols + j];
  return m;
}

double relative_error(const std::vector<double>& got, int64_t at, const Matrix& expected) {
  Wide error = 0, norm = 0;
  for (size_t i = 0; i < expected.data.size(); ++i) {
    const Wide difference = got[at + i] - expected.data[i];
    error += difference * difference;
    norm += expected.data[i] * expected.data[i];
  }
  return double(std::sqrt(error / std::max(norm, Wide(1e-300))));
}

// Forward and backward against the formulas in long double. kappa: how much the scales may amplify rounding errors.
void against_long_double(int64_t batch, int t, int s, double kappa, const std::vector<double>& w) {
  const auto g = random_weight<double>(batch, t, s, 7);
  const auto got = run<OneThread>(w, g, batch, t, s);
  for (int64_t z = 0; z < batch; ++z) {
    const double *wz = w.data() + z * t * s, *gz = g.data() + z * t * s;
    const Matrix U = part(wz, 0, s, s), V = part(wz, s, t - s, s), G1 = part(gz, 0, s, s), G2 = part(gz, s, t - s, s);
    Matrix M = transpose(V) * V;
    for (int i = 0; i < s; ++i)
      for (int j = 0; j < s; ++j) M(i, j) += (i == j) + U(i, j) - U(j, i);
    const Matrix R = inverse(M), VR = V * R, VG = transpose(V) * G2;
    Matrix Q(t, s), dR(s, s), grad(t, s), sym(s, s);
    for (int i = 0; i < t; ++i)
      for (int j = 0; j < s; ++j) Q(i, j) = i < s ? 2 * R(i, j) - (i == j) : -2 * VR(i - s, j);
    for (int i = 0; i < s; ++i)
      for (int j = 0; j < s; ++j) dR(i, j) = 2 * (G1(i, j) - VG(i, j));
    const Matrix dM = transpose(R) * dR * transpose(R);  // up to its sign
    for (int i = 0; i < s; ++i)
      for (int j = 0; j < s; ++j) {
        grad(i, j) = dM(j, i) - dM(i, j);
        sym(i, j) = -dM(i, j) - dM(j, i);
      }
    const Matrix left = G2 * transpose(R), right = V * sym;
    for (int i = 0; i < t - s; ++i)
      for (int j = 0; j < s; ++j) grad(s + i, j) = -2 * left(i, j) + right(i, j);
    // eps · the longest sum · kappa
    const double limit = 2.2e-16 * t * kappa;
    const double r_error = relative_error(got.r, z * s * s, R), q_error = relative_error(got.q, z * t * s, Q),
                 grad_error = relative_error(got.grad, z * t * s, grad);
    CHECK(r_error <= limit && q_error <= limit && grad_error <= limit,
          "batch %lld t %d s %d: relative errors r %.1e q %.1e grad %.1e, limit %.1e", static_cast<long long>(batch), t,
          s, r_error, q_error, grad_error, limit);
  }
}

// d/dh <G, Q(W + hD)> against <grad, D>: independent of every formula of the backward.
void against_differences(int t, int s) {
  const auto w = random_weight<double>(1, t, s, 3), g = random_weight<double>(1, t, s, 4);
  const auto d = random_weight<double>(1, t, s, 5);
  const auto value = [&](double h) {
    auto moved = w;
    for (size_t i = 0; i < w.size(); ++i) moved[i] += h * d[i];
    const auto q = run<OneThread>(moved, g, 1, t, s).q;
    return std::inner_product(q.begin(), q.end(), g.begin(), 0.0);
  };
  const auto grad = run<OneThread>(w, g, 1, t, s).grad;
  const double slope = std::inner_product(grad.begin(), grad.end(), d.begin(), 0.0);
  const double h = 1e-4;  // fourth order: h^4 = 1e-16
  const double difference = (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h);
  CHECK(std::fabs(slope - difference) <= 1e-9 * (1 + std::fabs(slope)), "t %d s %d: %.12g against %.12g", t, s, slope,
        difference);
}

// Rows of R M - I and of Q^T Q - I, a sample of them, in long double.
template <class T>
void invariants(const char* what, const std::vector<T>& w, int t, int s, double r_limit, double q_limit) {
  Output<T> q(int64_t(t) * s);
  Output<double> r(int64_t(s) * s), space(vkd::cayley::forward_workspace(1, t, s));
  const vkd::cayley::Strided<const T> weight{w.data(), int64_t(t) * s, s, 1};
  vkd::cayley::forward<OneThread>(
      HostLauncher{}, vkd::cayley::Forward<T>{weight, q.data(), r.data(), nullptr, nullptr, t, s, 0}, space.data(), 1);
  q.check("q", true);
  r.check("r", true);
  double r_worst = 0, q_worst = 0;
  for (int i : {0, s / 3, s / 2, s - 1}) {
    std::vector<Wide> row(s, 0.0L), vr(t - s, 0.0L), gram(s, 0.0L);
    for (int k = 0; k < s; ++k) {
      const Wide x = r.data()[size_t(i) * s + k];
      for (int j = 0; j < s; ++j) row[j] += x * ((k == j) + Wide(w[size_t(k) * s + j]) - Wide(w[size_t(j) * s + k]));
    }
    for (int p = 0; p < t - s; ++p) {
      for (int k = 0; k < s; ++k) vr[p] += Wide(r.data()[size_t(i) * s + k]) * w[size_t(s + p) * s + k];
      for (int j = 0; j < s; ++j) row[j] += vr[p] * w[size_t(s + p) * s + j];
    }
    for (int p = 0; p < t; ++p)
      for (int j = 0; j < s; ++j) gram[j] += Wide(q.data()[size_t(p) * s + i]) * q.data()[size_t(p) * s + j];
    for (int j = 0; j < s; ++j) {
      r_worst = std::max(r_worst, double(std::fabs(row[j] - (i == j))));
      q_worst = std::max(q_worst, double(std::fabs(gram[j] - (i == j))));
    }
  }
  std::printf("  t %4d s %4d %-26s %s: |R M - I| %.1e |Q^T Q - I| %.1e\n", t, s, what,
              sizeof(T) == 4 ? "float32" : "float64", r_worst, q_worst);
  CHECK(r_worst <= r_limit, "|R M - I| %.1e, limit %.1e", r_worst, r_limit);
  CHECK(q_worst <= q_limit, "|Q^T Q - I| %.1e, limit %.1e", q_worst, q_limit);
}

template <class T>
void invariants(int t, int s, double u, double v_low, double v_high, double r_limit, double q_limit) {
  char what[64];
  std::snprintf(what, sizeof what, "U %g V %g..%g", u, v_low, v_high);
  invariants<T>(what, random_weight<T>(1, t, s, u, v_low, v_high, 11), t, s, r_limit, q_limit);
}

// V^T V of low rank (few rows, or four strong directions): what an elimination by inverses of blocks does not survive.
// Pivoted LU leaves |R M - I| at 1e-5 here too; orthogonality is what counts.
void low_rank(int m, int s, double u, unsigned seed) {
  const int t = s + m;
  auto w = random_weight<float>(1, t, s, u, m > 50 ? 0.1 : 1e3, m > 50 ? 0.1 : 1e3, seed);
  if (m > 50) {
    const auto left = random_weight<float>(1, m, 4, 1, 1, 1, seed + 1),
               right = random_weight<float>(1, 4, s, 500, 500, 500, seed + 2);
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < s; ++j)
        for (int k = 0; k < 4; ++k) w[size_t(s + i) * s + j] += left[i * 4 + k] * right[k * s + j];
  }
  char what[64];
  std::snprintf(what, sizeof what, "U %g V of rank %d", u, m > 50 ? 4 : m);
  invariants<float>(what, w, t, s, 1e-2, 1e-6);
}

// Rows of very different scale, and entries far beyond those of a trained weight: docs/method.md has the figures.
void large_entries(int t, int s) {
  const auto largest = [](std::vector<float> w, double value) {
    float most = 0;
    for (float x : w) most = std::max(most, std::fabs(x));
    for (float& x : w) x *= float(value / most);
    return w;
  };
  auto rows = random_weight<float>(1, t, s, 1, 1, 1, 21);
  for (int i = 0; i < t; ++i)
    for (int j = 0; j < s; ++j) rows[size_t(i) * s + j] *= float(std::pow(10.0, i * 89 % t * 6.0 / t - 3));
  invariants<float>("rows 1e-3..1e3", rows, t, s, 1e-6, 1e-6);
  const auto random = random_weight<float>(1, t, s, 1, 1, 1, 22);
  invariants<float>("entries to 1e5", largest(random, 1e5), t, s, 1, 1e-6);
  invariants<float>("entries to 1e6", largest(random, 1e6), t, s, 1, 1e-4);
  const auto left = random_weight<float>(1, t, 1, 1, 1, 1, 23), right = random_weight<float>(1, s, 1, 1, 1, 1, 24);
  std::vector<float> outer(random.size());
  for (int i = 0; i < t; ++i)
    for (int j = 0; j < s; ++j) outer[size_t(i) * s + j] = left[i] * right[j];
  invariants<float>("rank 1, entries to 1e3", largest(outer, 1e3), t, s, 1, 3e-6);
  invariants<float>("rank 1, entries to 1e4", largest(outer, 1e4), t, s, 1, 3e-4);
}

int main() {
  const auto start = std::chrono::steady_clock::now();
  for (int s : {1, 2, 3, 5, 8, 15, 16, 17, 24, 31, 32, 33, 47, 48, 63, 64, 65, 80, 95, 96, 97, 127, 128, 129, 150})
    for (int m : {0, 1, 37, 300}) {
      if (s > 100 && m == 300) continue;
      against_long_double(m == 37 ? 2 : 1, s + m, s, 20, random_weight<double>(m == 37 ? 2 : 1, s + m, s));
    }
  for (int s : {1, 7, 16, 30, 64}) against_long_double(130, s + 3, s, 20, random_weight<double>(130, s + 3, s));
  for (int s : {5, 40, 100})
    against_long_double(1, s + 90, s, 1e5, random_weight<double>(1, s + 90, s, 30, 1e-3, 300, 2));
  for (int s : {1, 4, 16, 17, 32, 40, 64, 70, 100})
    for (int m : {0, 5, 270}) against_differences(s + m, s);
  std::printf("values agree with long double and with finite differences\n");

  // Entries up to 1e3 in U and V, columns of V between 1e-6 and 1e3, and all of them tiny.
  for (int s : {1, 16, 60, 192}) {
    invariants<double>(s + 300, s, 1e-6, 1e-6, 1e-6, 1e-14, 1e-14);
    invariants<double>(s + 300, s, 1, 1e3, 1e3, 1e-10, 1e-12);
    invariants<double>(s + 300, s, 1e3, 1e-6, 1e3, 1e-10, 1e-12);
    invariants<float>(s + 300, s, 1e3, 1e3, 1e3, 1e-10, 1e-6);
    invariants<float>(s + 300, s, 1, 1e-6, 1e3, 1e-10, 1e-6);
    invariants<float>(s, s, 1e3, 1, 1, 1e-10, 1e-6);
  }
  for (int s : {20, 64, 100, 155, 257})
    for (int m : {1, 3, 5, 50, 300})
      for (double u : {0.01, 1.0, 1e3}) low_rank(m, s, u, unsigned(100 * s + m));
  invariants<float>(3024, 192, 0.1, 0.1, 0.1, 1e-12, 1e-6);
  for (int t : {200, 3024}) large_entries(t, 192);
  for (int s : {256, 333, 511, 768, 1000, 1024}) invariants<float>(s + 70, s, 0.05, 0.05, 0.05, 1e-12, 1e-6);
  invariants<double>(1024, 1024, 1, 1, 1, 1e-11, 1e-11);

  std::printf("%.1f s\n", std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
}
