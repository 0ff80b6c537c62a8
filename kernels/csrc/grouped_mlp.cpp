// What stands between the matrix products of an expert: activation, combine, and their gradients.
//
// Shapes: T tokens, K choices, D width, F hidden width, I = 2 F if gated else F, n rows of one
// expert, each a (token, choice) pair.

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

// The same where rows of one token stand anywhere: threads share the columns.
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

using namespace moezoo;

// hidden (n, F) = act(inner), or act(gate) up of inner (n, I) if gated: its two halves, or, if
// interleaved, its numbers in turn. Bounds and shift are those of Glu.
MOEZOO_API void moezoo_grouped_mlp_activate(const void* inner, int64_t dtype, int64_t n,
                                            int64_t hidden_width, int64_t activation,
                                            int64_t gated, int64_t bound, double gate_bound,
                                            double up_bound, double shift, int64_t interleaved,
                                            void* hidden, int32_t threads) {
  const Glu glu{bound, static_cast<float>(gate_bound), static_cast<float>(up_bound),
                static_cast<float>(shift), interleaved != 0};
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t inner_width = gated ? 2 * hidden_width : hidden_width;
    with_activation(activation, [&](auto act) {
      by_rows(n, hidden_width, threads, [&](int64_t i) {
        activate_row(act, gated != 0, glu, static_cast<const T*>(inner) + i * inner_width, hidden_width,
                     static_cast<T*>(hidden) + i * hidden_width);
      });
    });
  });
}

// From grad (n, F), the gradient of the unweighted answers times w_out: the weighted hidden
// activations hidden (n, F), the gradient grad_inner (n, I), and grad_weights (n,).
MOEZOO_API void moezoo_grouped_mlp_activate_backward(
    const void* grad, const void* inner, int64_t dtype, const float* weights, int64_t n,
    int64_t hidden_width, int64_t activation, int64_t gated, int64_t bound, double gate_bound,
    double up_bound, double shift, int64_t interleaved, void* hidden, void* grad_inner,
    float* grad_weights, int32_t threads) {
  const Glu glu{bound, static_cast<float>(gate_bound), static_cast<float>(up_bound),
                static_cast<float>(shift), interleaved != 0};
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t inner_width = gated ? 2 * hidden_width : hidden_width;
    with_activation(activation, [&](auto act) {
      by_rows(n, hidden_width, threads, [&](int64_t i) {
        grad_weights[i] = activate_row_backward(
            act, gated != 0, glu, static_cast<const T*>(grad) + i * hidden_width,
            static_cast<const T*>(inner) + i * inner_width, weights[i], hidden_width,
            static_cast<T*>(hidden) + i * hidden_width,
            static_cast<T*>(grad_inner) + i * inner_width);
      });
    });
  });
}

// output[tokens[i]] += weights[i] rows[i], in the order of i; rows (n, D), output (T, D) in fp32.
// Equal tokens stand together, unless they are `scattered`. Null weights are all one.
MOEZOO_API void moezoo_grouped_mlp_combine(const void* rows, int64_t dtype, const int64_t* tokens,
                                           const float* weights, int64_t n, int64_t width,
                                           int64_t scattered, float* output, int32_t threads) {
  with_type(dtype, [&](auto type) {
    const auto* typed = static_cast<const decltype(type)*>(rows);
    if (scattered) combine_by_columns(typed, tokens, weights, n, width, output, threads);
    else combine(typed, tokens, weights, n, width, output, threads);
  });
}
