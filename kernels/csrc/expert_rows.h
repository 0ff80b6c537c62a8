// What stands between the matrix products of an expert, row by row: activation, combine, gradients.
//
// Shapes: T tokens, D width, F hidden width, I = 2 F if gated else F, n rows of experts, each a
// (token, choice) pair.

#pragma once

#include "grouped_mlp.h"

namespace moezoo {
namespace {

// Numbers that are worth a thread.
constexpr int64_t kGrain = 1 << 14;

template <class Body>
inline void by_rows(int64_t rows, int64_t width, int32_t threads, const Body& body) {
  parallel_ranges(rows, kGrain / std::max<int64_t>(1, width) + 1, threads,
                  [&](int64_t first, int64_t last) {
                    for (int64_t i = first; i < last; ++i) body(i);
                  });
}

// With h = act(gate) up and g = dh, the gradient of the row's hidden activations before its router
// weight w: writes w h to `hidden` and the gradient of w h in `inner` to `grad_inner`, and returns
// <g, h>, the gradient of w.
template <class A, class T>
float activate_row_backward(A activation, bool gated, const Glu& glu, const T* grad,
                            const T* inner, float weight, int64_t hidden_width, T* hidden,
                            T* grad_inner) {
  Floats total{};
  if (gated && !glu.plain()) {
    by_registers(hidden_width, [&](int64_t c, auto lanes) {
      const Floats g = load(grad + c, lanes), weighted = weight * g;
      const Pair pair = load_pair(inner, hidden_width, c, glu.interleaved, lanes);
      const Activated gate = bounded_gate(activation, glu, pair.gate);
      const Activated up = bounded_up(glu, pair.up);
      const Pair slopes{weighted * up.value * gate.slope, weighted * gate.value * up.slope};
      store_pair(grad_inner, hidden_width, c, glu.interleaved, slopes, lanes);
      const Floats h = gate.value * up.value;
      store(hidden + c, weight * h, lanes);
      total += g * h;
    });
    return sum(total);
  }
  by_registers(hidden_width, [&](int64_t c, auto lanes) {
    const Floats g = load(grad + c, lanes), weighted = weight * g;
    const Activated gate = activate(activation(), load(inner + c, lanes));
    Floats h = gate.value, grad_gate = weighted * gate.slope;
    if (gated) {
      const Floats up = load(inner + hidden_width + c, lanes);
      h *= up;
      grad_gate *= up;
      store(grad_inner + hidden_width + c, weighted * gate.value, lanes);
    }
    store(grad_inner + c, grad_gate, lanes);
    store(hidden + c, weight * h, lanes);
    total += g * h;
  });
  return sum(total);
}

// Rows of one token stand together, as they are sorted by slot; cuts between threads fall where the
// token changes, so that no two threads add to the same one.
template <class T>
void combine(const T* rows, const int64_t* tokens, const float* weights, int64_t n, int64_t width,
             float* output, int32_t threads) {
  const auto cut = [&](int64_t i) {
    while (i > 0 && i < n && tokens[i] == tokens[i - 1]) ++i;
    return i;
  };
  const int64_t grain = kGrain / std::max<int64_t>(1, width) + 1;
  parallel_ranges(n, grain, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = cut(first); i < cut(last); ++i) {
      float* to = output + tokens[i] * width;
      const T* row = rows + i * width;
      const float weight = weights ? weights[i] : 1.0f;
      by_registers(width, [&](int64_t c, auto lanes) {
        store(to + c, load(to + c, lanes) + weight * load(row + c, lanes), lanes);
      });
    }
  });
}

// The same where rows of one token stand anywhere, as those of several experts do: threads share
// the columns.
template <class T>
void combine_by_columns(const T* rows, const int64_t* tokens, const float* weights, int64_t n,
                        int64_t width, float* output, int32_t threads) {
  const int64_t registers = (width + kLanes - 1) / kLanes;
  const int64_t grain = kGrain / std::max<int64_t>(1, n * kLanes) + 1;
  parallel_ranges(registers, grain, threads, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kLanes, columns = std::min(last * kLanes, width) - begin;
    for (int64_t i = 0; i < n; ++i) {
      float* to = output + tokens[i] * width + begin;
      const T* row = rows + i * width + begin;
      const float weight = weights ? weights[i] : 1.0f;
      by_registers(columns, [&](int64_t c, auto lanes) {
        store(to + c, load(to + c, lanes) + weight * load(row + c, lanes), lanes);
      });
    }
  });
}

}  // namespace
}  // namespace moezoo
