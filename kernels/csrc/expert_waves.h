// What is done with a wave of rows of experts beside their products with the experts' matrices.

#pragma once

#include "expert_rows.h"
#include "waves.h"

namespace moezoo {
namespace {

// Adds answers (rows of the wave, width), perhaps weighted, to the rows of their tokens.
inline void combine_wave(const Wave& wave, const float* answers, const int64_t* tokens,
                  const float* weights, int64_t width, float* output, int32_t threads) {
  const int64_t first = wave.first();
  if (weights) weights += first;
  if (wave.one_expert())
    combine(answers, tokens + first, weights, wave.rows(), width, output, threads);
  else
    combine_by_columns(answers, tokens + first, weights, wave.rows(), width, output, threads);
}

// to (columns,) of each expert: the sum of its rows, perhaps weighted; begun anew where it opens.
template <class Row>
void sum_rows(const Wave& wave, int64_t columns, int32_t threads, float* to, const Row& row) {
  const int64_t registers = divide_up(columns, kLanes);
  const int64_t grain = kGrain / std::max<int64_t>(1, wave.rows() * kLanes) + 1;
  parallel_ranges(registers, grain, threads, [&](int64_t from, int64_t until) {
    const int64_t begin = from * kLanes, width = std::min(until * kLanes, columns) - begin;
    for (const Chunk& c : wave)
      by_registers(width, [&](int64_t at, auto lanes) {
        Floats total{};
        for (int64_t i = c.first; i < c.last; ++i) total += row(i, begin + at, lanes);
        float* sum = to + c.expert * columns + begin + at;
        store(sum, c.opens ? total : load(sum, lanes) + total, lanes);
      });
  });
}

// The product whose result is the gradient of a matrix (B, A): of the outer products of rows (A,) and
// their gradients (B,), both as Sides along columns.
inline Product outer(const Side& of_result, const Side& of_rows, const Chunk& c, int64_t b, int64_t a,
              bool transposed, float* gradient) {
  Product found{of_result, of_rows, b, a, c.rows(), Target{gradient + c.expert * a * b, a}};
  if (transposed) found = {of_rows, of_result, a, b, c.rows(), Target{gradient + c.expert * a * b, b}};
  found.accumulate = !c.opens;
  found.depth_block = c.step;
  return found;
}

}  // namespace
}  // namespace moezoo
