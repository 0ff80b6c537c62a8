#include "row_sums.h"

namespace moezoo {
namespace {

// A stable sort by row in two linear passes. The first deals the assignments to at most 1024
// buckets of consecutive rows, each thread a stretch of them; the second sorts each bucket by
// counting, with counters that stay in cache. Nothing of size N times threads exists.
class RowSort {
 public:
  RowSort(const int64_t* indices, int64_t count, int64_t num_rows, int64_t* dealt, int64_t* order,
          int64_t* starts, int32_t threads)
      : indices_(indices),
        count_(count),
        num_rows_(num_rows),
        dealt_(dealt),
        order_(order),
        starts_(starts),
        threads_(threads) {
    while ((num_rows_ >> shift_) >= kBuckets) ++shift_;
    buckets_ = (num_rows_ >> shift_) + 1;  // the number N stands for no row, and sorts last
    stretches_ = std::max<int64_t>(1, std::min<int64_t>(threads, count / 4096));
    places_.resize(stretches_ * buckets_);
    begins_.resize(buckets_ + 1);
  }

  void run() {
    count_buckets();
    lay_out_buckets();
    deal();
#pragma omp parallel for num_threads(threads_) schedule(dynamic, 1)
    for (int64_t bucket = 0; bucket < buckets_; ++bucket) sort_bucket(bucket);
  }

 private:
  static constexpr int64_t kBuckets = 1024;

  // An index of no row counts as N; so would one beyond the table: no write is out of bounds.
  int64_t row(int64_t assignment) const {
    const uint64_t index = static_cast<uint64_t>(indices_[assignment]);
    return index < static_cast<uint64_t>(num_rows_) ? static_cast<int64_t>(index) : num_rows_;
  }

  // Calls body(places, assignment) on each assignment, a stretch of them per thread.
  template <class Body>
  void by_stretches(const Body& body) {
#pragma omp parallel for num_threads(threads_) schedule(static, 1)
    for (int64_t s = 0; s < stretches_; ++s) {
      int64_t* places = places_.data() + s * buckets_;
      const int64_t end = count_ * (s + 1) / stretches_;
      for (int64_t a = count_ * s / stretches_; a < end; ++a) body(places, a);
    }
  }

  void count_buckets() {
    by_stretches([&](int64_t* places, int64_t a) { ++places[row(a) >> shift_]; });
  }

  // Turns counts into where each stretch puts its first assignment of each bucket.
  void lay_out_buckets() {
    int64_t place = 0;
    for (int64_t bucket = 0; bucket < buckets_; ++bucket) {
      begins_[bucket] = place;
      for (int64_t s = 0; s < stretches_; ++s) {
        int64_t& mine = places_[s * buckets_ + bucket];
        const int64_t counted = mine;
        mine = place;
        place += counted;
      }
    }
    begins_[buckets_] = place;
  }

  void deal() {
    by_stretches([&](int64_t* places, int64_t a) { dealt_[places[row(a) >> shift_]++] = a; });
  }

  // starts[r] first counts row r, then says where its run begins.
  void sort_bucket(int64_t bucket) {
    const int64_t begin = begins_[bucket], end = begins_[bucket + 1];
    const int64_t first = bucket << shift_;
    const int64_t last = std::min((bucket + 1) << shift_, num_rows_ + 1);
    std::vector<int64_t> next(last - first, 0);
    for (int64_t p = begin; p < end; ++p) ++next[row(dealt_[p]) - first];
    int64_t place = begin;
    for (int64_t r = first; r < last; ++r) {
      const int64_t counted = next[r - first];
      starts_[r] = next[r - first] = place;
      place += counted;
    }
    for (int64_t p = begin; p < end; ++p) order_[next[row(dealt_[p]) - first]++] = dealt_[p];
  }

  const int64_t* indices_;
  int64_t count_, num_rows_;
  int64_t *dealt_, *order_, *starts_;
  int32_t threads_;
  int shift_ = 0;
  int64_t buckets_, stretches_;
  std::vector<int64_t> places_, begins_;
};

// The same order, in time and memory that do not grow with the table: passes over the assignments
// by eleven bits of their rows each, the lowest first.
class UsedRowSort {
 public:
  UsedRowSort(const int64_t* indices, int64_t count, int64_t num_rows)
      : indices_(indices), count_(count), num_rows_(num_rows) {
    while (num_rows >> (kBits * passes_)) ++passes_;
  }

  // The last pass writes `order`.
  void sort(int64_t* dealt, int64_t* order) const {
    const int64_t* from = nullptr;
    for (int64_t pass = 0; pass < passes_; ++pass) {
      int64_t* const to = (passes_ - pass) % 2 ? order : dealt;
      sort_by_bits(from, to, kBits * pass);
      from = to;
    }
  }

  // Returns the number of rows, whose runs begin at `starts`; the last one's end is behind them.
  int64_t find_runs(const int64_t* order, int64_t* rows, int64_t* starts) const {
    int64_t found = 0, place = 0, before = -1;
    for (; place < count_; ++place) {
      const int64_t here = row(order[place]);
      if (here == num_rows_) break;
      if (here != before) {
        rows[found] = before = here;
        starts[found++] = place;
      }
    }
    starts[found] = place;
    return found;
  }

 private:
  static constexpr int64_t kBits = 11;

  int64_t row(int64_t assignment) const {
    const uint64_t index = static_cast<uint64_t>(indices_[assignment]);
    return index < static_cast<uint64_t>(num_rows_) ? static_cast<int64_t>(index) : num_rows_;
  }

  void sort_by_bits(const int64_t* from, int64_t* to, int64_t shift) const {
    constexpr int64_t kMask = (int64_t{1} << kBits) - 1;
    std::vector<int64_t> places(kMask + 1, 0);
    const auto digit = [&](int64_t assignment) { return row(assignment) >> shift & kMask; };
    for (int64_t a = 0; a < count_; ++a) ++places[digit(a)];
    int64_t place = 0;
    for (int64_t& counted : places) {
      const int64_t begin = place;
      place += counted;
      counted = begin;
    }
    for (int64_t p = 0; p < count_; ++p) {
      const int64_t assignment = from ? from[p] : p;
      to[places[digit(assignment)]++] = assignment;
    }
  }

  const int64_t* indices_;
  int64_t count_, num_rows_, passes_ = 1;
};

template <class T, class Sum>
void sum_rows(const SortedAssignments& sorted, const T* source, const float* weights,
              int64_t choices, int64_t width, Sum* sums, int32_t threads) {
  sum_each_row(
      sorted, source, weights, choices, width, threads,
      [&](int64_t r, const float* sum, int64_t, int64_t) {
        convert_row(sum, sums + r * width, width);
      },
      [&](int64_t r) { std::memset(sums + r * width, 0, width * sizeof *sums); });
}

}  // namespace
}  // namespace moezoo

using namespace moezoo;

// Sorts T J assignments by row, stably: order (T J,), starts (N + 1,) where each row's run begins;
// the last is that of the assignments of no row (a negative index). dealt (T J,) is scratch.
MOEZOO_API void moezoo_sort_by_row(const int64_t* indices, int64_t count, int64_t num_rows,
                                   int64_t* dealt, int64_t* order, int64_t* starts,
                                   int32_t threads) {
  RowSort(indices, count, num_rows, dealt, order, starts, threads).run();
}

// The same, and the R rows that have an assignment: order (T J,), rows (T J,) of which the first R
// are written, starts (T J + 1,) of which the first R + 1 are, found (1,) is R.
MOEZOO_API void moezoo_sort_used_rows(const int64_t* indices, int64_t count, int64_t num_rows,
                                      int64_t* dealt, int64_t* order, int64_t* rows,
                                      int64_t* starts, int64_t* found, int32_t) {
  const UsedRowSort sort(indices, count, num_rows);
  sort.sort(dealt, order);
  *found = sort.find_runs(order, rows, starts);
}

// sums (R, D) = Σ weights[t, j] source[t] over each row's run of assignments (t, j), added up in
// fp32 in the order of the run.
MOEZOO_API void moezoo_sum_rows(const void* source, int64_t source_dtype, const float* weights,
                                int64_t choices, const int64_t* order, const int64_t* starts,
                                int64_t num_rows, int64_t width, void* sums, int64_t sums_dtype,
                                int32_t threads) {
  const SortedAssignments sorted{order, starts, nullptr, num_rows};
  with_type(source_dtype, [&](auto from) {
    with_type(sums_dtype, [&](auto to) {
      sum_rows(sorted, static_cast<const decltype(from)*>(source), weights, choices, width,
               static_cast<decltype(to)*>(sums), threads);
    });
  });
}
