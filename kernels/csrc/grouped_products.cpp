// Products of rows sorted by expert with their experts' matrices, in fp32, all experts in one call.
//
// Shapes: T tokens, E experts, A and B widths, N rows in expert order; expert e's end at ends[e]. Rows
// of operands are so many numbers apart, those of results follow each other. A matrix is given by the
// strides of expert, row and column of a stack (E, B, A).

#include "expert_waves.h"

using namespace moezoo;

// out (N, B) = rows w[e]ᵀ, with a bias (E, B) unless it is null; rows (N, A), or those of tokens.
MOEZOO_API void moezoo_grouped_linear(const float* rows, int64_t step, const int64_t* tokens,
                                      const float* w, int64_t w_expert, int64_t w_row,
                                      int64_t w_column, const float* bias, const int64_t* ends,
                                      int64_t experts, int64_t b, int64_t a, float* out,
                                      int32_t threads) {
  const Stack matrices{w, w_expert, w_row, w_column};
  const Chunks chunks = chunks_of(ends, experts);
  const int64_t row_bytes = (a + b) * int64_t{sizeof(float)};
  const int64_t used = chunks.empty() ? 0 : chunks.back().last;
  Ahead pages(used * b * int64_t{sizeof(float)});
  std::vector<Product> products;
  for (const Wave& wave : waves_of(chunks, row_bytes, threads)) {
    pages.writing(out + wave.first() * b, out + wave.last() * b, out + used * b);
    products.clear();
    for (const Chunk& c : wave)
      products.push_back({Side{rows, step, 1}.from(tokens ? 0 : c.first, 0),
                          matrices.transposed(c.expert), c.rows(), b, a, Target{out + c.first * b, b},
                          bias ? bias + c.expert * b : nullptr});
    if (tokens)
      for (size_t i = 0; i < products.size(); ++i)
        products[i].left.list = tokens + wave.begin()[i].first;
    multiply_all(products, threads);
  }
}

// output (T, B), zeros before, gets weights[i] (rows[i] w[e]ᵀ + bias[e]) for the token of each row (N,
// A), in the order of rows; null weights are all one.
MOEZOO_API void moezoo_grouped_linear_sum(const float* rows, int64_t step, const float* w,
                                          int64_t w_expert, int64_t w_row, int64_t w_column,
                                          const float* bias, const int64_t* tokens,
                                          const float* weights, const int64_t* ends,
                                          int64_t experts, int64_t b, int64_t a, float* output,
                                          int32_t threads) {
  const Stack matrices{w, w_expert, w_row, w_column};
  const Chunks chunks = chunks_of(ends, experts);
  const std::vector<Wave> waves = waves_of(chunks, (a + b) * int64_t{sizeof(float)}, threads);
  const Scratch answers = scratch(most_rows(waves) * b);
  std::vector<Product> products;
  for (const Wave& wave : waves) {
    products.clear();
    for (const Chunk& c : wave)
      products.push_back({Side{rows + c.first * step, step, 1}, matrices.transposed(c.expert), c.rows(),
                          b, a, Target{answers.get() + (c.first - wave.first()) * b, b},
                          bias ? bias + c.expert * b : nullptr});
    multiply_all(products, threads);
    combine_wave(wave, answers.get(), tokens, weights, b, output, threads);
  }
}

// From grad (T, B) the gradients of moezoo_grouped_linear_sum: of rows (N, A); of the matrices, as they
// lie or as their transposes, and of the bias (E, B), for experts that have rows; of weights (N,). Null
// for what is not wanted. The bias is null if there is none.
MOEZOO_API void moezoo_grouped_linear_sum_backward(
    const float* grad, int64_t grad_step, const float* rows, int64_t step, const float* w,
    int64_t w_expert, int64_t w_row, int64_t w_column, const float* bias, const int64_t* tokens,
    const float* weights, const int64_t* ends, int64_t experts, int64_t b, int64_t a, float* of_rows,
    float* of_w, int64_t transposed, float* of_bias, float* of_weights, int32_t threads) {
  const Stack matrices{w, w_expert, w_row, w_column};
  const Chunks chunks = chunks_of(ends, experts);
  const std::vector<Wave> waves = waves_of(chunks, (2 * a + b) * int64_t{sizeof(float)}, threads);
  const bool back = of_rows || of_weights;
  const Scratch own = scratch(back && !of_rows ? most_rows(waves) * a : 0);
  const Scratch weighted = scratch(of_w ? most_rows(waves) * a : 0);
  const std::vector<int64_t> runs = runs_of(ends, experts);
  Ahead pages(experts * a * b * int64_t{sizeof(float)});
  std::vector<Product> products;
  for (const Wave& wave : waves) {
    const int64_t first = wave.first();
    float* const answers = of_rows ? of_rows + first * a : own.get();
    if (back) {
      products.clear();
      for (const Chunk& c : wave)
        products.push_back({Side{grad, grad_step, 1, tokens + c.first}, matrices.plain(c.expert),
                            c.rows(), a, b, Target{answers + (c.first - first) * a, a}});
      multiply_all(products, threads);
    }
    by_rows(wave.rows(), a, threads, [&](int64_t i) {
      const float* row = rows + (first + i) * step;
      const float weight = weights[first + i];
      if (of_weights) of_weights[first + i] = dot(answers + i * a, row, a);
      by_registers(a, [&](int64_t c, auto lanes) {
        if (of_rows) store(answers + i * a + c, weight * load(answers + i * a + c, lanes), lanes);
        if (of_w) store(weighted.get() + i * a + c, weight * load(row + c, lanes), lanes);
      });
    });
    if (of_weights && bias)
      for (const Chunk& c : wave)
        for (int64_t i = c.first; i < c.last; ++i)
          of_weights[i] += dot(grad + tokens[i] * grad_step, bias + c.expert * b, b);
    if (of_w) {
      products.clear();
      wave.by_expert([&](const Chunk& c) {
        pages.writing_part(of_w, a * b, c, runs);
        products.push_back(outer(Side{grad, 1, grad_step, nullptr, tokens + c.first},
                                 Side{weighted.get() + (c.first - first) * a, 1, a}, c, b, a,
                                 transposed != 0, of_w));
      });
      multiply_all(products, threads);
    }
    if (of_bias)
      sum_rows(wave, b, threads, of_bias, [&](int64_t i, int64_t at, auto lanes) {
        return weights[i] * load(grad + tokens[i] * grad_step + at, lanes);
      });
  }
}

// out (E, B, A), or (E, A, B) if transposed: the sum of the outer products of grad (N, B) and rows (N,
// A), or those of tokens; and sums (E, B), of grad's rows. Either is written for experts that have rows,
// and null if it is not wanted.
MOEZOO_API void moezoo_grouped_outer(const float* grad, int64_t grad_step, const float* rows,
                                     int64_t step, const int64_t* tokens, const int64_t* ends,
                                     int64_t experts, int64_t b, int64_t a, float* out,
                                     int64_t transposed, float* sums, int32_t threads) {
  const Chunks chunks = chunks_of(ends, experts);
  const std::vector<int64_t> runs = runs_of(ends, experts);
  Ahead pages(experts * a * b * int64_t{sizeof(float)});
  std::vector<Product> products;
  for (const Wave& wave : waves_of(chunks, (a + b) * int64_t{sizeof(float)}, threads)) {
    if (out) {
      products.clear();
      wave.by_expert([&](const Chunk& c) {
        pages.writing_part(out, a * b, c, runs);
        const Side right = tokens ? Side{rows, 1, step, nullptr, tokens + c.first}
                                  : Side{rows + c.first * step, 1, step};
        products.push_back(outer(Side{grad + c.first * grad_step, 1, grad_step}, right, c, b, a,
                                 transposed != 0, out));
      });
      multiply_all(products, threads);
    }
    if (sums)
      sum_rows(wave, b, threads, sums, [&](int64_t i, int64_t at, auto lanes) {
        return load(grad + i * grad_step + at, lanes);
      });
  }
}
