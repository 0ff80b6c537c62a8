// Activations less a threshold that a row's mean and deviation give, in one pass over each row and
// its copy in the nearest cache.
//
// Shapes: T rows, F width. Everything is computed in fp32; tensors are fp32 or bf16.

#include <cmath>

#include "few_products.h"
#include "grouped_mlp.h"

namespace moezoo {
namespace {

constexpr int64_t kLeastNumbers = 1 << 14;  // that are worth a thread

struct Moments {
  float mean, deviation;
};

template <class T>
Moments moments(const T* row, int64_t width) {
  Floats total{};
  by_registers(width, [&](int64_t c, auto lanes) { total += load(row + c, lanes); });
  const float mean = sum(total) / static_cast<float>(width);
  Floats squares{};
  by_registers(width, [&](int64_t c, auto lanes) {
    // Lanes behind the row's end are zeros, and would not stay so.
    const Floats centred = load(row + c, lanes) - mean;
    Floats squared = centred * centred;
    for (int64_t i = lanes.count; i < kLanes; ++i) squared[i] = 0.0f;
    squares += squared;
  });
  return {mean, std::sqrt(sum(squares) / static_cast<float>(width))};
}

// What is left of numbers above the threshold, in the precision that the activation reads.
template <class T>
Floats excess(Floats values, float threshold) {
  const Floats above = values - threshold;
  return rounded<T>(above > 0.0f ? above : broadcast(0.0f));
}

template <class A, class T>
void activate_excess(A act, const T* pre, const T* up, int64_t width, float quantile, T* hidden) {
  const Moments found = moments(pre, width);
  const float threshold = found.mean + found.deviation * quantile;
  by_registers(width, [&](int64_t c, auto lanes) {
    Floats value = activate(act(), excess<T>(load(pre + c, lanes), threshold)).value;
    if (up) value *= load(up + c, lanes);
    store(hidden + c, value, lanes);
  });
}

// With g the gradient of what is above the threshold and S its sum, that of a pre-activation u is
// g - S (1 + quantile (u - mean) / deviation) / F. `slopes` (F,) is scratch.
template <class A, class T>
void differentiate_excess(A act, const T* grad, const T* pre, const T* up, int64_t width,
                          float quantile, float* slopes, T* grad_pre, T* grad_up) {
  const Moments found = moments(pre, width);
  const float threshold = found.mean + found.deviation * quantile;
  Floats total{};
  by_registers(width, [&](int64_t c, auto lanes) {
    const Floats above = excess<T>(load(pre + c, lanes), threshold);
    const Activated activated = activate(act(), above);
    const Floats g = load(grad + c, lanes);
    Floats slope = g * activated.slope;
    if (up) {
      slope *= load(up + c, lanes);
      store(grad_up + c, g * activated.value, lanes);
    }
    slope = load(pre + c, lanes) - threshold > 0.0f ? slope : broadcast(0.0f);
    store(slopes + c, slope, lanes);
    for (int64_t i = lanes.count; i < kLanes; ++i) slope[i] = 0.0f;
    total += slope;
  });
  const float mean_slope = sum(total) / static_cast<float>(width);
  const float tilt = found.deviation > 0.0f ? quantile / found.deviation : 0.0f;
  by_registers(width, [&](int64_t c, auto lanes) {
    const Floats centred = load(pre + c, lanes) - found.mean;
    store(grad_pre + c, load(slopes + c, lanes) - mean_slope * (1.0f + tilt * centred), lanes);
  });
}

}  // namespace
}  // namespace moezoo

using namespace moezoo;

// hidden (T, F) = act(max(pre - θ, 0)), times up (T, F) unless that is null.
MOEZOO_API void moezoo_statistical_top_k(const void* pre, const void* up, int64_t dtype,
                                         int64_t rows, int64_t width, double quantile,
                                         int64_t activation, void* hidden, int32_t threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto row_of = [&](const void* data, int64_t t) {
      return data ? static_cast<const T*>(data) + t * width : nullptr;
    };
    with_activation(activation, [&](auto act) {
      parallel_ranges(rows, 1 + kLeastNumbers / width, threads, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; ++t)
          activate_excess(act, row_of(pre, t), row_of(up, t), width, static_cast<float>(quantile),
                          static_cast<T*>(hidden) + t * width);
      });
    });
  });
}

// From grad (T, F), that of the hidden activations: grad_pre (T, F) and, unless up is null,
// grad_up (T, F).
MOEZOO_API void moezoo_statistical_top_k_backward(const void* grad, const void* pre,
                                                  const void* up, int64_t dtype, int64_t rows,
                                                  int64_t width, double quantile,
                                                  int64_t activation, void* grad_pre,
                                                  void* grad_up, int32_t threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto row_of = [&](const void* data, int64_t t) {
      return data ? static_cast<const T*>(data) + t * width : nullptr;
    };
    const auto result_of = [&](void* data, int64_t t) {
      return data ? static_cast<T*>(data) + t * width : nullptr;
    };
    with_activation(activation, [&](auto act) {
      parallel_ranges(rows, 1 + kLeastNumbers / width, threads, [&](int64_t first, int64_t last) {
        std::vector<float> slopes(width);
        for (int64_t t = first; t < last; ++t)
          differentiate_excess(act, row_of(grad, t), row_of(pre, t), row_of(up, t), width,
                               static_cast<float>(quantile), slopes.data(),
                               result_of(grad_pre, t), result_of(grad_up, t));
      });
    });
  });
}
