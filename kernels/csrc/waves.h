// Rows sorted by expert, taken some at a time: as many as stay in cache through all that is done with
// them, and enough for all threads.

#pragma once

#include "matmul.h"

namespace moezoo {
namespace {

// Consecutive rows of one expert, a block of depth at most. How an expert's rows are cut into chunks
// depends on their number alone, and so do sums over them.
struct Chunk {
  int64_t expert, first, last;
  int64_t step;  // rows of this expert's chunks, but of its last
  bool opens;    // whether it is the expert's first

  int64_t rows() const { return last - first; }
};

using Chunks = std::vector<Chunk>;

inline Chunks chunks_of(const int64_t* ends, int64_t experts) {
  Chunks found;
  for (int64_t e = 0, first = 0; e < experts; first = std::max(first, ends[e]), ++e) {
    const int64_t rows = ends[e] - first;
    if (rows <= 0) continue;
    const int64_t step = divide_up(rows, divide_up(rows, kDepth));
    for (int64_t at = first; at < ends[e]; at += step)
      found.push_back({e, at, std::min(at + step, ends[e]), step, at == first});
  }
  return found;
}

// Chunks that go through all stages before the next ones do.
struct Wave {
  const Chunk *begin_, *end_;

  const Chunk* begin() const { return begin_; }
  const Chunk* end() const { return end_; }
  int64_t first() const { return begin_->first; }
  int64_t last() const { return end_[-1].last; }
  int64_t rows() const { return last() - first(); }
  bool one_expert() const { return begin_->expert == end_[-1].expert; }

  // Calls body(expert, first row, last row, chunk rows, whether it is the expert's first).
  template <class Body>
  void by_expert(const Body& body) const {
    for (const Chunk* c = begin_; c < end_;) {
      const Chunk* last = c;
      while (last + 1 < end_ && last[1].expert == c->expert) ++last;
      body(Chunk{c->expert, c->first, last->last, c->step, c->opens});
      c = last + 1;
    }
  }
};

// Cuts chunks into waves, by the bytes that a row takes in all stages.
inline std::vector<Wave> waves_of(const Chunks& chunks, int64_t row_bytes, int32_t threads) {
  constexpr int64_t kAlone = 256, kShared = 1024;     // rows for each thread
  constexpr int64_t kBytes = int64_t{4} << 20;        // for each thread
  const int64_t fitting = kBytes / std::max<int64_t>(1, row_bytes);
  const int64_t each = std::min(threads > 1 ? kShared : kAlone, fitting);
  std::vector<Wave> found;
  for (const Chunk& c : chunks) {
    const bool joins = !found.empty() && c.last - found.back().first() <= each * threads;
    if (joins) found.back().end_ = &c + 1;
    else found.push_back({&c, &c + 1});
  }
  return found;
}

inline int64_t most_rows(const std::vector<Wave>& waves) {
  int64_t most = 0;
  for (const Wave& w : waves) most = std::max(most, w.rows());
  return most;
}

// For each expert that has rows, the next one that has none.
inline std::vector<int64_t> runs_of(const int64_t* ends, int64_t experts) {
  std::vector<int64_t> found(experts);
  for (int64_t e = experts - 1; e >= 0; --e) {
    const bool next = e + 1 < experts && ends[e + 1] > ends[e];
    found[e] = next ? found[e + 1] : e + 1;
  }
  return found;
}

// Asks for the pages of results that are about to be written from front to back, half a MiB or what a
// wave writes at a time; nothing is asked for beyond what is going to be written.
class Ahead {
 public:
  // Of a result of so many bytes; small ones are left alone.
  explicit Ahead(int64_t bytes) : worth_(bytes >= kLarge) {}

  // The part of a chunk's expert, of so many numbers, is written now if the chunk is its first.
  void writing_part(float* parts, int64_t numbers, const Chunk& c, const std::vector<int64_t>& runs) {
    float* const begin = parts + c.expert * numbers;
    if (c.opens) writing(begin, begin + numbers, parts + runs[c.expert] * numbers);
  }

  // [begin, end) is written now, and what is up to `until` afterwards.
  void writing(float* begin, float* end, float* until) {
    if (!worth_ || end <= asked_) return;
    if (begin < asked_) begin = asked_;
    asked_ = std::max(end, std::min(until, begin + kStretch / int64_t{sizeof(float)}));
    populate(begin, (asked_ - begin) * int64_t{sizeof(float)});
  }

 private:
  static constexpr int64_t kLarge = int64_t{1} << 18, kStretch = int64_t{1} << 19;
  bool worth_;
  float* asked_ = nullptr;
};

// A stack of matrices by the strides of expert, row and column.
struct Stack {
  const float* data;
  int64_t expert, row, column;

  const float* of(int64_t e) const { return data + e * expert; }
  // The right side of rows times the matrix, or times the matrix transposed.
  Side plain(int64_t e) const { return {of(e), column, row}; }
  Side transposed(int64_t e) const { return {of(e), row, column}; }
};

}  // namespace
}  // namespace moezoo
