// Products with matrices that are mostly zero, and a block of three of them in decoding.

#include "block_sparse.h"
#include "group_sparse.h"
#include "hidden_units.h"
#include "residual.h"

namespace moezoo {
namespace {

// A matrix by blocks, or by groups, as Python gives it.
struct Given {
  const void* values;
  const void* index;      // columns of blocks, or places in groups
  const int64_t* starts;  // of rows of blocks
  const void* bias;
};

// What a matrix is: blocks of a width, or n of every m.
struct Kind {
  int64_t block, n, m;
};

template <class T, class X, class Out>
void multiply_given(const Given& given, const Kind& kind, const X* x, int64_t tokens, int64_t rows,
                    int64_t width, Out* out, int32_t threads) {
  const auto* values = static_cast<const T*>(given.values);
  const auto* bias = static_cast<const T*>(given.bias);
  if (!kind.block) {
    const auto* places = static_cast<const uint8_t*>(given.index);
    const GroupSparse<T> matrix{values, places, bias, rows, width, kind.n, kind.m};
    return multiply_by_groups(matrix, x, tokens, out, threads);
  }
  const auto* columns = static_cast<const int32_t*>(given.index);
  const BlockSparse<T> matrix{values, columns, given.starts, bias, rows, width};
  if (kind.block == 32) multiply_by_blocks<32>(matrix, x, tokens, out, threads);
  else multiply_by_blocks<16>(matrix, x, tokens, out, threads);
}

}  // namespace
}  // namespace moezoo

using namespace moezoo;

// output (T, N) = x (T, K) times a matrix of blocks of 16 or 32 or, where block is 0, of n of m.
MOEZOO_API void moezoo_sparse_linear(const void* x, void* output, const void* values,
                                     const void* index, const int64_t* starts, const void* bias,
                                     int64_t dtype, int64_t tokens, int64_t rows, int64_t width,
                                     int64_t block, int64_t n, int64_t m, int32_t threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    multiply_given<T>({values, index, starts, bias}, {block, n, m}, static_cast<const T*>(x),
                      tokens, rows, width, static_cast<T*>(output), threads);
  });
}

// residual (B, D) += the answer of a block of such matrices to norm(read); read is the residual
// itself if it is null. The gate's values are null if it is not gated. scratch holds B (D + 2 F) floats.
MOEZOO_API void moezoo_sparse_step(
    void* residual, const void* read, const void* norm, const void* gate_values,
    const void* up_values, const void* down_values, const void* gate_index, const void* up_index, const void* down_index,
    const int64_t* gate_starts, const int64_t* up_starts, const int64_t* down_starts,
    const void* b_gate, const void* b_up, const void* b_down, float* scratch, int64_t dtype,
    int64_t tokens, int64_t width, int64_t hidden_width, int64_t block, int64_t n, int64_t m,
    int64_t activation, int64_t bound, double gate_bound, double up_bound, double shift, double eps,
    int32_t threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const Kind kind{block, n, m};
    const int64_t numbers = tokens * hidden_width;
    float* normed = scratch;
    float* hidden = normed + tokens * width;
    float* factor = hidden + numbers;
    normalize_all(static_cast<const T*>(read ? read : residual), static_cast<const T*>(norm),
                  static_cast<float>(eps), tokens, width, normed);
    const auto multiply = [&](const Given& given, const float* from, int64_t rows, int64_t columns,
                              float* to) {
      multiply_given<T>(given, kind, from, tokens, rows, columns, to, threads);
    };
    const Given up{up_values, up_index, up_starts, b_up};
    const Glu glu{bound, static_cast<float>(gate_bound), static_cast<float>(up_bound),
                  static_cast<float>(shift), false};
    if (gate_values) {
      multiply({gate_values, gate_index, gate_starts, b_gate}, normed, hidden_width, width, hidden);
      multiply(up, normed, hidden_width, width, factor);
    } else {
      multiply(up, normed, hidden_width, width, hidden);
    }
    activate_units<T>(activation, glu, hidden, gate_values ? factor : nullptr, numbers, hidden);
    multiply({down_values, down_index, down_starts, b_down}, hidden, width, hidden_width, normed);
    add_answers(normed, tokens * width, static_cast<T*>(residual));
  });
}
