// Experts of one neuron each: what the passes by token and by expert share.
//
// Shapes: T tokens, D width, N experts, J assignments per token, I = 2 J if gated else J. Tokens,
// their gradients and everything per assignment are fp32; the tables are fp32 or bf16.

#pragma once

#include "activations.h"
#include "memory.h"

namespace moezoo {
namespace {

// One table, or two that are read at the same rows.
template <class T>
struct Tables {
  const T* first;
  const T* second;  // null if there is one table only

  int64_t size() const { return second ? 2 : 1; }
  const T* operator[](int64_t i) const { return i ? second : first; }
};

template <class T>
struct Experts {
  Experts(const void* u, const void* v, const void* gate, int64_t width, int64_t activation)
      : u(static_cast<const T*>(u)),
        v(static_cast<const T*>(v)),
        gate(static_cast<const T*>(gate)),
        width(width),
        activation(activation) {}

  bool gated() const { return gate; }
  // Tables that x is multiplied with: the gate first, as in the pre-activations.
  Tables<T> inner() const { return gate ? Tables<T>{gate, u} : Tables<T>{u, nullptr}; }
  Tables<T> outer() const { return {v, nullptr}; }

  const T *u, *v, *gate;
  int64_t width, activation;
};

// Numbers of consecutive assignments, one array for each kind.
struct Numbers {
  float* weight;       // the router's
  float* dots[2];      // x times the gate's row and u's; ungated, both are u's
  float* coefficient;  // what v is multiplied with: weight act(u x), or weight act(gate x) (u x)
  float* answer;       // v times the output's gradient
  float* grad_dots[2];
  float* grad_weight;

  Numbers from(int64_t i) const {
    const auto at = [i](float* p) { return p ? p + i : p; };
    return {at(weight),       {at(dots[0]), at(dots[1])},           at(coefficient),
            at(answer),       {at(grad_dots[0]), at(grad_dots[1])}, at(grad_weight)};
  }
};

// Fills in the coefficients.
inline void activate_all(int64_t activation, bool gated, const Numbers& n, int64_t count) {
  by_registers(count, [&](int64_t i, auto lanes) {
    Floats hidden = activate(activation, load(n.dots[0] + i, lanes)).value;
    if (gated) hidden *= load(n.dots[1] + i, lanes);
    store(n.coefficient + i, load(n.weight + i, lanes) * hidden, lanes);
  });
}

// Fills in the coefficients and all gradients, from the answers.
inline void differentiate_all(int64_t activation, bool gated, const Numbers& n, int64_t count) {
  by_registers(count, [&](int64_t i, auto lanes) {
    const Floats weight = load(n.weight + i, lanes), answer = load(n.answer + i, lanes);
    const Activated act = activate(activation, load(n.dots[0] + i, lanes));
    const Floats linear = gated ? load(n.dots[1] + i, lanes) : broadcast(1.0f);
    const Floats hidden = act.value * linear, grad = weight * answer;
    store(n.coefficient + i, weight * hidden, lanes);
    store(n.grad_weight + i, answer * hidden, lanes);
    store(n.grad_dots[0] + i, grad * act.slope * linear, lanes);
    if (gated) store(n.grad_dots[1] + i, grad * act.value, lanes);
  });
}

// Asks for a row that is used a few rows later, into the second cache: the first can only wait for
// a few lines at once.
template <class T>
inline void request_row(const T* row, int64_t width) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (int64_t offset = 0; offset < width * int64_t{sizeof(T)}; offset += kCacheLine)
    __builtin_prefetch(bytes + offset, 0, 2);
}

// output = start + Σ weights[i] rows[i] in the order of i; without a start, from zero. A few
// registers' columns at a time, so that the sum stays in registers, and the rows, if they are few,
// in the first cache.
template <class Put, class Row, class Output>
inline void sum_rows(const Row* const* rows, const float* weights, int64_t count, int64_t width,
                     const float* start, Output* output) {
  constexpr int64_t kWide = 4;
  int64_t column = 0;
  for (; column + kWide * kLanes <= width; column += kWide * kLanes) {
    Floats sums[kWide] = {};
    if (start)
      for (int64_t k = 0; k < kWide; ++k) sums[k] = load(start + column + k * kLanes, Full{});
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < kWide; ++k)
        sums[k] += weights[i] * load(rows[i] + column + k * kLanes, Full{});
    for (int64_t k = 0; k < kWide; ++k) Put::put(output + column + k * kLanes, sums[k], Full{});
  }
  by_registers(width - column, [&](int64_t c, auto lanes) {
    c += column;
    Floats sum = start ? load(start + c, lanes) : Floats{};
    for (int64_t i = 0; i < count; ++i) sum += weights[i] * load(rows[i] + c, lanes);
    Put::put(output + c, sum, lanes);
  });
}

}  // namespace
}  // namespace moezoo
