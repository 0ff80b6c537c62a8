// What surrounds each part of a transformer block: the norm before it, and the sum after it.

#pragma once

#include <cmath>

#include "few_products.h"

namespace moezoo {
namespace {

// out (K,) = x / rms(x), rounded, times the weight.
template <class T, class From>
void normalize(const From* x, const T* weight, float eps, int64_t width, float* out) {
  Floats squares{};
  by_registers(width, [&](int64_t c, auto lanes) {
    const Floats values = load(x + c, lanes);
    squares += values * values;
  });
  const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + eps);
  by_registers(width, [&](int64_t c, auto lanes) {
    const Floats unit = rounded<T>(load(x + c, lanes) * scale);
    store(out + c, rounded<T>(load(weight + c, lanes) * unit), lanes);
  });
}

template <class T>
void normalize_all(const T* residual, const T* weight, float eps, int64_t tokens, int64_t width,
                   float* out) {
  for (int64_t t = 0; t < tokens; ++t)
    normalize(residual + t * width, weight, eps, width, out + t * width);
}

// residual += answer, both (B D,).
template <class T>
void add_answers(const float* answer, int64_t numbers, T* residual) {
  by_registers(numbers, [&](int64_t c, auto lanes) {
    store(residual + c, load(residual + c, lanes) + rounded<T>(load(answer + c, lanes)), lanes);
  });
}

}  // namespace
}  // namespace moezoo
