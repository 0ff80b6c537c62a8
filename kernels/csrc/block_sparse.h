// Products with matrices that are mostly zero, by the square blocks that are not: what is left out
// is neither read nor multiplied with.
//
// Shapes: N rows, K width of a row, T tokens, S width of a block. A block is stored inputs first:
// a register holds the weights of neighbouring outputs for one input, and is multiplied with a
// number of each token, so that no lanes need adding up.

#pragma once

#include "few_products.h"
#include "memory.h"

namespace moezoo {
namespace {

template <class T>
struct BlockSparse {
  const T* values;         // (blocks, S in, S out), by rows of blocks
  const int32_t* columns;  // (blocks,), of blocks
  const int64_t* starts;   // (N / S + 1,), each row's first block
  const T* bias;           // (N,) or null
  int64_t rows, width;

  // What the rows of blocks before a row take, in blocks: a row's own cost is one.
  int64_t cost(int64_t row) const { return starts[row] + row; }

  // The first row of blocks before which lies at least so much of the cost.
  int64_t row_at(int64_t wanted, int64_t count) const {
    int64_t low = 0;
    while (low < count) {
      const int64_t middle = (low + count) / 2;
      if (cost(middle) < wanted) low = middle + 1;
      else count = middle;
    }
    return low;
  }
};

// Tokens laid out by blocks of inputs, (K / S, count, S): what a pass reads of one lies together.
// For one token that is its row as it is.
struct Tile {
  const float* x;
  int64_t count;
};

// Tokens of a pass: as many as there are registers for their sums, in whole products and in few.
constexpr int most_tokens(int block) {
  if (kLanes >= 16) return block == kLanes ? 24 : 12;
  return 6;
}

// Registers of outputs of a pass. One or two tokens read a block once; with more, what a pass reads
// of a row of blocks stays in the nearest cache for the next pass.
constexpr int output_registers(int block, bool few) {
  const int all = block / static_cast<int>(kLanes), most = few ? 4 : 2;
  return all < most ? all : most;
}

// Sums of fewer chains than this wait for one another.
constexpr int chains_per_sum(int sums) { return sums >= 8 ? 1 : (sums >= 4 ? 2 : 4); }

// Bytes by which weights that are read for few tokens alone are asked for in advance.
constexpr int64_t kBlocksAheadBytes = 2048;

// out[t stride + n], rounded to T, for kTokens tokens, the first of which x points at in its tile,
// and a few registers of outputs of a row of blocks, from its output `first` on.
template <int kBlock, bool kFew, int kTokens, class T, class Out>
inline void multiply_row(const BlockSparse<T>& m, int64_t row, int first, const float* x,
                         int64_t step, int64_t stride, Out* out) {
  constexpr int kRegisters = output_registers(kBlock, kFew);
  constexpr int kSplit = chains_per_sum(kTokens * kRegisters);
  constexpr int64_t kAhead = kBlocksAheadBytes / int64_t{sizeof(T)};
  constexpr int kLine = kCacheLine / int64_t{sizeof(T)};
  Floats sums[kSplit][kTokens][kRegisters] = {};
  const int64_t end = m.starts[row + 1];
  for (int64_t i = m.starts[row]; i < end; ++i) {
    const T* weights = m.values + i * kBlock * kBlock + first;
    const float* from = x + m.columns[i] * step;
    for (int k = 0; k < kBlock; k += kSplit, weights += kSplit * kBlock, from += kSplit) {
#pragma GCC unroll 4
      for (int j = 0; j < kSplit; ++j) {
        const T* line = weights + j * kBlock;
        Floats w[kRegisters];
        for (int r = 0; r < kRegisters; ++r) w[r] = load(line + r * kLanes, Full{});
        if constexpr (kFew)
          for (int c = 0; c < kRegisters * kLanes; c += kLine) fetch_ahead(line + kAhead + c);
#pragma GCC unroll 24
        for (int t = 0; t < kTokens; ++t)
          for (int r = 0; r < kRegisters; ++r)
            sums[j][t][r] += w[r] * from[t * kBlock + j];
      }
    }
  }
  const int64_t at = row * kBlock + first;
  for (int r = 0; r < kRegisters; ++r) {
    const Floats bias = m.bias ? load(m.bias + at + r * kLanes, Full{}) : Floats{};
    for (int t = 0; t < kTokens; ++t) {
      Floats total = sums[0][t][r];
      for (int s = 1; s < kSplit; ++s) total += sums[s][t][r];
      store(out + t * stride + at + r * kLanes, rounded<T>(total + bias), Full{});
    }
  }
}

// Calls run(token, count) for consecutive passes over tokens, count being a constant.
template <int kMost, class Run>
inline void by_token_passes(int64_t tokens, const Run& run) {
  int64_t t = 0;
  const auto all = [&](auto count) {
    for (; t + count() <= tokens; t += count()) run(t, count);
  };
  all(std::integral_constant<int, kMost>{});
  if constexpr (kMost > 16) all(std::integral_constant<int, 16>{});
  if constexpr (kMost > 8) all(std::integral_constant<int, 8>{});
  if constexpr (kMost > 4) all(std::integral_constant<int, 4>{});
  all(std::integral_constant<int, 2>{});
  all(std::integral_constant<int, 1>{});
}

// The products of a tile of tokens with rows of blocks.
template <int kBlock, bool kFew, class T, class Out>
inline void multiply_tile(const BlockSparse<T>& m, const Tile& tile, int64_t begin, int64_t end,
                          int64_t stride, Out* out) {
  constexpr int kOutputs = output_registers(kBlock, kFew) * kLanes;
  const int64_t step = tile.count * kBlock;
  for (int64_t row = begin; row < end; ++row)
    for (int first = 0; first < kBlock; first += kOutputs)
      by_token_passes<kFew ? 2 : most_tokens(kBlock)>(tile.count, [&](int64_t t, auto count) {
        multiply_row<kBlock, kFew, count()>(m, row, first, tile.x + t * kBlock, step, stride,
                                            out + t * stride);
      });
}

// Tokens of a tile: what a core's second cache holds beside a row's blocks, in whole passes.
template <int kBlock>
inline int64_t tile_tokens(int64_t width) {
  constexpr int64_t kNumbers = 1 << 16, kMost = most_tokens(kBlock), kPasses = 16;
  const int64_t passes = kNumbers / std::max<int64_t>(1, width * kMost);
  return kMost * std::clamp<int64_t>(passes, 1, kPasses);
}

// Lays tokens out by blocks of inputs.
template <int kBlock, class T>
inline void lay_tile(const T* x, int64_t tokens, int64_t width, float* tile) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t c = 0; c < width; c += kBlock)
      convert_row(x + t * width + c, tile + c * tokens + t * kBlock, kBlock);
}

// out (T, N) = x (T, K) times the matrix, rounded to T. Threads share tiles of tokens or,
// where there are few, rows of blocks; the sums are the same.
template <int kBlock, class X, class T, class Out>
inline void multiply_by_blocks(const BlockSparse<T>& m, const X* x, int64_t tokens, Out* out,
                               int32_t threads) {
  constexpr int64_t kLeastNumbers = 1 << 18;  // of blocks, that are worth a thread
  const int64_t size = tile_tokens<kBlock>(m.width);
  const int64_t tiles = (tokens + size - 1) / size;
  const int64_t rows = m.rows / kBlock;
  const auto room = [&] { return scratch(std::min(size, tokens) * m.width); };
  const auto multiply = [&](int64_t i, float* laid, int64_t begin, int64_t end) {
    const X* from = x + i * size * m.width;
    Tile tile{laid, std::min(size, tokens - i * size)};
    if constexpr (std::is_same_v<X, float>)
      if (tile.count == 1) tile.x = from;
    if (tile.x == laid) lay_tile<kBlock>(from, tile.count, m.width, laid);
    Out* const to = out + i * size * m.rows;
    if (tile.count <= 2) multiply_tile<kBlock, true>(m, tile, begin, end, m.rows, to);
    else multiply_tile<kBlock, false>(m, tile, begin, end, m.rows, to);
  };
  if (tiles >= 2 * threads) {
    parallel_ranges(tiles, 1, threads, [&](int64_t a, int64_t b) {
      const Scratch laid = room();
      for (int64_t i = a; i < b; ++i) {
        // What is written in stripes would get its pages one by one, each with a fault.
        populate(out + i * size * m.rows,
                 std::min(size, tokens - i * size) * m.rows * int64_t{sizeof(Out)});
        multiply(i, laid.get(), 0, rows);
      }
    });
    return;
  }
  const int64_t grain = 1 + kLeastNumbers / (kBlock * kBlock * (1 + tokens / 4));
  parallel_ranges(m.cost(rows), grain, threads, [&](int64_t a, int64_t b) {
    const Scratch laid = room();
    for (int64_t i = 0; i < tiles; ++i)
      multiply(i, laid.get(), m.row_at(a, rows), m.row_at(b, rows));
  });
}

}  // namespace
}  // namespace moezoo
