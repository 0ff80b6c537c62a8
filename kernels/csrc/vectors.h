// Rows of fp32 or bf16 numbers, a register of them at a time, computed with in fp32.
//
// GCC's and Clang's vector types serve every instruction set: the registers are as wide as the
// flags allow. A row's last, partial register is read with zeros behind it.

#pragma once

#include <algorithm>
#include <vector>

#include "common.h"

namespace moezoo {
namespace {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif
constexpr int64_t kLanes = kRegisterBytes / 4;
constexpr int64_t kCacheLine = 64;

typedef float Floats __attribute__((vector_size(kRegisterBytes)));
typedef int32_t Ints __attribute__((vector_size(kRegisterBytes)));
typedef uint32_t Words __attribute__((vector_size(kRegisterBytes)));
typedef uint16_t Halves __attribute__((vector_size(kRegisterBytes / 2)));

// How many lanes of a register a row fills: all of them, known when compiling, or the last few.
struct Full {
  static constexpr int64_t count = kLanes;
};
struct Partial {
  int64_t count;
};

// Calls body(column, lanes) for each register of a row, lanes being Full but at the row's end.
template <class Body>
inline void by_registers(int64_t width, const Body& body) {
  int64_t column = 0;
  for (; column + kLanes <= width; column += kLanes) body(column, Full{});
  if (column < width) body(column, Partial{width - column});
}

// Calls body(T{}) with the element type that Python's code stands for.
template <class Body>
inline void with_type(int64_t dtype, const Body& body) {
  if (dtype == kBFloat16) body(bfloat16{});
  else body(float{});
}

inline Floats broadcast(float value) { return Floats{} + value; }

inline Floats widen(Halves bits) {
  return reinterpret_cast<Floats>(__builtin_convertvector(bits, Words) << 16);
}

// Rounds to nearest, ties to even, as torch does; a NaN stays one.
inline Halves narrow(Floats values) {
  const Words bits = reinterpret_cast<Words>(values);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words is_number = reinterpret_cast<Words>(values == values);
  return __builtin_convertvector((rounded & is_number) | (0x7fc0u & ~is_number), Halves);
}

template <class Lanes>
inline Floats load(const float* p, Lanes lanes) {
  Floats values{};
  std::memcpy(&values, p, lanes.count * sizeof *p);
  return values;
}

template <class Lanes>
inline Floats load(const bfloat16* p, Lanes lanes) {
  Halves bits{};
  std::memcpy(&bits, p, lanes.count * sizeof *p);
  return widen(bits);
}

template <class Lanes>
inline void store(float* p, Floats values, Lanes lanes) {
  std::memcpy(p, &values, lanes.count * sizeof *p);
}

template <class Lanes>
inline void store(bfloat16* p, Floats values, Lanes lanes) {
  const Halves bits = narrow(values);
  std::memcpy(p, &bits, lanes.count * sizeof *p);
}

// Adds the lanes in halves, an order that does not depend on where the row lies.
inline float sum(Floats values) {
  float lanes[kLanes];
  std::memcpy(lanes, &values, sizeof values);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Several sums run side by side, as each addition waits for the one before it in its own sum.
template <class A, class B>
inline float dot(const A* a, const B* b, int64_t width) {
  constexpr int kSums = 4;
  Floats sums[kSums] = {};
  int64_t column = 0;
  for (; column + kSums * kLanes <= width; column += kSums * kLanes)
    for (int s = 0; s < kSums; ++s)
      sums[s] += load(a + column + s * kLanes, Full{}) * load(b + column + s * kLanes, Full{});
  by_registers(width - column, [&](int64_t c, auto lanes) {
    sums[0] += load(a + column + c, lanes) * load(b + column + c, lanes);
  });
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class From, class To>
inline void convert_row(const From* from, To* to, int64_t width) {
  by_registers(width, [&](int64_t c, auto lanes) { store(to + c, load(from + c, lanes), lanes); });
}

template <class T>
inline void prefetch_row(const T* row, int64_t width) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (int64_t offset = 0; offset < width * int64_t{sizeof(T)}; offset += kCacheLine)
    __builtin_prefetch(bytes + offset);
}

// Rows to be added up one after another, and what each is multiplied with.
template <class T>
struct WeightedRows {
  std::vector<const T*> rows;
  std::vector<float> weights;

  void clear() {
    rows.clear();
    weights.clear();
  }

  void add(const T* row, float weight) {
    rows.push_back(row);
    weights.push_back(weight);
  }

  int64_t size() const { return static_cast<int64_t>(rows.size()); }
};

// sum = Σ weights[i] rows[i] over begin <= i < end, in the order of i.
//
// Four rows at a time: the sum is read and written a quarter as often, and their cache misses
// overlap. Meanwhile the list's next four are asked for: no hardware guesses which rows those are.
template <class T>
inline void add_rows(const WeightedRows<T>& list, int64_t begin, int64_t end, int64_t width,
                     float* sum) {
  constexpr int64_t kAtOnce = 4;
  const T* const* rows = list.rows.data();
  const float* weights = list.weights.data();
  const int64_t last = list.size() - 1;
  const auto ahead = [&](int64_t i) { return rows[i + kAtOnce < last ? i + kAtOnce : last]; };

  std::fill(sum, sum + width, 0.0f);
  int64_t i = begin;
  for (; i + kAtOnce <= end; i += kAtOnce) {
    const T *a = rows[i], *b = rows[i + 1], *c = rows[i + 2], *d = rows[i + 3];
    const T *next_a = ahead(i), *next_b = ahead(i + 1);
    const T *next_c = ahead(i + 2), *next_d = ahead(i + 3);
    const float w_a = weights[i], w_b = weights[i + 1], w_c = weights[i + 2], w_d = weights[i + 3];
    by_registers(width, [&](int64_t column, auto lanes) {
      __builtin_prefetch(next_a + column);
      __builtin_prefetch(next_b + column);
      __builtin_prefetch(next_c + column);
      __builtin_prefetch(next_d + column);
      Floats total = load(sum + column, lanes);
      total += w_a * load(a + column, lanes);
      total += w_b * load(b + column, lanes);
      total += w_c * load(c + column, lanes);
      total += w_d * load(d + column, lanes);
      store(sum + column, total, lanes);
    });
  }
  for (; i < end; ++i) {
    const T *row = rows[i], *next = ahead(i);
    by_registers(width, [&](int64_t column, auto lanes) {
      __builtin_prefetch(next + column);
      const Floats added = weights[i] * load(row + column, lanes);
      store(sum + column, load(sum + column, lanes) + added, lanes);
    });
  }
}

}  // namespace
}  // namespace moezoo
