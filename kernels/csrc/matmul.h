// Matrix products in fp32, by tiles of registers and blocks that stay in cache: one thread's share.
//
// Each number of a result is a sum in the order of the depth, cut where only the depth decides; so it
// depends neither on how threads share a product nor on which rows are multiplied together.

#pragma once

#include "tiles.h"

namespace moezoo {
namespace {

constexpr int64_t kDepth = 320;     // of a block: two registers of columns take 40 KiB
constexpr int64_t kBlockRows = 336;  // 24 tiles; of kDepth, 420 KiB of the second cache

// A result (rows, columns) in memory, each row's numbers side by side.
struct Target {
  float* data;
  int64_t step;
};

// What a thread lays panels out in: rows of a block, and columns.
class Panels {
 public:
  Panels()
      : left_(scratch(kBlockRows * kDepth + kLanes)),
        right_(scratch(kTileColumns * kDepth + kLanes)) {}

  float* left() { return left_.get(); }
  float* right() { return right_.get(); }

 private:
  Scratch left_, right_;
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls body(begin, end) on the fewest parts of [0, n) of at most `most`, as equal as can be.
template <class Body>
inline void by_parts(int64_t n, int64_t most, const Body& body) {
  const int64_t parts = divide_up(n, most);
  for (int64_t p = 0; p < parts; ++p) body(n * p / parts, n * (p + 1) / parts);
}

// One block of depth of rows [0, rows) and columns [0, columns).
inline void multiply_block(const Side& left, const Side& right, int64_t rows, int64_t columns,
                           int64_t depth, Start start, const float* bias, Target c, Panels& panels) {
  const bool one_panel = rows <= kTileRows;
  // What is read once is read where it is, if it lies as a tile reads it.
  const bool left_in_place =
      columns <= kTileColumns && left.step == 1 && !left.list && !left.depth_list;
  const bool right_in_place = one_panel && right.step == 1 && !right.list && !right.depth_list;
  if (!left_in_place)
    by_parts(rows, kTileRows, [&](int64_t first, int64_t last) {
      const int64_t count = last - first;
      pack_panel(left.from(first, 0), count, depth, count, panels.left() + first * depth);
    });
  for (int64_t column = 0; column < columns; column += kTileColumns) {
    const int64_t count = std::min(columns - column, kTileColumns);
    const int64_t width = divide_up(count, kLanes) * kLanes;
    const float* b = panels.right();
    int64_t b_step = width;
    const Side part = right.from(column, 0);
    if (right_in_place && count == width) b = part.data, b_step = part.depth_step;
    else pack_panel(part, count, depth, width, panels.right());
    by_parts(rows, kTileRows, [&](int64_t first, int64_t last) {
      const float* a = left_in_place ? left.data + first : panels.left() + first * depth;
      const int64_t a_step = left_in_place ? left.depth_step : last - first;
      tile_of(last - first, count)(a, a_step, b, b_step, depth, start, bias ? bias + column : nullptr,
                                   c.data + first * c.step + column, c.step, count);
    });
  }
}

// A product: c (rows, columns) = left (rows, depth) right (depth, columns), with a bias (columns,)
// unless that is null, or added to what is there. The depth is cut in blocks of `depth_block`.
struct Product {
  Side left, right;
  int64_t rows, columns, depth;
  Target c;
  const float* bias = nullptr;
  bool accumulate = false;
  int64_t depth_block = 0;  // 0: as few as there may be, of equal length

  int64_t block() const {
    if (depth_block) return depth_block;
    return depth > kDepth ? divide_up(depth, divide_up(depth, kDepth)) : std::max<int64_t>(1, depth);
  }
};

// Columns [begin, end) of a product.
inline void multiply(const Product& of, int64_t begin, int64_t end, Panels& panels) {
  const float* bias = of.bias ? of.bias + begin : nullptr;
  const Side right = of.right.from(begin, 0);
  const int64_t step = of.block();
  by_parts(of.rows, kBlockRows, [&](int64_t first, int64_t last) {
    const Target c{of.c.data + first * of.c.step + begin, of.c.step};
    int64_t k = 0;
    do {
      const Start start = k || of.accumulate ? Start::kSums : bias ? Start::kBias : Start::kZero;
      multiply_block(of.left.from(first, k), right.from(0, k), last - first, end - begin,
                     std::min(step, of.depth - k), start, bias, c, panels);
      k += step;
    } while (k < of.depth);
  });
}

// All of the products, which write different memory. Threads share tiles of columns, so that each has
// the same number of multiplications, give or take those of a tile.
inline void multiply_all(const std::vector<Product>& products, int32_t threads) {
  constexpr int64_t kGrain = int64_t{1} << 19;  // multiplications that are worth a thread
  std::vector<int64_t> before{0};               // multiplications, up to each product
  for (const Product& p : products)
    before.push_back(before.back() +
                     divide_up(p.columns, kTileColumns) * kTileColumns * p.rows * (p.depth + 1));
  const int64_t total = before.back();
  const int64_t shares = std::max<int64_t>(1, std::min<int64_t>(threads, total / kGrain));
  parallel_ranges(shares, 1, threads, [&](int64_t first, int64_t last) {
    const int64_t begin = total / shares * first;
    const int64_t end = last == shares ? total : total / shares * last;
    thread_local Panels panels;
    for (size_t i = 0; i < products.size(); ++i) {
      const Product& p = products[i];
      const int64_t tile = kTileColumns * p.rows * (p.depth + 1);
      if (before[i + 1] <= begin || before[i] >= end || tile == 0) continue;
      // A tile is done by the thread in whose share it begins.
      const auto column = [&](int64_t place) {
        const int64_t tiles = place <= before[i] ? 0 : divide_up(place - before[i], tile);
        return std::min(tiles * kTileColumns, p.columns);
      };
      if (column(begin) < column(end)) multiply(p, column(begin), column(end), panels);
    }
  });
}

}  // namespace
}  // namespace moezoo
