// The activation of a row of pre-activations, which both ways of running experts share, and that of
// gated units whose factors lie apart.

#pragma once

#include <type_traits>

#include "activations.h"

namespace moezoo {
namespace {

// Calls body(A{}) with the activation as a type, so that the loops inside know it when compiled.
template <class Body>
inline void with_activation(int64_t activation, const Body& body) {
  switch (activation) {
    case kGelu: return body(std::integral_constant<int64_t, kGelu>{});
    case kGeluTanh: return body(std::integral_constant<int64_t, kGeluTanh>{});
    case kSilu: return body(std::integral_constant<int64_t, kSilu>{});
    case kRelu2: return body(std::integral_constant<int64_t, kRelu2>{});
    case kQuickGelu: return body(std::integral_constant<int64_t, kQuickGelu>{});
    case kTanh: return body(std::integral_constant<int64_t, kTanh>{});
    case kLeakyRelu: return body(std::integral_constant<int64_t, kLeakyRelu>{});
    default: return body(std::integral_constant<int64_t, kRelu>{});
  }
}

// How the factors of a gated linear unit are bounded: GLUOptions.encode of activations.py; kReluUp is
// RELU_UP there.
enum Bound : int64_t { kUnbounded = 0, kBefore = 1, kAfter = 2, kSoftcap = 3, kReluUp = 4 };

// What a gated linear unit is beside act(gate) up, with its halves one after the other.
struct Glu {
  int64_t bound;
  float gate, up, shift;
  bool interleaved;

  bool plain() const { return bound == kUnbounded && shift == 0.0f && !interleaved; }
};

// c tanh(x / c).
inline Activated softcap(Floats x, float cap) {
  const Activated bent = tanh(x / cap);
  return {cap * bent.value, bent.slope};
}

template <class A>
inline Activated bounded_gate(A activation, const Glu& glu, Floats x) {
  if (glu.bound == kSoftcap) {
    const Activated capped = softcap(x, glu.gate);
    const Floats share = sigmoid(x);
    return {capped.value * share, share * (capped.slope + capped.value * (1.0f - share))};
  }
  if (glu.bound == kBefore) {
    const Activated found = activate(activation(), x > glu.gate ? broadcast(glu.gate) : x);
    return {found.value, x > glu.gate ? broadcast(0.0f) : found.slope};
  }
  const Activated found = activate(activation(), x);
  if (glu.bound == kUnbounded || glu.bound == kReluUp) return found;
  const auto beyond = found.value > glu.gate;
  return {beyond ? broadcast(glu.gate) : found.value, beyond ? broadcast(0.0f) : found.slope};
}

inline Activated bounded_up(const Glu& glu, Floats x) {
  if (glu.bound == kReluUp) return relu(x);
  Activated found{x, broadcast(1.0f)};
  if (glu.bound == kSoftcap) found = softcap(x, glu.up);
  else if (glu.bound != kUnbounded) {
    found.value = x > glu.up ? broadcast(glu.up) : (x < -glu.up ? broadcast(-glu.up) : x);
    const Floats size = x < 0.0f ? -x : x;
    found.slope = size > glu.up ? broadcast(0.0f) : found.slope;
  }
  found.value += glu.shift;
  return found;
}

struct Pair {
  Floats gate, up;
};

// How many of the 2 n numbers of n pairs are in their first register; the others are in a second.
inline Partial first_of_pairs(int64_t pairs) { return {std::min<int64_t>(2 * pairs, kLanes)}; }

// The gate and linear numbers of columns c and after, of a row of 2 F.
template <class T, class Lanes>
inline Pair load_pair(const T* row, int64_t hidden_width, int64_t c, bool interleaved,
                      Lanes lanes) {
  if (!interleaved) return {load(row + c, lanes), load(row + hidden_width + c, lanes)};
  float numbers[2 * kLanes];
  const Partial first = first_of_pairs(lanes.count), second{2 * lanes.count - first.count};
  store(numbers, load(row + 2 * c, first), Full{});
  store(numbers + kLanes, load(row + 2 * c + first.count, second), Full{});
  float gate[kLanes], up[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    gate[i] = numbers[2 * i];
    up[i] = numbers[2 * i + 1];
  }
  return {load(gate, Full{}), load(up, Full{})};
}

template <class T, class Lanes>
inline void store_pair(T* row, int64_t hidden_width, int64_t c, bool interleaved, Pair pair,
                       Lanes lanes) {
  if (!interleaved) {
    store(row + c, pair.gate, lanes);
    store(row + hidden_width + c, pair.up, lanes);
    return;
  }
  float gate[kLanes], up[kLanes], numbers[2 * kLanes];
  store(gate, pair.gate, Full{});
  store(up, pair.up, Full{});
  for (int64_t i = 0; i < kLanes; ++i) {
    numbers[2 * i] = gate[i];
    numbers[2 * i + 1] = up[i];
  }
  const Partial first = first_of_pairs(lanes.count), second{2 * lanes.count - first.count};
  store(row + 2 * c, load(numbers, Full{}), first);
  store(row + 2 * c + first.count, load(numbers + kLanes, Full{}), second);
}

// hidden (F,) = act(inner), or act(gate) up, perhaps bounded, of inner (2 F,) if gated.
template <class A, class From, class To>
void activate_row(A activation, bool gated, const Glu& glu, const From* inner,
                  int64_t hidden_width, To* hidden) {
  if (gated && !glu.plain()) {
    by_registers(hidden_width, [&](int64_t c, auto lanes) {
      const Pair pair = load_pair(inner, hidden_width, c, glu.interleaved, lanes);
      const Floats value = bounded_gate(activation, glu, pair.gate).value;
      store(hidden + c, value * bounded_up(glu, pair.up).value, lanes);
    });
    return;
  }
  by_registers(hidden_width, [&](int64_t c, auto lanes) {
    Floats value = activate(activation(), load(inner + c, lanes)).value;
    if (gated) value *= load(inner + hidden_width + c, lanes);
    store(hidden + c, value, lanes);
  });
}

// out = act(gate) up, of rows that lie apart.
template <class A>
void gated_row(A activation, const Glu& glu, const float* gate, const float* up, int64_t width,
               float* out) {
  const bool plain = glu.plain();
  by_registers(width, [&](int64_t c, auto lanes) {
    const Floats value = load(gate + c, lanes), factor = load(up + c, lanes);
    store(out + c,
          plain ? activate(activation(), value).value * factor
                : bounded_gate(activation, glu, value).value * bounded_up(glu, factor).value,
          lanes);
  });
}

// The slopes of a row of gates and one of their factors, by those of act(gate) up.
template <class A>
void gated_row_backward(A activation, const Glu& glu, const float* slope, const float* gate,
                        const float* up, int64_t width, float* d_gate, float* d_up) {
  const bool plain = glu.plain();
  by_registers(width, [&](int64_t c, auto lanes) {
    const Floats g = load(slope + c, lanes), factor = load(up + c, lanes);
    const Floats value = load(gate + c, lanes);
    const Activated by_gate =
        plain ? activate(activation(), value) : bounded_gate(activation, glu, value);
    const Activated by_up = plain ? Activated{factor, broadcast(1.0f)} : bounded_up(glu, factor);
    store(d_gate + c, g * by_up.value * by_gate.slope, lanes);
    store(d_up + c, g * by_gate.value * by_up.slope, lanes);
  });
}

}  // namespace
}  // namespace moezoo
