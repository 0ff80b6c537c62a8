// Adam on the rows of a table that have a gradient: each row, and its two moments, are read and
// written once, and no others.

#include <cmath>

#include "vectors.h"

namespace moezoo {
namespace {

constexpr int64_t kLeastNumbers = 1 << 14;  // that are worth a thread
constexpr int64_t kAhead = 8;               // rows that are asked for in advance

struct Adam {
  float new_first, new_second, eps, step_size;

  void row(const float* __restrict gradient, float* __restrict first, float* __restrict second,
           float* __restrict weight, int64_t width) const {
    for (int64_t c = 0; c < width; ++c) {
      const float g = gradient[c];
      const float m = first[c] + (g - first[c]) * new_first;
      const float v = second[c] + (g * g - second[c]) * new_second;
      first[c] = m;
      second[c] = v;
      weight[c] -= step_size * (m / (std::sqrt(v) + eps));
    }
  }
};

}  // namespace
}  // namespace moezoo

using namespace moezoo;

// One step of the rows (R,) of a table (N, D), none of them twice, by gradients (R, D):
// m += (g - m) (1 - β₁), v += (g² - v) (1 - β₂), w -= step_size m / (√v + eps).
MOEZOO_API void moezoo_adam_rows(float* table, float* first, float* second, const int64_t* rows,
                                 const float* gradients, int64_t num_rows, int64_t width,
                                 double beta1, double beta2, double eps, double step_size,
                                 int32_t threads) {
  const Adam adam{static_cast<float>(1.0 - beta1), static_cast<float>(1.0 - beta2),
                  static_cast<float>(eps), static_cast<float>(step_size)};
  parallel_ranges(num_rows, 1 + kLeastNumbers / width, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t next = rows[std::min(r + kAhead, end - 1)] * width, own = rows[r] * width;
      prefetch_row(table + next, width);
      prefetch_row(first + next, width);
      prefetch_row(second + next, width);
      adam.row(gradients + r * width, first + own, second + own, table + own, width);
    }
  });
}
