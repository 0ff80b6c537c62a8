// What all kernels share: the exported functions' linkage, bf16, and the loop over threads.
//
// Everything here is compiled once per instruction set (see setup.py), with the same results
// up to rounding. Exported functions are plain C: pointers to contiguous row-major data, int64
// sizes, and the number of threads. They do not allocate what they return, do not throw, and
// write every element of their outputs, in an order that does not depend on timing.

#pragma once

#include <cstdint>
#include <cstring>

#define MOEZOO_API extern "C" __attribute__((visibility("default")))

namespace moezoo {
namespace {  // one copy per source file: three libraries with equal names live in one process

// The codes by which Python names a dtype; native.py holds the same list.
enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1 };

struct bfloat16 {
  uint16_t bits;
};

inline float load(const float* p) { return *p; }

inline float load(const bfloat16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void store(float* p, float value) { *p = value; }

// Rounds to nearest, ties to even, as torch does; a NaN stays one.
inline void store(bfloat16* p, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  p->bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

// Calls body(begin, end) on consecutive ranges that cover [0, n), one per thread, none of them
// shorter than grain unless there is only one.
template <class Body>
inline void parallel_ranges(int64_t n, int64_t grain, int32_t threads, const Body& body) {
  if (n <= 0) return;
  int64_t ranges = n / (grain > 0 ? grain : 1);
  if (ranges > threads) ranges = threads;
  if (ranges <= 1) {
    body(int64_t{0}, n);
    return;
  }
  // All threads even for few ranges: libgomp ends those that a smaller team leaves out, and starts
  // them anew for the next operation of torch, which shares them.
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t r = 0; r < ranges; ++r) body(n * r / ranges, n * (r + 1) / ranges);
}

}  // namespace
}  // namespace moezoo
