// Weighted bags: each token's sum of weighted rows of a table, and its gradients.
//
// Shapes: T tokens, J rows read per token, N rows of the table, R rows of its gradient, V width.

#include "row_sums.h"

namespace moezoo {
namespace {

template <class T>
void forward(const T* table, const int64_t* indices, const float* weights, int64_t tokens,
             int64_t choices, int64_t width, T* output, int32_t threads) {
  // Tokens listed at once, so that the rows of the next one are asked for in time.
  const int64_t block = std::max<int64_t>(1, 256 / std::max<int64_t>(1, choices));
  parallel_ranges(tokens, 1, threads, [&](int64_t first, int64_t last) {
    std::vector<float> sum(width);
    std::vector<int64_t> ends(block);
    WeightedRows<T> list;
    for (int64_t t = first; t < last; t += block) {
      const int64_t listed = std::min(block, last - t);
      list.clear();
      for (int64_t b = 0; b < listed; ++b) {
        for (int64_t a = (t + b) * choices; a < (t + b + 1) * choices; ++a)
          if (indices[a] >= 0) list.add(table + indices[a] * width, weights[a]);
        ends[b] = list.size();
      }
      for (int64_t b = 0; b < listed; ++b) {
        add_rows(list, b ? ends[b - 1] : 0, ends[b], width, sum.data());
        convert_row(sum.data(), output + (t + b) * width, width);
      }
    }
  });
}

// One pass over the rows that were read: a row's gradient, and, while the gradients of its tokens
// are in cache, what it gives to their weights.
template <class T>
void backward(const SortedAssignments& sorted, const T* grad, const T* table, const float* weights,
              int64_t choices, int64_t width, T* grad_table, float* grad_weights,
              int32_t threads) {
  const auto found = [&](int64_t r, const float* sum, int64_t begin, int64_t end) {
    if (grad_table) convert_row(sum, grad_table + r * width, width);
    if (!grad_weights) return;
    const T* row = table + sorted.table_row(r) * width;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t a = sorted.order[p];
      grad_weights[a] = dot(grad + a / choices * width, row, width);
    }
  };
  const auto none = [&](int64_t r) {
    if (grad_table) std::memset(grad_table + r * width, 0, width * sizeof(T));
  };
  sum_each_row(sorted, grad, weights, choices, width, threads, found, none);
}

// Without a gradient of the table, tokens in their own order: no sort is needed.
template <class T>
void weights_backward(const T* grad, const T* table, const int64_t* indices, int64_t tokens,
                      int64_t choices, int64_t width, float* grad_weights, int32_t threads) {
  constexpr int64_t kAhead = 4;
  const int64_t count = tokens * choices;
  parallel_ranges(count, 64, threads, [&](int64_t first, int64_t last) {
    for (int64_t a = first; a < last; ++a) {
      const int64_t next = indices[std::min(a + kAhead, last - 1)];
      if (next >= 0) prefetch_row(table + next * width, width);
      grad_weights[a] = indices[a] < 0 ? 0.0f
                                       : dot(grad + a / choices * width,
                                             table + indices[a] * width, width);
    }
  });
}

}  // namespace
}  // namespace moezoo

using namespace moezoo;

// output (T, V) = Σ_j weights[t, j] table[indices[t, j]], in fp32; a negative index adds nothing.
MOEZOO_API void moezoo_weighted_bag(const void* table, int64_t dtype, const int64_t* indices,
                                    const float* weights, int64_t tokens, int64_t choices,
                                    int64_t width, void* output, int32_t threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    forward(static_cast<const T*>(table), indices, weights, tokens, choices, width,
            static_cast<T*>(output), threads);
  });
}

// grad_table (R, V) and grad_weights (T, J), each null if not wanted, from grad (T, V) and the
// assignments in the order of the rows they name; rows (R,) says which those are, null for all N.
// Weights of assignments to no row are not written: let them be zero.
MOEZOO_API void moezoo_weighted_bag_backward(const void* grad, const void* table, int64_t dtype,
                                             const float* weights, int64_t choices,
                                             const int64_t* order, const int64_t* starts,
                                             const int64_t* rows, int64_t num_rows, int64_t width,
                                             void* grad_table, float* grad_weights,
                                             int32_t threads) {
  const SortedAssignments sorted{order, starts, rows, num_rows};
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    backward(sorted, static_cast<const T*>(grad), static_cast<const T*>(table), weights, choices,
             width, static_cast<T*>(grad_table), grad_weights, threads);
  });
}

// grad_weights (T, J) alone: <grad[t], table[indices[t, j]]>, zero where the index is negative.
MOEZOO_API void moezoo_weighted_bag_weights_backward(const void* grad, const void* table,
                                                     int64_t dtype, const int64_t* indices,
                                                     int64_t tokens, int64_t choices,
                                                     int64_t width, float* grad_weights,
                                                     int32_t threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    weights_backward(static_cast<const T*>(grad), static_cast<const T*>(table), indices, tokens,
                     choices, width, grad_weights, threads);
  });
}
