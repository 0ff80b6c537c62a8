// What stands between the matrix products of an expert: activation, combine, and their gradients.
//
// Shapes: T tokens, K choices, D width, F hidden width, I = 2 F if gated else F, n rows of one
// expert, each a (token, choice) pair.

#include "expert_rows.h"

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
