// Products of few tokens with a matrix of which N of every M inputs of an output count: the others
// are neither stored nor read.
//
// Shapes: R rows, K width of a row, T tokens. Rows lie in panels of 32, the last one filled up with
// zeros: a register holds one weight of each of neighbouring rows, and its inputs are picked out of
// the group's M, 8 at most, by their places, of 4 bits each.

#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "few_products.h"
#include "memory.h"

namespace moezoo {
namespace {

constexpr int64_t kPanel = 32;

template <class T>
struct GroupSparse {
  const T* values;        // (panels, K / M N, 32)
  const uint8_t* places;  // (panels, K / M N, 16): of rows i and i + 16 in the low and high bits
  const T* bias;          // (R,) or null
  int64_t rows, width, n, m;

  int64_t steps() const { return width / m * n; }
  int64_t panels() const { return (rows + kPanel - 1) / kPanel; }
};

typedef uint8_t Bytes __attribute__((vector_size(kRegisterBytes / 4)));

inline Words load_places(const uint8_t* p) {
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, Words);
}

// The numbers of x (8,) at places, of which further bits do not count. Reads a register at least.
inline Floats pick(const float* x, Words places) {
#if defined(__AVX512F__)
  return (Floats)_mm512_permutexvar_ps((__m512i)places, _mm512_loadu_ps(x));
#elif defined(__AVX2__)
  return (Floats)_mm256_permutevar8x32_ps(_mm256_loadu_ps(x), (__m256i)places);
#else
  Floats picked;
  for (int i = 0; i < kLanes; ++i) picked[i] = x[places[i] & 7u];
  return picked;
#endif
}

// Tokens of a pass: twice as many sums as hide how long a sum takes, or one token's.
constexpr int kGroupTokens = kLanes >= 16 ? 4 : (kLanes >= 8 ? 2 : 1);

// out[t stride + row], rounded to T, of a panel's rows for kTokens tokens of `padded` numbers each.
template <int kTokens, class T, class Out>
inline void multiply_panel(const GroupSparse<T>& m, int64_t panel, const float* x, int64_t padded,
                           int64_t stride, Out* out) {
  constexpr int kHalf = kPanel / 2 / kLanes, kRegisters = 2 * kHalf;
  constexpr int kLine = kCacheLine / int64_t{sizeof(T)};
  constexpr int64_t kAhead = kAheadBytes / int64_t{sizeof(T)};
  const T* values = m.values + panel * m.steps() * kPanel;
  const uint8_t* places = m.places + panel * m.steps() * (kPanel / 2);
  Floats sums[kTokens][kRegisters] = {};
  for (int64_t group = 0; group < m.width; group += m.m)
    for (int64_t j = 0; j < m.n; ++j, values += kPanel, places += kPanel / 2) {
      for (int c = 0; c < kPanel; c += kLine) fetch_ahead(values + kAhead + c);
      for (int h = 0; h < kHalf; ++h) {
        const Words low = load_places(places + h * kLanes), high = low >> 4;
        const Floats first = load(values + h * kLanes, Full{});
        const Floats second = load(values + (kHalf + h) * kLanes, Full{});
        for (int t = 0; t < kTokens; ++t) {
          const float* from = x + t * padded + group;
          sums[t][h] += first * pick(from, low);
          sums[t][kHalf + h] += second * pick(from, high);
        }
      }
    }
  const auto put = [&](int64_t at, Floats sum, Out* to, auto lanes) {
    const Floats bias = m.bias ? load(m.bias + at, lanes) : Floats{};
    store(to + at, rounded<T>(sum + bias), lanes);
  };
  for (int r = 0; r < kRegisters; ++r) {
    const int64_t at = panel * kPanel + r * kLanes, left = m.rows - at;
    for (int t = 0; t < kTokens && left > 0; ++t) {
      if (left >= kLanes) put(at, sums[t][r], out + t * stride, Full{});
      else put(at, sums[t][r], out + t * stride, Partial{left});
    }
  }
}

// out (T, R) = x (T, K) times the matrix, rounded to T.
template <class X, class T, class Out>
inline void multiply_by_groups(const GroupSparse<T>& m, const X* x, int64_t tokens, Out* out,
                               int32_t threads) {
  const int64_t padded = m.width + kLanes;  // as the last group's register goes beyond it
  const Scratch room = scratch(tokens * padded);
  for (int64_t t = 0; t < tokens; ++t) {
    convert_row(x + t * m.width, room.get() + t * padded, m.width);
    std::fill_n(room.get() + t * padded + m.width, kLanes, 0.0f);
  }
  const int64_t grain = 1 + least_rows(m.steps(), tokens) / kPanel;
  parallel_ranges(m.panels(), grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      int64_t t = 0;
      const auto all = [&](auto count) {
        for (; t + count() <= tokens; t += count())
          multiply_panel<count()>(m, panel, room.get() + t * padded, padded, m.rows,
                                  out + t * m.rows);
      };
      all(std::integral_constant<int, kGroupTokens>{});
      if constexpr (kGroupTokens > 2) all(std::integral_constant<int, 2>{});
      if constexpr (kGroupTokens > 1) all(std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace
}  // namespace moezoo
