// The loss of rows of logits, and its slope, which takes the logits' place.
//
// Shapes: C tokens, V vocabulary.

#include <cmath>
#include <limits>

#include "activations.h"

namespace moezoo {
namespace {

// Calls body(column, lanes, s) for each register of a row, s being the number of one of four
// partial results, side by side as each waits for the one before it.
constexpr int kPartial = 4;
template <class Body>
inline void by_four(int64_t begin, int64_t end, const Body& body) {
  int64_t column = begin;
  for (; column + kPartial * kLanes <= end; column += kPartial * kLanes)
    for (int s = 0; s < kPartial; ++s) body(column + s * kLanes, Full{}, s);
  by_registers(end - column, [&](int64_t c, auto lanes) { body(column + c, lanes, 0); });
}

template <class T>
inline float largest(const T* row, int64_t width) {
  Floats most[kPartial];
  for (Floats& m : most) m = broadcast(load(row));
  by_four(0, width, [&](int64_t c, auto lanes, int s) {
    Floats values = load(row + c, lanes);
    for (int64_t i = lanes.count; i < kLanes; ++i) values[i] = most[s][i];
    most[s] = values > most[s] ? values : most[s];
  });
  float found = load(row);
  for (const Floats& m : most)
    for (int64_t i = 0; i < kLanes; ++i) found = m[i] > found ? m[i] : found;
  return found;
}

// Σ e^(row - shift): in fp32 over a few hundred numbers, of which the sums are added in fp64.
template <class T>
inline double sum_of_exponentials(const T* row, int64_t width, float shift) {
  constexpr int64_t kRun = 64 * kLanes;
  double total = 0.0;
  for (int64_t begin = 0; begin < width; begin += kRun) {
    Floats sums[kPartial] = {};
    by_four(begin, std::min(begin + kRun, width), [&](int64_t c, auto lanes, int s) {
      Floats powers = exponential(load(row + c, lanes) - shift);
      for (int64_t i = lanes.count; i < kLanes; ++i) powers[i] = 0.0f;
      sums[s] += powers;
    });
    total += sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  return total;
}

// The row is read twice for the loss and once for the slope, the last two times from a cache.
template <class T>
void losses(T* logits, const int64_t* labels, int64_t tokens, int64_t width, double z_loss,
            bool slopes, float* losses, float* partitions, int32_t threads) {
  parallel_ranges(tokens, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      T* row = logits + t * width;
      const float named = load(row + labels[t]), most = largest(row, width);
      const float log_sum = static_cast<float>(std::log(sum_of_exponentials(row, width, most)));
      losses[t] = log_sum - (named - most);
      partitions[t] = log_sum + most;
      if (!slopes) continue;
      const float factor = static_cast<float>(1.0 + 2.0 * z_loss * partitions[t]);
      by_registers(width, [&](int64_t c, auto lanes) {
        const Floats share = exponential(load(row + c, lanes) - most - log_sum);
        store(row + c, factor * share, lanes);
      });
      const float share = exponential(broadcast(named) - most - log_sum)[0];
      store(row + labels[t], factor * share - 1.0f);
    }
  });
}

}  // namespace
}  // namespace moezoo

using namespace moezoo;

// losses (C,) = log Σ e^logits[t] - logits[t, labels[t]] and partitions (C,) = log Σ e^logits[t].
// With slopes, logits (C, V) become the slope of losses + z_loss partitions²; else they stay.
MOEZOO_API void moezoo_cross_entropy(void* logits, int64_t dtype, const int64_t* labels,
                                     int64_t tokens, int64_t width, double z_loss, int64_t slopes,
                                     float* found, float* partitions, int32_t threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    losses(static_cast<T*>(logits), labels, tokens, width, z_loss, slopes != 0, found, partitions,
           threads);
  });
}
