// Products of a matrix's rows with a few vectors: each row is read once, several at a time, and
// multiplied with all vectors while it is in the nearest cache.
//
// Shapes: N rows, K width of a row, T vectors.

#pragma once

#include <type_traits>

#include "lane_sums.h"

namespace moezoo {
namespace {

// Asks for a line that is read soon, but not at once: into the second cache, past which more lines
// can be under way than into the first.
template <class T>
inline void fetch_ahead(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

// Rounds to the precision of T.
template <class T>
inline Floats rounded(Floats values) {
  if constexpr (sizeof(T) == 2) return widen(narrow(values));
  else return values;
}

template <class T>
inline float rounded(float value) {
  T stored;
  store(&stored, value);
  return load(&stored);
}

// A linear map; the bias may be null.
template <class T>
struct Matrix {
  const T* weight;  // (N, K)
  const T* bias;    // (N,)
  int64_t rows, width;
};

// Sums of products whose lanes are still to be added up, and where the totals go.
template <class Round>
class Totals {
 public:
  void add(Floats sum, float bias, float* target) {
    sums_[count_] = sum;
    biases_[count_] = bias;
    targets_[count_] = target;
    if (++count_ == kLanes) flush();
  }

  void flush() {
    if (!count_) return;
    const Floats totals = sums_of_lanes(sums_);
    float lanes[kLanes];
    std::memcpy(lanes, &totals, sizeof lanes);
    for (int64_t i = 0; i < count_; ++i) *targets_[i] = rounded<Round>(lanes[i] + biases_[i]);
    count_ = 0;
  }

 private:
  Floats sums_[kLanes] = {};
  float biases_[kLanes];
  float* targets_[kLanes];
  int64_t count_ = 0;
};

// Rows that stay in the nearest cache while all vectors pass, and vectors of one pass: as many sums
// as registers are left for.
constexpr int kBlock = 4;
constexpr int kPass = kLanes >= 16 ? 4 : 2;

// A pass: kRows rows and kVectors vectors. Meanwhile the rows ahead are asked for: hardware that
// fetches in advance stops at the end of a page, which comes every few rows.
template <int kRows, int kVectors, class T, class Round>
inline void multiply_rows(const Matrix<T>& m, int64_t row, const float* const* x,
                          float* const* out, const T* ahead, int64_t rows_ahead,
                          Totals<Round>& totals) {
  const T* rows = m.weight + row * m.width;
  Floats sums[kRows][kVectors] = {};
  const auto column = [&](int64_t c, auto lanes) {
    Floats weights[kRows];
    for (int r = 0; r < kRows; ++r) weights[r] = load(rows + r * m.width + c, lanes);
    for (int64_t a = 0; a < rows_ahead; ++a) fetch_ahead(ahead + a * m.width + c);
    for (int t = 0; t < kVectors; ++t) {
      const Floats values = load(x[t] + c, lanes);
      for (int r = 0; r < kRows; ++r) sums[r][t] += weights[r] * values;
    }
  };
  by_registers(m.width, column);
  for (int r = 0; r < kRows; ++r) {
    const float bias = m.bias ? load(m.bias + row + r) : 0.0f;
    for (int t = 0; t < kVectors; ++t) totals.add(sums[r][t], bias, out[t] + row + r);
  }
}

// Bytes by which a matrix that is read from front to back is asked for in advance.
constexpr int64_t kAheadBytes = 2048;

// Rows so long that they are read one after the other for a single vector: of several at a time,
// each would be a stream of its own, and hardware follows one stream of large pages 1.4 times as
// fast. Shorter rows are mostly in a cache, and end too soon.
constexpr int64_t kLongBytes = 1024;

// What multiply returns for one vector.
template <class Round, class T>
inline void multiply_one(const Matrix<T>& m, const float* x, int64_t first, int64_t last,
                         float* out) {
  constexpr int64_t kAheadWeights = kAheadBytes / int64_t{sizeof(T)};
  Totals<Round> totals;
  for (int64_t row = first; row < last; ++row) {
    const T* weights = m.weight + row * m.width;
    Floats sum{};
    by_registers(m.width, [&](int64_t c, auto lanes) {
      sum += load(weights + c, lanes) * load(x + c, lanes);
      fetch_ahead(weights + c + kAheadWeights);
    });
    totals.add(sum, m.bias ? load(m.bias + row) : 0.0f, out + row);
  }
  totals.flush();
}

// out[t][n] for first <= n < last: the products of those rows with x[t] (K,), with their biases,
// rounded to Round.
template <class Round, class T>
inline void multiply(const Matrix<T>& m, const float* const* x, int64_t vectors, int64_t first,
                     int64_t last, float* const* out) {
  if (vectors == 1 && m.width * int64_t{sizeof(T)} >= kLongBytes)
    return multiply_one<Round>(m, x[0], first, last, out[0]);
  const int64_t passes = (vectors + kPass - 1) / kPass;
  Totals<Round> totals;
  for (int64_t row = first; row < last; row += kBlock) {
    const int64_t rows = std::min<int64_t>(kBlock, last - row);
    const int64_t next = std::min<int64_t>(kBlock, last - row - rows);
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t begin = next * pass / passes, ahead = next * (pass + 1) / passes - begin;
      const T* from = m.weight + (row + kBlock + begin) * m.width;
      int64_t t = pass * kPass;
      const int64_t end = std::min<int64_t>(t + kPass, vectors);
      const auto run = [&](auto count) {
        constexpr int kVectors = count();
        if (rows == kBlock)
          multiply_rows<kBlock, kVectors>(m, row, x + t, out + t, from, ahead, totals);
        else
          for (int64_t r = row; r < row + rows; ++r)
            multiply_rows<1, kVectors>(m, r, x + t, out + t, from, ahead, totals);
        t += kVectors;
      };
      if constexpr (kPass == 4)
        if (end - t == 4) run(std::integral_constant<int, 4>{});
      if (end - t >= 2) run(std::integral_constant<int, 2>{});
      if (end > t) run(std::integral_constant<int, 1>{});
    }
  }
  totals.flush();
}

// Rows of a transposed matrix that are added up in registers before they are added to the sums.
constexpr int kDeep = 8;

// out[t][n] += sum of kRows terms x[t][k] weight[k][n] from k on, for first <= n < last, of a
// weight (K, stride). Meanwhile the rows ahead are asked for.
template <int kRows, class T>
inline void add_rows_times(const T* weight, int64_t stride, const float* const* x, int64_t k,
                           int64_t vectors, int64_t first, int64_t last, int64_t rows_ahead,
                           float* const* out) {
  by_registers(last - first, [&](int64_t column, auto lanes) {
    const int64_t c = first + column;
    Floats weights[kRows];
    for (int r = 0; r < kRows; ++r) weights[r] = load(weight + (k + r) * stride + c, lanes);
    for (int64_t a = 0; a < rows_ahead; ++a)
      fetch_ahead(weight + (k + kRows + a) * stride + c);
    for (int64_t t = 0; t < vectors; ++t) {
      Floats sum = weights[0] * x[t][k];
      for (int r = 1; r < kRows; ++r) sum += weights[r] * x[t][k + r];
      store(out[t] + c, load(out[t] + c, lanes) + sum, lanes);
    }
  });
}

// What multiply returns in fp32, of a matrix that is stored as (K, N).
template <class T>
inline void multiply_transposed(const Matrix<T>& m, const float* const* x, int64_t vectors,
                                int64_t first, int64_t last, float* const* out) {
  for (int64_t t = 0; t < vectors; ++t) {
    if (m.bias) convert_row(m.bias + first, out[t] + first, last - first);
    else std::fill(out[t] + first, out[t] + last, 0.0f);
  }
  int64_t k = 0;
  for (; k + kDeep <= m.width; k += kDeep) {
    const int64_t ahead = std::min<int64_t>(kDeep, m.width - k - kDeep);
    add_rows_times<kDeep>(m.weight, m.rows, x, k, vectors, first, last, ahead, out);
  }
  for (; k < m.width; ++k)
    add_rows_times<1>(m.weight, m.rows, x, k, vectors, first, last, 0, out);
}

// How many rows of a matrix make a thread worth its waking, which takes as long as reading some
// hundred kilobytes: rows of so many weights, each multiplied with so many vectors.
inline int64_t least_rows(int64_t weights_per_row, int64_t vectors) {
  constexpr int64_t kLeastWeights = 1 << 17;
  return 1 + kLeastWeights / (weights_per_row * (1 + vectors / kPass));
}

// Pointers to rows that lie a stride apart.
template <class P>
inline std::vector<P*> rows_of(P* first, int64_t rows, int64_t stride) {
  std::vector<P*> pointers(rows);
  for (int64_t i = 0; i < rows; ++i) pointers[i] = first + i * stride;
  return pointers;
}

}  // namespace
}  // namespace moezoo
