// Gated linear units in fp32 whose factors lie apart: one pass forward, one back, nothing between.

#include "grouped_mlp.h"

namespace moezoo {
namespace {

constexpr int64_t kGrain = 1 << 14;  // numbers that are worth a thread

// Calls body(activation, first, count) on ranges of n numbers.
template <class Body>
void by_ranges(int64_t n, int64_t activation, int32_t threads, const Body& body) {
  with_activation(activation, [&](auto act) {
    parallel_ranges(n, kGrain, threads,
                    [&](int64_t first, int64_t last) { body(act, first, last - first); });
  });
}

}  // namespace
}  // namespace moezoo

using namespace moezoo;

// out (n,) = act(gate) up; bounds and shift are those of Glu.
MOEZOO_API void moezoo_gated_unit(const float* gate, const float* up, int64_t n,
                                  int64_t activation, int64_t bound, double gate_bound,
                                  double up_bound, double shift, float* out, int32_t threads) {
  const Glu glu{bound, static_cast<float>(gate_bound), static_cast<float>(up_bound),
                static_cast<float>(shift), false};
  by_ranges(n, activation, threads, [&](auto act, int64_t at, int64_t count) {
    gated_row(act, glu, gate + at, up + at, count, out + at);
  });
}

// The slopes of gate and up (n,), from those of the result.
MOEZOO_API void moezoo_gated_unit_backward(const float* slope, const float* gate, const float* up,
                                           int64_t n, int64_t activation, int64_t bound,
                                           double gate_bound, double up_bound, double shift,
                                           float* d_gate, float* d_up, int32_t threads) {
  const Glu glu{bound, static_cast<float>(gate_bound), static_cast<float>(up_bound),
                static_cast<float>(shift), false};
  by_ranges(n, activation, threads, [&](auto act, int64_t at, int64_t count) {
    gated_row_backward(act, glu, slope + at, gate + at, up + at, count, d_gate + at, d_up + at);
  });
}
