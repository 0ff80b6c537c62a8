// A feed-forward block that reads what its thresholds keep: of inputs the columns, of hidden units
// the rows, for a few tokens. With several, what any of them keeps is read once for all.
//
// What passes from product to product is rounded to the weights' type T, as torch's operators round
// it; sums are in fp32. A matrix may lie transposed: its columns are then rows of the memory.
//
// Shapes: T tokens, D width, M hidden units.

#include "grouped_mlp.h"
#include "listed_rows.h"
#include "residual.h"

namespace moezoo {
namespace {

constexpr int kCounts = 4;  // of a token: inputs of the first matrix and of up, gates, hidden units

// A matrix (rows, width), which may lie as (width, rows).
template <class T>
struct Laid {
  Matrix<T> matrix;
  bool transposed;
};

// kept (width,) = values where their size exceeds the thresholds, or they are no number; zero
// elsewhere. All where there are no thresholds. Returns how many are kept. The two may be the same.
int64_t keep(const float* values, const float* thresholds, int64_t width, float* kept) {
  if (!thresholds) {
    std::copy(values, values + width, kept);
    return width;
  }
  Ints none{};
  by_registers(width, [&](int64_t c, auto lanes) {
    const Floats x = load(values + c, lanes), size = x < 0.0f ? -x : x;
    const Ints passes = ~reinterpret_cast<Ints>(size <= load(thresholds + c, lanes));
    store(kept + c, passes ? x : broadcast(0.0f), lanes);
    // Lanes behind the row's end hold zeros, of which none exceeds the zero beside it.
    none += passes;
  });
  int32_t lanes[kLanes];
  std::memcpy(lanes, &none, sizeof none);
  int64_t count = 0;
  for (int64_t i = 0; i < kLanes; ++i) count -= lanes[i];
  return count;
}

// The tokens' vectors (T, width), and the columns that any of them uses.
struct Used {
  const float* vectors;
  int64_t tokens, width;
  std::vector<int64_t> columns;
  std::vector<float> factors;  // (T, n), the vectors at those columns

  Used(const float* given, int64_t count, int64_t wide)
      : vectors(given), tokens(count), width(wide), columns(columns_in_use(given, count, wide)) {
    const int64_t n = size();
    factors.resize(tokens * n);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < n; ++i) factors[t * n + i] = vectors[t * width + columns[i]];
  }

  int64_t size() const { return static_cast<int64_t>(columns.size()); }
};

template <class T>
struct Selective {
  Laid<T> gate, up, down;  // gate's weight is null if there is none
  const float *input, *up_input, *gates, *hidden;  // thresholds, each may be null
  const uint8_t* dense;                            // (T,) or null: tokens that keep everything
  int64_t tokens, width, hidden_width, activation;
  Glu glu;
  int64_t* counts;  // (T, 4) or null
  int32_t threads;

  // kept (T, K) of values (T, K); counts go to the given column.
  void keep_all(const float* values, const float* thresholds, int64_t size, int column,
                float* kept) const {
    for (int64_t t = 0; t < tokens; ++t) {
      const float* own = dense && dense[t] ? nullptr : thresholds;
      const int64_t found = keep(values + t * size, own, size, kept + t * size);
      if (counts) counts[t * kCounts + column] = found;
    }
  }

  // out (T, N) = the matrix times x, of whose columns only those in use are read if it lies so.
  void multiply_used(const Laid<T>& laid, const float* vectors, float* out) const {
    const auto& m = laid.matrix;
    const auto rows_out = rows_of(out, tokens, m.rows);
    if (!laid.transposed) {
      const auto rows_x = rows_of(vectors, tokens, m.width);
      parallel_ranges(m.rows, least_rows(m.width, tokens), threads, [&](int64_t a, int64_t b) {
        multiply<T>(m, rows_x.data(), tokens, a, b, rows_out.data());
      });
      return;
    }
    const Used used(vectors, tokens, m.width);
    const auto rows = listed_rows(m.weight, m.rows, used.columns);
    const auto factors = rows_of(used.factors.data(), tokens, used.size());
    const int64_t grain = least_rows(std::max<int64_t>(1, used.size()), tokens);
    parallel_ranges(m.rows, grain, threads, [&](int64_t a, int64_t b) {
      add_listed(rows, m.bias, factors.data(), tokens, a, b, rows_out.data());
      if constexpr (sizeof(T) == 2)
        for (float* row : rows_out)
          by_registers(b - a, [&](int64_t c, auto lanes) {
            store(row + a + c, rounded<T>(load(row + a + c, lanes)), lanes);
          });
    });
  }

  // out (T, M) = up times x, of whose rows only those are read that any token's gate lets through;
  // the others are zero.
  void multiply_passed(const float* gated, const float* vectors, float* out) const {
    if (up.transposed) return multiply_used(up, vectors, out);
    const auto& m = up.matrix;
    const auto list = columns_in_use(gated, tokens, hidden_width);
    const auto rows = listed_rows(m.weight, m.width, list);
    const auto rows_x = rows_of(vectors, tokens, m.width);
    const auto rows_out = rows_of(out, tokens, m.rows);
    std::fill(out, out + tokens * hidden_width, 0.0f);
    const int64_t grain = least_rows(m.width, tokens);
    parallel_ranges(list.size(), grain, threads, [&](int64_t a, int64_t b) {
      multiply_listed<T>(rows, m.bias, list, rows_x.data(), tokens, m.width, a, b,
                         rows_out.data());
    });
  }

  // out (T, D) of x (T, D). scratch holds 2 T M + T D floats.
  void run(const float* x, float* scratch, float* out) const {
    const int64_t numbers = tokens * hidden_width;
    float* inner = scratch;
    float* other = inner + numbers;
    float* kept = other + numbers;
    keep_all(x, input, width, 0, kept);
    const bool gated = gate.matrix.weight;
    multiply_used(gated ? gate : up, kept, inner);
    with_activation(activation, [&](auto act) {
      by_registers(numbers, [&](int64_t c, auto lanes) {
        const Floats values = load(inner + c, lanes);
        const Floats found =
            gated ? bounded_gate(act, glu, values).value : activate(act(), values).value;
        store(inner + c, rounded<T>(found), lanes);
      });
    });
    keep_all(inner, gates, hidden_width, 2, inner);
    if (gated) {
      keep_all(x, up_input, width, 1, kept);
      multiply_passed(inner, kept, other);
      by_registers(numbers, [&](int64_t c, auto lanes) {
        const Floats factor = rounded<T>(bounded_up(glu, load(other + c, lanes)).value);
        store(inner + c, rounded<T>(load(inner + c, lanes) * factor), lanes);
      });
    } else if (counts) {
      for (int64_t t = 0; t < tokens; ++t) counts[t * kCounts + 1] = 0;
    }
    keep_all(inner, hidden, hidden_width, 3, inner);
    multiply_used(down, inner, out);
  }
};

// Both functions' arguments, but for what is read and written.
template <class T>
Selective<T> selective(const void* w_gate, const void* w_up, const void* w_down,
                       const void* b_gate, const void* b_up, const void* b_down,
                       const float* input, const float* up_input, const float* gates,
                       const float* hidden, const uint8_t* dense, int64_t* counts, int64_t tokens,
                       int64_t width, int64_t hidden_width, int64_t activation, int64_t bound,
                       double gate_bound, double up_bound, double shift, int64_t gate_transposed,
                       int64_t up_transposed, int64_t down_transposed, int32_t threads) {
  const auto laid = [](const void* weight, const void* bias, int64_t rows, int64_t columns,
                       int64_t transposed) {
    const Matrix<T> matrix{static_cast<const T*>(weight), static_cast<const T*>(bias), rows,
                           columns};
    return Laid<T>{matrix, transposed != 0};
  };
  const Glu glu{bound, static_cast<float>(gate_bound), static_cast<float>(up_bound),
                static_cast<float>(shift), false};
  return {laid(w_gate, b_gate, hidden_width, width, gate_transposed),
          laid(w_up, b_up, hidden_width, width, up_transposed),
          laid(w_down, b_down, width, hidden_width, down_transposed),
          input,
          up_input,
          gates,
          hidden,
          dense,
          tokens,
          width,
          hidden_width,
          activation,
          glu,
          counts,
          threads};
}

}  // namespace
}  // namespace moezoo

using namespace moezoo;

// output (T, D) of x (T, D). w_gate is null if the block is not gated; each threshold may be, and
// then keeps everything. A matrix that is transposed lies as (columns, rows). scratch holds
// T (3 D + 2 M) floats.
MOEZOO_API void moezoo_selective_mlp(
    const void* x, void* output, const void* w_gate, const void* w_up, const void* w_down,
    const void* b_gate, const void* b_up, const void* b_down, const float* input,
    const float* up_input, const float* gates, const float* hidden, const uint8_t* dense,
    int64_t* counts, float* scratch, int64_t dtype, int64_t tokens, int64_t width,
    int64_t hidden_width, int64_t activation, int64_t bound, double gate_bound, double up_bound,
    double shift, int64_t gate_transposed, int64_t up_transposed, int64_t down_transposed,
    int32_t threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto problem =
        selective<T>(w_gate, w_up, w_down, b_gate, b_up, b_down, input, up_input, gates, hidden,
                     dense, counts, tokens, width, hidden_width, activation, bound, gate_bound,
                     up_bound, shift, gate_transposed, up_transposed, down_transposed, threads);
    float* wide = scratch;
    float* answer = wide + tokens * width;
    convert_row(static_cast<const T*>(x), wide, tokens * width);
    problem.run(wide, answer + tokens * width, answer);
    convert_row(answer, static_cast<T*>(output), tokens * width);
  });
}

// residual (B, D) += the block's answer to norm(read); read is the residual itself if it is
// null. The rest as above, scratch too, but that no token is dense and nothing is counted.
MOEZOO_API void moezoo_selective_step(
    void* residual, const void* read, const void* norm, const void* w_gate, const void* w_up,
    const void* w_down, const void* b_gate, const void* b_up, const void* b_down,
    const float* input, const float* up_input, const float* gates, const float* hidden,
    float* scratch, int64_t dtype, int64_t tokens, int64_t width, int64_t hidden_width,
    int64_t activation, int64_t bound, double gate_bound, double up_bound, double shift,
    int64_t gate_transposed, int64_t up_transposed, int64_t down_transposed, double eps,
    int32_t threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto problem = selective<T>(w_gate, w_up, w_down, b_gate, b_up, b_down, input, up_input,
                                      gates, hidden, nullptr, nullptr, tokens, width, hidden_width,
                                      activation, bound, gate_bound, up_bound, shift,
                                      gate_transposed, up_transposed, down_transposed, threads);
    float* normed = scratch;
    float* answer = normed + tokens * width;
    normalize_all(static_cast<const T*>(read ? read : residual), static_cast<const T*>(norm),
                  static_cast<float>(eps), tokens, width, normed);
    problem.run(normed, answer + tokens * width, answer);
    add_answers(answer, tokens * width, static_cast<T*>(residual));
  });
}
