// The hidden units of a block in decoding, rounded wherever torch's operators round them.

#pragma once

#include "few_products.h"
#include "grouped_mlp.h"

namespace moezoo {
namespace {

// out (count,) = act(gate) up, perhaps bounded, or act(gate) where up is null; it may be gate.
template <class T>
void activate_units(int64_t activation, const Glu& glu, const float* gate, const float* up,
                    int64_t count, float* out) {
  with_activation(activation, [&](auto act) {
    by_registers(count, [&](int64_t c, auto lanes) {
      const Floats x = load(gate + c, lanes);
      if (!up) {
        store(out + c, rounded<T>(activate(act(), x).value), lanes);
        return;
      }
      const Floats value = rounded<T>(bounded_gate(act, glu, x).value);
      const Floats factor = rounded<T>(bounded_up(glu, load(up + c, lanes)).value);
      store(out + c, rounded<T>(value * factor), lanes);
    });
  });
}

}  // namespace
}  // namespace moezoo
