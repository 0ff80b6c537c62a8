// The inside of a matrix product in fp32: a tile of sums that stays in registers, and the panels that
// it reads, laid out so that it reads them from front to back.
//
// A tile is up to kTileRows rows by two registers of columns. A step of the depth multiplies a number
// of each row, which the hardware copies to all lanes as it loads it, with the two registers.

#pragma once

#include <utility>

#include "memory.h"

namespace moezoo {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 14;  // 28 registers of sums, of 32
#else
constexpr int kTileRows = 6;  // 12 of 16
#endif
constexpr int kTileRegisters = 2;
constexpr int64_t kTileColumns = kTileRegisters * kLanes;

// What stands in a product's result before its sums are added.
enum class Start { kZero, kBias, kSums };

// c (Rows, columns) = a (Rows, depth) b (depth, columns), beside what it starts with. Step k of the
// depth reads a[k a_step + row] and b[k b_step + column], whole registers of the latter.
template <int Rows, int Registers>
void multiply_tile(const float* a, int64_t a_step, const float* b, int64_t b_step, int64_t depth,
                   Start start, const float* bias, float* c, int64_t c_row, int64_t columns) {
  Floats sums[Rows][Registers] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Floats right[Registers];
#pragma GCC unroll 2
    for (int v = 0; v < Registers; ++v) right[v] = load(b + v * kLanes, Full{});
#pragma GCC unroll 14
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < Registers; ++v) sums[r][v] += a[r] * right[v];
    }
    a += a_step;
    b += b_step;
  }
  const auto finish = [&](int v, auto lanes) {
    const Floats added = start == Start::kBias ? load(bias + v * kLanes, lanes) : Floats{};
#pragma GCC unroll 14
    for (int r = 0; r < Rows; ++r) {
      float* to = c + r * c_row + v * kLanes;
      store(to, sums[r][v] + (start == Start::kSums ? load(to, lanes) : added), lanes);
    }
  };
#pragma GCC unroll 2
  for (int v = 0; v < Registers; ++v) {
    const int64_t left = columns - v * kLanes;
    if (left >= kLanes) finish(v, Full{});
    else if (left > 0) finish(v, Partial{left});
  }
}

using Tile = void (*)(const float*, int64_t, const float*, int64_t, int64_t, Start, const float*,
                      float*, int64_t, int64_t);

template <int... Rows>
inline Tile tile_of(int64_t rows, bool wide, std::integer_sequence<int, Rows...>) {
  static constexpr Tile kNarrow[] = {multiply_tile<Rows + 1, 1>...};
  static constexpr Tile kWide[] = {multiply_tile<Rows + 1, kTileRegisters>...};
  return (wide ? kWide : kNarrow)[rows - 1];
}

// The function for so many rows and columns, at most kTileRows and kTileColumns.
inline Tile tile_of(int64_t rows, int64_t columns) {
  return tile_of(rows, columns > kLanes, std::make_integer_sequence<int, kTileRows>{});
}

// One side of a product: numbers by their place along the side (a row of the result on the left, a
// column on the right) and along the depth. Either may go through a list of places.
struct Side {
  const float* data;
  int64_t step, depth_step;
  const int64_t* list = nullptr;        // of places along the side
  const int64_t* depth_list = nullptr;  // of places along the depth

  const float* at(int64_t place) const { return data + (list ? list[place] : place) * step; }
  int64_t deep(int64_t k) const { return (depth_list ? depth_list[k] : k) * depth_step; }

  Side from(int64_t place, int64_t k) const {
    Side part = *this;
    if (list) part.list += place;
    else part.data += place * step;
    if (depth_list) part.depth_list += k;
    else part.data += k * depth_step;
    return part;
  }
};

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define MOEZOO_SHUFFLES 1
#endif
#endif

#if defined(MOEZOO_SHUFFLES)
// Exchanges blocks of `Step` lanes of two registers: lanes that have the bit of Step in the upper one
// and those that have not in the lower one.
template <int Step, int... Lane>
inline void exchange(Floats& low, Floats& high, std::integer_sequence<int, Lane...>) {
  constexpr int kCount = static_cast<int>(kLanes);
  const Floats a = low, b = high;
  low = __builtin_shufflevector(a, b, (Lane & Step ? Lane - Step + kCount : Lane)...);
  high = __builtin_shufflevector(a, b, (Lane & Step ? Lane + kCount : Lane + Step)...);
}

template <int Step>
inline void exchange_all(Floats* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < static_cast<int>(kLanes); ++i)
    if (!(i & Step))
      exchange<Step>(rows[i], rows[i + Step], std::make_integer_sequence<int, kLanes>{});
}
#endif

// Turns a square of kLanes registers: lane j of register i becomes lane i of register j.
inline void transpose(Floats* rows) {
#if defined(MOEZOO_SHUFFLES)
  exchange_all<1>(rows);
  exchange_all<2>(rows);
  if constexpr (kLanes > 4) exchange_all<4>(rows);
  if constexpr (kLanes > 8) exchange_all<8>(rows);
#else
  float numbers[kLanes][kLanes], turned[kLanes][kLanes];
  std::memcpy(numbers, rows, sizeof numbers);
  for (int64_t i = 0; i < kLanes; ++i)
    for (int64_t j = 0; j < kLanes; ++j) turned[j][i] = numbers[i][j];
  std::memcpy(rows, turned, sizeof turned);
#endif
}

// The first numbers of a register, and zeros. Unlike a copy of so many bytes, one instruction.
inline Floats load_first(const float* p, int64_t count) {
#if defined(__AVX512F__)
  const __mmask16 wanted = static_cast<__mmask16>((1u << count) - 1);
  return reinterpret_cast<Floats>(_mm512_maskz_loadu_ps(wanted, p));
#elif defined(__AVX2__)
  const Ints places = {0, 1, 2, 3, 4, 5, 6, 7};
  const Ints wanted = places < static_cast<int32_t>(count);
  return reinterpret_cast<Floats>(_mm256_maskload_ps(p, reinterpret_cast<__m256i>(wanted)));
#else
  return load(p, Partial{count});
#endif
}

// Lays out a panel: step k of the depth has the numbers of `count` places at to[k width], and zeros
// or copies up to `width`. Up to kLanes numbers behind the panel are written, too.
inline void pack_panel(const Side& side, int64_t count, int64_t depth, int64_t width, float* to) {
  if (side.step == 1 && !side.list) {
    const int64_t whole = count / kLanes * kLanes;
    // Lines so far apart are fetched in advance by no hardware.
    constexpr int64_t kAhead = 16;
    for (int64_t k = 0; k < depth; ++k, to += width) {
      const float* from = side.data + side.deep(k);
      const float* next = side.data + side.deep(std::min(k + kAhead, depth - 1));
      __builtin_prefetch(next);
      __builtin_prefetch(next + count - 1);
      int64_t c = 0;
      // The panel beside this one is laid out next: its lines are a row apart from each other, which
      // no hardware foresees.
      for (int64_t line = width; line < 2 * width; line += kCacheLine / 4)
        __builtin_prefetch(from + line);
      __builtin_prefetch(from + 2 * width - 1);
      for (; c < whole; c += kLanes) store(to + c, load(from + c, Full{}), Full{});
      if (c < count) store(to + c, load_first(from + c, count - c), Full{});
    }
    return;
  }
  const bool turned = side.depth_step == 1 && !side.depth_list;
  for (int64_t first = 0; first < width; first += kLanes) {
    const int64_t last = count - 1 - first, lanes = std::min(width - first, kLanes);
    const int64_t ahead = std::min(width, kLanes) * side.step;  // the rows that follow
    const float* from[kLanes];
    for (int64_t i = 0; i < kLanes; ++i)
      from[i] = side.at(first + std::max(int64_t{0}, std::min(i, last)));
    int64_t k = 0;
    for (; turned && k + kLanes <= depth; k += kLanes) {
      Floats square[kLanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i) {
        square[i] = load(from[i] + k, Full{});
        __builtin_prefetch(from[i] + ahead + k);
      }
      transpose(square);
      float* line = to + k * width + first;
      if (first == 0 || lanes == kLanes) {
        // Of a panel narrower than a register, each line overwrites what the one before had too much.
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i) store(line + i * width, square[i], Full{});
      } else {
        for (int64_t i = 0; i < kLanes; ++i) store(line + i * width, square[i], Partial{lanes});
      }
    }
    for (; k < depth; ++k) {
      float* line = to + k * width + first;
      const int64_t deep = side.deep(k);
      for (int64_t i = 0; i < lanes; ++i) line[i] = from[i][deep];
    }
  }
}

}  // namespace
}  // namespace moezoo
