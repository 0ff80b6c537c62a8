// Scratch memory that registers are aligned in, and the writing of results larger than any cache.

#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <memory>

#include "vectors.h"

namespace moezoo {
namespace {

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Scratch = std::unique_ptr<float[], Free>;

// Room for numbers, uninitialised, from the start of a cache line on: a register that lies across
// two lines costs two accesses.
inline Scratch scratch(int64_t count) {
  const int64_t lines = count * int64_t{sizeof(float)} / kCacheLine + 1;
  return Scratch(static_cast<float*>(std::aligned_alloc(kCacheLine, lines * kCacheLine)));
}

// Asks for huge pages behind a buffer that is about to be written for the first time: a page fault
// per 2 MiB instead of one per 4 KiB. Only a hint; smaller buffers may be the allocator's own.
inline void advise_huge_pages(void* buffer, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kHugePage = int64_t{1} << 21, kLarge = 32 * kHugePage;
  if (bytes < kLarge) return;
  const int64_t start = reinterpret_cast<int64_t>(buffer);
  const int64_t begin = (start + kHugePage - 1) / kHugePage * kHugePage;
  const int64_t end = (start + bytes) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)buffer;
  (void)bytes;
#endif
}

// How a register is stored: as always, or past the caches, which saves reading the lines that are
// about to be overwritten and keeps what the caches hold.
struct Cached {
  template <class T, class Lanes>
  static void put(T* p, Floats values, Lanes lanes) {
    store(p, values, lanes);
  }
};

struct Streamed {
  template <class T>
  static void put(T* p, Floats values, Partial lanes) {
    store(p, values, lanes);
  }

#if defined(__AVX512F__)
  static void put(float* p, Floats values, Full) {
    _mm512_stream_ps(p, reinterpret_cast<__m512>(values));
  }
  static void put(bfloat16* p, Floats values, Full) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(narrow(values)));
  }
#elif defined(__AVX__)
  static void put(float* p, Floats values, Full) {
    _mm256_stream_ps(p, reinterpret_cast<__m256>(values));
  }
  static void put(bfloat16* p, Floats values, Full) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(narrow(values)));
  }
#else
  template <class T>
  static void put(T* p, Floats values, Full lanes) {
    store(p, values, lanes);
  }
#endif
};

// Makes streamed stores visible to other threads.
inline void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Whether a matrix is worth streaming: larger than a core's caches, and every row's registers aligned.
template <class T>
inline bool is_streamed(const T* matrix, int64_t rows, int64_t width) {
  constexpr int64_t kCache = int64_t{8} << 20;
  const bool aligned = reinterpret_cast<uintptr_t>(matrix) % kRegisterBytes == 0;
  return aligned && width % kLanes == 0 && rows * width * int64_t{sizeof(T)} >= kCache;
}

}  // namespace
}  // namespace moezoo
