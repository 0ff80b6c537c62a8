// All experts of a batch in one call, in fp32: a wave of rows goes through gather, both products,
// activation and combine before the next one's.
//
// Shapes: T tokens, K choices, D width, E experts, F hidden width, I = 2 F if gated else F, N rows in
// expert order. Rows are gathered while a product lays out its operands.

#include "expert_waves.h"

namespace moezoo {
namespace {

struct Unit {
  int64_t activation;
  bool gated;
  Glu glu;
};

// What all stages of either direction read.
struct Batch {
  Stack w_in, w_out;
  const int64_t *tokens, *ends;
  int64_t experts, width, hidden_width, inner_width;
  Unit unit;
  const float* weights;  // (N,)
};

void forward(const Batch& batch, const float* x, int64_t x_row, const float* bias_in,
             const float* bias_out, float* kept, float* output, int32_t threads) {
  const int64_t width = batch.width, hidden_width = batch.hidden_width;
  const int64_t inner_width = batch.inner_width;
  const Chunks chunks = chunks_of(batch.ends, batch.experts);
  const int64_t row_bytes = (width + hidden_width + inner_width) * int64_t{sizeof(float)};
  const std::vector<Wave> waves = waves_of(chunks, row_bytes, threads);
  const int64_t most = most_rows(waves);
  const Scratch own_inner = scratch(kept ? 0 : most * inner_width);
  const Scratch hidden = scratch(most * hidden_width), answers = scratch(most * width);
  const int64_t used = chunks.empty() ? 0 : chunks.back().last;
  Ahead pages(kept ? used * inner_width * int64_t{sizeof(float)} : 0);
  std::vector<Product> products;
  for (const Wave& wave : waves) {
    float* const inner = kept ? kept + wave.first() * inner_width : own_inner.get();
    if (kept) pages.writing(inner, kept + wave.last() * inner_width, kept + used * inner_width);
    products.clear();
    for (const Chunk& c : wave)
      products.push_back({Side{x, x_row, 1, batch.tokens + c.first}, batch.w_in.transposed(c.expert),
                          c.rows(), inner_width, width,
                          Target{inner + (c.first - wave.first()) * inner_width, inner_width},
                          bias_in ? bias_in + c.expert * inner_width : nullptr});
    multiply_all(products, threads);
    with_activation(batch.unit.activation, [&](auto act) {
      by_rows(wave.rows(), hidden_width, threads, [&](int64_t i) {
        activate_row(act, batch.unit.gated, batch.unit.glu, inner + i * inner_width, hidden_width,
                     hidden.get() + i * hidden_width);
      });
    });
    products.clear();
    for (const Chunk& c : wave) {
      const int64_t at = c.first - wave.first();
      products.push_back({Side{hidden.get() + at * hidden_width, hidden_width, 1},
                          batch.w_out.transposed(c.expert), c.rows(), width, hidden_width,
                          Target{answers.get() + at * width, width},
                          bias_out ? bias_out + c.expert * width : nullptr});
    }
    multiply_all(products, threads);
    combine_wave(wave, answers.get(), batch.tokens, batch.weights, width, output, threads);
  }
}

// Where gradients go; null for those that are not wanted, but of the weights (N,).
struct Wanted {
  float *x, *w_in, *w_out, *weights, *bias_in, *bias_out;
  bool in_transposed, out_transposed;  // whether matrices lie as their transposes
};

void backward(const Batch& batch, const float* grad, int64_t grad_row, const float* kept,
              const float* x, int64_t x_row, const float* bias_out, const Wanted& wanted,
              int32_t threads) {
  const int64_t width = batch.width, hidden_width = batch.hidden_width;
  const int64_t inner_width = batch.inner_width;
  const Chunks chunks = chunks_of(batch.ends, batch.experts);
  const int64_t row_bytes = (width + 2 * hidden_width + inner_width) * int64_t{sizeof(float)};
  const std::vector<Wave> waves = waves_of(chunks, row_bytes, threads);
  const int64_t most = most_rows(waves), matrix = width * int64_t{sizeof(float)} * batch.experts;
  const Scratch of_hidden = scratch(most * hidden_width), hidden = scratch(most * hidden_width);
  const Scratch of_inner = scratch(most * inner_width);
  const Scratch of_x = scratch(wanted.x ? most * width : 0);
  Ahead in_pages(matrix * inner_width), out_pages(matrix * hidden_width);
  const std::vector<int64_t> runs = runs_of(batch.ends, batch.experts);
  std::vector<Product> products;
  for (const Wave& wave : waves) {
    const int64_t first = wave.first();
    products.clear();
    for (const Chunk& c : wave)
      products.push_back({Side{grad, grad_row, 1, batch.tokens + c.first}, batch.w_out.plain(c.expert),
                          c.rows(), hidden_width, width,
                          Target{of_hidden.get() + (c.first - first) * hidden_width, hidden_width}});
    multiply_all(products, threads);
    with_activation(batch.unit.activation, [&](auto act) {
      by_rows(wave.rows(), hidden_width, threads, [&](int64_t i) {
        wanted.weights[first + i] = activate_row_backward(
            act, batch.unit.gated, batch.unit.glu, of_hidden.get() + i * hidden_width,
            kept + (first + i) * inner_width, batch.weights[first + i], hidden_width,
            hidden.get() + i * hidden_width, of_inner.get() + i * inner_width);
      });
    });
    if (bias_out)
      for (const Chunk& c : wave)
        for (int64_t i = c.first; i < c.last; ++i)
          wanted.weights[i] +=
              dot(grad + batch.tokens[i] * grad_row, bias_out + c.expert * width, width);
    if (wanted.x) {
      products.clear();
      for (const Chunk& c : wave)
        products.push_back({Side{of_inner.get() + (c.first - first) * inner_width, inner_width, 1},
                            batch.w_in.plain(c.expert), c.rows(), width, inner_width,
                            Target{of_x.get() + (c.first - first) * width, width}});
      multiply_all(products, threads);
      combine_wave(wave, of_x.get(), batch.tokens, nullptr, width, wanted.x, threads);
    }
    products.clear();
    wave.by_expert([&](const Chunk& c) {
      const int64_t at = c.first - first;
      const int64_t* const tokens = batch.tokens + c.first;
      if (wanted.w_out) {
        out_pages.writing_part(wanted.w_out, width * hidden_width, c, runs);
        products.push_back(outer(Side{grad, 1, grad_row, nullptr, tokens},
                                 Side{hidden.get() + at * hidden_width, 1, hidden_width}, c, width,
                                 hidden_width, wanted.out_transposed, wanted.w_out));
      }
      if (wanted.w_in) {
        in_pages.writing_part(wanted.w_in, inner_width * width, c, runs);
        products.push_back(outer(Side{of_inner.get() + at * inner_width, 1, inner_width},
                                 Side{x, 1, x_row, nullptr, tokens}, c, inner_width, width,
                                 wanted.in_transposed, wanted.w_in));
      }
    });
    multiply_all(products, threads);
    if (wanted.bias_in)
      sum_rows(wave, inner_width, threads, wanted.bias_in, [&](int64_t i, int64_t at, auto lanes) {
        return load(of_inner.get() + (i - first) * inner_width + at, lanes);
      });
    if (wanted.bias_out)
      sum_rows(wave, width, threads, wanted.bias_out, [&](int64_t i, int64_t at, auto lanes) {
        return batch.weights[i] * load(grad + batch.tokens[i] * grad_row + at, lanes);
      });
  }
}

}  // namespace
}  // namespace moezoo

using namespace moezoo;

// output (T, D), zeros before, gets the weighted answers of all experts; kept (N, I), unless it is
// null, the pre-activations. Rows of x are x_row apart; matrices are given by the strides of expert, row and
// column: w_in (E, I, D), w_out (E, D, F). Row i is of token tokens[i] and weighs weights[i]; expert
// e's rows end at ends[e]. The unit is as for moezoo_grouped_mlp_activate.
MOEZOO_API void moezoo_grouped_mlp_forward(
    const float* x, int64_t x_row, const float* w_in, int64_t in_expert, int64_t in_row,
    int64_t in_column, const float* w_out, int64_t out_expert, int64_t out_row, int64_t out_column,
    const int64_t* tokens, const int64_t* ends, int64_t experts, int64_t width,
    int64_t hidden_width, int64_t activation, int64_t gated, int64_t bound, double gate_bound,
    double up_bound, double shift, int64_t interleaved, const float* weights, const float* bias_in,
    const float* bias_out, float* kept, float* output, int32_t threads) {
  const Glu glu{bound, static_cast<float>(gate_bound), static_cast<float>(up_bound),
                static_cast<float>(shift), interleaved != 0};
  const Batch batch{{w_in, in_expert, in_row, in_column}, {w_out, out_expert, out_row, out_column},
                    tokens, ends, experts, width, hidden_width,
                    gated ? 2 * hidden_width : hidden_width, {activation, gated != 0, glu}, weights};
  forward(batch, x, x_row, bias_in, bias_out, kept, output, threads);
}

// From grad (T, D), rows grad_row apart, and the pre-activations kept (N, I): the gradients of x
// (T, D), zeros before; of the matrices, contiguous or as their transposes, and the biases, written
// for experts that have rows; and of the weights (N,). Null for what is not wanted, but the last; of
// bias_out where no answer has one or the weights' gradient is not read.
MOEZOO_API void moezoo_grouped_mlp_backward(
    const float* grad, int64_t grad_row, const float* kept, const float* x, int64_t x_row,
    const float* w_in, int64_t in_expert, int64_t in_row, int64_t in_column, const float* w_out,
    int64_t out_expert, int64_t out_row, int64_t out_column, const int64_t* tokens,
    const int64_t* ends, int64_t experts, int64_t width, int64_t hidden_width, int64_t activation,
    int64_t gated, int64_t bound, double gate_bound, double up_bound, double shift,
    int64_t interleaved, const float* weights, const float* bias_out, float* of_x, float* of_w_in,
    int64_t in_transposed, float* of_w_out, int64_t out_transposed, float* of_weights,
    float* of_bias_in, float* of_bias_out, int32_t threads) {
  const Glu glu{bound, static_cast<float>(gate_bound), static_cast<float>(up_bound),
                static_cast<float>(shift), interleaved != 0};
  const Batch batch{{w_in, in_expert, in_row, in_column}, {w_out, out_expert, out_row, out_column},
                    tokens, ends, experts, width, hidden_width,
                    gated ? 2 * hidden_width : hidden_width, {activation, gated != 0, glu}, weights};
  const Wanted wanted{of_x, of_w_in, of_w_out, of_weights, of_bias_in, of_bias_out,
                      in_transposed != 0, out_transposed != 0};
  backward(batch, grad, grad_row, kept, x, x_row, bias_out, wanted, threads);
}
