// A dense feed-forward block on a few tokens, part by part: products, and the activation between.

#pragma once

#include "few_products.h"
#include "hidden_units.h"

namespace moezoo {
namespace {

// Several maps of the same x; the results of one vector lie side by side in out.
template <class T, int kParts>
void multiply_parts(const Matrix<T> (&parts)[kParts], const float* x, int64_t vectors, float* out,
                    int32_t threads) {
  int64_t total = 0;
  for (const auto& part : parts) total += part.rows;
  const auto rows_x = rows_of(x, vectors, parts[0].width);
  const int64_t grain = least_rows(parts[0].width, vectors);
  parallel_ranges(total, grain, threads, [&](int64_t first, int64_t last) {
    int64_t before = 0;
    for (const auto& part : parts) {
      const int64_t begin = std::max<int64_t>(first - before, 0);
      const int64_t end = std::min(last - before, part.rows);
      if (begin < end) {
        const auto rows_out = rows_of(out + before, vectors, total);
        multiply<T>(part, rows_x.data(), vectors, begin, end, rows_out.data());
      }
      before += part.rows;
    }
  });
}

// hidden (B, F) = act(gate) up, perhaps bounded, or act(up), of inner (B, F or 2 F).
template <class T>
void activate_all(int64_t activation, bool gated, const Glu& glu, const float* inner,
                  int64_t tokens, int64_t hidden_width, float* hidden) {
  const int64_t inner_width = gated ? 2 * hidden_width : hidden_width;
  for (int64_t t = 0; t < tokens; ++t) {
    const float* from = inner + t * inner_width;
    activate_units<T>(activation, glu, from, gated ? from + hidden_width : nullptr, hidden_width,
                      hidden + t * hidden_width);
  }
}

// The block's matrices, (F, D), (F, D) and (D, F); the gate's weight is null if there is none.
template <class T>
struct DenseBlock {
  Matrix<T> gate, up, down;
  int64_t activation;
  Glu glu;

  // hidden (B, F) of x (B, D); inner holds B F or B 2 F floats.
  void hide(const float* x, int64_t tokens, float* inner, float* hidden, int32_t threads) const {
    if (gate.weight) multiply_parts<T>({gate, up}, x, tokens, inner, threads);
    else multiply_parts<T>({up}, x, tokens, inner, threads);
    activate_all<T>(activation, gate.weight, glu, inner, tokens, up.rows, hidden);
  }

  // out (B, D) of hidden (B, F).
  void answer(const float* hidden, int64_t tokens, float* out, int32_t threads) const {
    multiply_parts<T>({down}, hidden, tokens, out, threads);
  }
};

}  // namespace
}  // namespace moezoo
