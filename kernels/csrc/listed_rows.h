// Products with those rows of a matrix that a list names. Each is read once, several at a time, and
// the next ones are asked for meanwhile: no hardware guesses which those are.
//
// Shapes: K width of a row, T vectors, n rows of the list.

#pragma once

#include "few_products.h"

namespace moezoo {
namespace {

// How many groups of rows away those are that are asked for.
constexpr int kAhead = 2;

inline int64_t rows_ahead(int64_t left, int64_t most) {
  return std::max<int64_t>(0, std::min(left, most));
}

// Which columns of vectors (T, width) hold a number other than zero in any of them.
inline std::vector<int64_t> columns_in_use(const float* vectors, int64_t count, int64_t width) {
  std::vector<int64_t> columns(width);
  int64_t found = 0;
  for (int64_t c = 0; c < width; ++c) {
    bool used = false;
    for (int64_t t = 0; t < count; ++t) used |= vectors[t * width + c] != 0.0f;
    columns[found] = c;
    found += used;
  }
  columns.resize(found);
  return columns;
}

// Pointers to the rows of a matrix that a list names.
template <class T>
std::vector<const T*> listed_rows(const T* matrix, int64_t width,
                                  const std::vector<int64_t>& list) {
  std::vector<const T*> rows(list.size());
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = matrix + list[i] * width;
  return rows;
}

// out[t][c] += Σ factors[t][r] rows[r][c] over kRows rows, for first <= c < last.
template <int kRows, int kVectors, class T>
inline void add_several(const T* const* rows, const T* const* ahead, int64_t rows_ahead,
                        const float* const* factors, int64_t first, int64_t last,
                        float* const* out) {
  by_registers(last - first, [&](int64_t column, auto lanes) {
    const int64_t c = first + column;
    Floats weights[kRows];
    for (int r = 0; r < kRows; ++r) weights[r] = load(rows[r] + c, lanes);
    for (int64_t a = 0; a < rows_ahead; ++a) fetch_ahead(ahead[a] + c);
    for (int t = 0; t < kVectors; ++t) {
      Floats sum = weights[0] * factors[t][0];
      for (int r = 1; r < kRows; ++r) sum += weights[r] * factors[t][r];
      store(out[t] + c, load(out[t] + c, lanes) + sum, lanes);
    }
  });
}

// Calls run(count) for consecutive passes over vectors, count being 4 or 2 or 1 as a constant;
// pass is the number of the pass's first vector.
template <class Run>
inline void by_passes(int64_t vectors, const Run& run) {
  int64_t t = 0;
  if constexpr (kPass == 4)
    for (; t + 4 <= vectors; t += 4) run(t, std::integral_constant<int, 4>{});
  for (; t + 2 <= vectors; t += 2) run(t, std::integral_constant<int, 2>{});
  if (t < vectors) run(t, std::integral_constant<int, 1>{});
}

// out[t][c] = bias[c] + Σ factors[t][i] rows[i][c] over the list, for first <= c < last; the bias
// may be null. The order of the sum is the list's, whatever the range.
template <class T>
inline void add_listed(const std::vector<const T*>& rows, const T* bias,
                       const float* const* factors, int64_t vectors, int64_t first, int64_t last,
                       float* const* out) {
  for (int64_t t = 0; t < vectors; ++t) {
    if (bias) convert_row(bias + first, out[t] + first, last - first);
    else std::fill(out[t] + first, out[t] + last, 0.0f);
  }
  const int64_t count = static_cast<int64_t>(rows.size());
  const auto some = [&](int64_t i, auto number, int64_t ahead) {
    by_passes(vectors, [&](int64_t t, auto pass) {
      const float* from[pass()];
      for (int v = 0; v < pass(); ++v) from[v] = factors[t + v] + i;
      const T* const* next = rows.data() + i + kAhead * kDeep;
      add_several<number(), pass()>(rows.data() + i, next, t ? 0 : ahead, from, first, last,
                                    out + t);
    });
  };
  int64_t i = 0;
  for (; i + kDeep <= count; i += kDeep)
    some(i, std::integral_constant<int, kDeep>{}, rows_ahead(count - i - kAhead * kDeep, kDeep));
  for (; i < count; ++i) some(i, std::integral_constant<int, 1>{}, 0);
}

// A pass: kRows rows and kVectors vectors.
template <int kRows, int kVectors, class T, class Round>
inline void dot_several(const T* const* rows, const T* const* ahead, int64_t rows_ahead,
                        const T* bias, const int64_t* numbers, const float* const* x,
                        int64_t width, float* const* out, Totals<Round>& totals) {
  Floats sums[kRows][kVectors] = {};
  by_registers(width, [&](int64_t c, auto lanes) {
    Floats weights[kRows];
    for (int r = 0; r < kRows; ++r) weights[r] = load(rows[r] + c, lanes);
    for (int64_t a = 0; a < rows_ahead; ++a) fetch_ahead(ahead[a] + c);
    for (int t = 0; t < kVectors; ++t) {
      const Floats values = load(x[t] + c, lanes);
      for (int r = 0; r < kRows; ++r) sums[r][t] += weights[r] * values;
    }
  });
  for (int r = 0; r < kRows; ++r) {
    const float added = bias ? load(bias + numbers[r]) : 0.0f;
    for (int t = 0; t < kVectors; ++t) totals.add(sums[r][t], added, out[t] + numbers[r]);
  }
}

// out[t][list[i]] = the product of that row with x[t] (K,), with its bias, rounded to Round, for
// begin <= i < end.
template <class Round, class T>
inline void multiply_listed(const std::vector<const T*>& rows, const T* bias,
                            const std::vector<int64_t>& list, const float* const* x,
                            int64_t vectors, int64_t width, int64_t begin, int64_t end,
                            float* const* out) {
  Totals<Round> totals;
  const auto some = [&](int64_t i, auto number, int64_t ahead) {
    by_passes(vectors, [&](int64_t t, auto pass) {
      const T* const* next = rows.data() + i + kAhead * kBlock;
      dot_several<number(), pass()>(rows.data() + i, next, t ? 0 : ahead, bias, list.data() + i,
                                    x + t, width, out + t, totals);
    });
  };
  int64_t i = begin;
  for (; i + kBlock <= end; i += kBlock)
    some(i, std::integral_constant<int, kBlock>{}, rows_ahead(end - i - kAhead * kBlock, kBlock));
  for (; i < end; ++i) some(i, std::integral_constant<int, 1>{}, 0);
  totals.flush();
}

}  // namespace
}  // namespace moezoo
