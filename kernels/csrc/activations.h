// The activation functions of moezoo_kernels.activations and their slopes, a register at a time.

#pragma once

#include "vectors.h"

namespace moezoo {
namespace {

// The codes by which Python names an activation: ACTIVATION_CODES of activations.py.
enum Activation : int64_t {
  kRelu = 0,
  kGelu = 1,
  kGeluTanh = 2,
  kSilu = 3,
  kRelu2 = 4,
  kQuickGelu = 5,
  kTanh = 6,
  kLeakyRelu = 7
};

struct Activated {
  Floats value;
  Floats slope;
};

// e^x to about one unit in the last place: x = n ln 2 + r with |r| <= ln(2) / 2, whose Taylor
// series is cut where its terms are below rounding, and 2^n is written into the exponent. ln 2 is
// taken off in two parts, of which the first has few bits, so that n times it is exact.
inline Floats exponential(Floats x) {
  x = x > 88.0f ? broadcast(88.0f) : x;
  x = x < -87.0f ? broadcast(-87.0f) : x;
  const Floats shifted = x * 1.44269504f + (x < 0.0f ? broadcast(-0.5f) : broadcast(0.5f));
  const Ints n = __builtin_convertvector(shifted, Ints);
  const Floats whole = __builtin_convertvector(n, Floats);
  const Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats series = broadcast(1.0f / 5040);
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  return series * reinterpret_cast<Floats>((n + 127) << 23);
}

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

// x Φ(x). The normal distribution's tail by Abramowitz and Stegun, formula 7.1.26, whose error of
// 1.5e-7 in erf is a rounding error of Φ in fp32; its exponential is the slope's too.
inline Activated gelu(Floats x) {
  const Floats size = x < 0.0f ? -x : x;
  const Floats bell = exponential(-0.5f * x * x);
  const Floats t = 1.0f / (1.0f + 0.3275911f * 0.70710678f * size);
  Floats series = broadcast(1.061405429f);
  series = series * t - 1.453152027f;
  series = series * t + 1.421413741f;
  series = series * t - 0.284496736f;
  series = series * t + 0.254829592f;
  const Floats tail = 0.5f * series * t * bell;
  const Floats share = x < 0.0f ? tail : 1.0f - tail;
  return {x * share, share + 0.39894228f * x * bell};
}

// The tanh form is a sigmoid: (1 + tanh(z)) / 2 = sigmoid(2 z).
inline Activated gelu_tanh(Floats x) {
  constexpr float kScale = 2 * 0.79788456f, kCubic = 0.044715f;
  const Floats square = x * x;
  const Floats share = sigmoid(kScale * x * (1.0f + kCubic * square));
  const Floats inner_slope = kScale * (1.0f + 3 * kCubic * square);
  return {x * share, share + x * share * (1.0f - share) * inner_slope};
}

inline Activated silu(Floats x) {
  const Floats share = sigmoid(x);
  return {x * share, share * (1.0f + x * (1.0f - share))};
}

inline Activated quick_gelu(Floats x) {
  constexpr float kSteepness = 1.702f;
  const Floats share = sigmoid(kSteepness * x);
  return {x * share, share * (1.0f + kSteepness * x * (1.0f - share))};
}

// Below 1 the quotient of polynomials that Lambert's continued fraction of tanh begins with, whose
// error there is below rounding; above, 1 - 2 t / (1 + t) with t = e^-2|x|, which has digits there.
inline Activated tanh(Floats x) {
  const Floats size = x < 0.0f ? -x : x, square = x * x;
  const Floats t = exponential(-2.0f * size), sum = 1.0f + t;
  const Floats near = x * ((square + 105.0f) * square + 945.0f) /
                      ((15.0f * square + 420.0f) * square + 945.0f);
  const Floats far = 1.0f - 2.0f * t / sum;
  const Floats value = size < 1.0f ? near : (x < 0.0f ? -far : far);
  return {value, 4.0f * t / (sum * sum)};
}

// Comparisons are written so that a NaN stays one.
inline Activated relu(Floats x) {
  return {x < 0.0f ? broadcast(0.0f) : x, x > 0.0f ? broadcast(1.0f) : broadcast(0.0f)};
}

inline Activated relu2(Floats x) {
  const Floats positive = x < 0.0f ? broadcast(0.0f) : x;
  return {positive * positive, 2.0f * positive};
}

inline Activated leaky_relu(Floats x) {
  constexpr float kLeak = 0.01f;
  return {x < 0.0f ? kLeak * x : x, x > 0.0f ? broadcast(1.0f) : broadcast(kLeak)};
}

inline Activated activate(int64_t activation, Floats x) {
  switch (activation) {
    case kGelu: return gelu(x);
    case kGeluTanh: return gelu_tanh(x);
    case kSilu: return silu(x);
    case kRelu2: return relu2(x);
    case kQuickGelu: return quick_gelu(x);
    case kTanh: return tanh(x);
    case kLeakyRelu: return leaky_relu(x);
    default: return relu(x);
  }
}

}  // namespace
}  // namespace moezoo
