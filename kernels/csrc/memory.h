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

// Whether a matrix is worth streaming: larger than a core's caches, and every row's registers
// aligned.
template <class T>
inline bool is_large(const T* matrix, int64_t rows, int64_t width) {
  constexpr int64_t kCache = int64_t{8} << 20;
  const bool aligned = reinterpret_cast<uintptr_t>(matrix) % kRegisterBytes == 0;
  return aligned && width % kLanes == 0 && rows * width * int64_t{sizeof(T)} >= kCache;
}

// Asks for the pages behind a large buffer a stretch at a time, just before it is first written
// from front to back: one call for each, instead of a fault for every 4 KiB, which would take
// longer than what is written. Only a hint; pages that are there already stay as they are.
class FreshPages {
 public:
  FreshPages(void* begin, void* end)
      : next_(page_after(reinterpret_cast<uintptr_t>(begin))),
        end_(reinterpret_cast<uintptr_t>(end)) {}

  void before_writing(const void* until) {
#if defined(MADV_POPULATE_WRITE)
    while (next_ < reinterpret_cast<uintptr_t>(until) && next_ + kStretch <= end_) {
      madvise(reinterpret_cast<void*>(next_), kStretch, MADV_POPULATE_WRITE);
      next_ += kStretch;
    }
#else
    (void)until;
#endif
  }

 private:
  static constexpr uintptr_t kStretch = uintptr_t{1} << 18;

  static uintptr_t page_after(uintptr_t address) {
    constexpr uintptr_t kPage = 4096;
    return (address + kPage - 1) / kPage * kPage;
  }

  uintptr_t next_, end_;
};

}  // namespace
}  // namespace moezoo
