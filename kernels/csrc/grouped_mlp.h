// The activation of a row of pre-activations, which both ways of running experts share.

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

// hidden (F,) = act(inner), or act(gate) up for the two halves of inner (2 F,) if gated.
template <class A, class From, class To>
void activate_row(A activation, bool gated, const From* inner, int64_t hidden_width, To* hidden) {
  by_registers(hidden_width, [&](int64_t c, auto lanes) {
    Floats value = activate(activation(), load(inner + c, lanes)).value;
    if (gated) value *= load(inner + hidden_width + c, lanes);
    store(hidden + c, value, lanes);
  });
}

}  // namespace
}  // namespace moezoo
