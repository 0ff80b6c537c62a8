// Sums over the assignments that name a row of a table: the gradient of a table read by index.
//
// Shapes: T tokens, J assignments per token, N rows of the table, R rows of the result, D width.

#pragma once

#include "vectors.h"

namespace moezoo {
namespace {

// Assignments in the order of the rows they name. `starts` has R + 1 entries; what follows the
// last names no row. `rows` says which rows of the table the R are; null for all of them.
struct SortedAssignments {
  const int64_t* order;
  const int64_t* starts;
  const int64_t* rows;
  int64_t num_rows;

  int64_t table_row(int64_t r) const { return rows ? rows[r] : r; }
};

// Calls body(first, last) on ranges of result rows, each handled by one thread. Ranges are cut
// where the work is even: a row costs its writing and the reading of its assignments. Which thread
// takes which range changes no result.
template <class Body>
inline void parallel_rows(const SortedAssignments& sorted, int32_t threads, const Body& body) {
  const int64_t R = sorted.num_rows;
  if (R == 0) return;
  const auto work = [&](int64_t r) { return r + sorted.starts[r] - sorted.starts[0]; };
  constexpr int64_t kLeast = 512;  // what a thread is worth waking for
  int64_t pieces = work(R) / kLeast;
  if (pieces > 8 * int64_t{threads}) pieces = 8 * int64_t{threads};
  if (threads == 1 || pieces <= 1) {
    body(int64_t{0}, R);
    return;
  }
  const auto cut = [&](int64_t piece) {  // the first row with that much work before it
    const int64_t wanted = work(R) / pieces * piece;
    int64_t low = 0, high = R;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (work(middle) < wanted) low = middle + 1;
      else high = middle;
    }
    return low;
  };
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t first = cut(piece), last = piece + 1 == pieces ? R : cut(piece + 1);
    if (first < last) body(first, last);
  }
}

// For each result row: calls found(r, sum, p, end) with the weighted sum of the source rows of its
// assignments order[p … end), or none(r) if it has none.
template <class T, class Found, class None>
inline void sum_each_row(const SortedAssignments& sorted, const T* source, const float* weights,
                         int64_t choices, int64_t width, int32_t threads, const Found& found,
                         const None& none) {
  parallel_rows(sorted, threads, [&](int64_t first, int64_t last) {
    std::vector<float> sum(width);
    WeightedRows<T> list;
    constexpr int64_t kListed = 256;  // assignments listed ahead, enough to prefetch across rows
    int64_t listed_from = 0, listed_to = 0;
    for (int64_t r = first; r < last; ++r) {
      const int64_t begin = sorted.starts[r], end = sorted.starts[r + 1];
      if (begin == end) {
        none(r);
        continue;
      }
      if (end > listed_to) {
        list.clear();
        listed_from = begin;
        listed_to = std::min(std::max(end, begin + kListed), sorted.starts[last]);
        for (int64_t p = begin; p < listed_to; ++p) {
          const int64_t assignment = sorted.order[p];
          list.add(source + assignment / choices * width, weights[assignment]);
        }
      }
      add_rows(list, begin - listed_from, end - listed_from, width, sum.data());
      found(r, sum.data(), begin, end);
    }
  });
}

}  // namespace
}  // namespace moezoo
