// Scratch memory that registers are aligned in, zeros that cost nothing until they are read, and the
// writing of results larger than any cache.

#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
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

// Asks at once for the pages behind a buffer that is about to be written; its contents stay.
inline void populate(void* data, int64_t bytes) {
#if defined(MADV_POPULATE_WRITE)
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_POPULATE_WRITE);
#else
  (void)data, (void)bytes;
#endif
}

// Gives whole pages back, to be zeros when next touched; false where the system refuses.
inline bool drop_pages(void* begin, int64_t bytes) {
#if defined(__linux__)
  return madvise(begin, bytes, MADV_DONTNEED) == 0;
#else
  return (void)begin, (void)bytes, false;
#endif
}

// Whether dropped pages do come back as zeros. Linux promises it of memory that no other process
// shares; emulators of Linux have ignored the call, and an allocator may hand out something else.
inline bool dropped_pages_are_zero() {
#if defined(__linux__)
  static const bool found = [] {
    const int64_t page = sysconf(_SC_PAGESIZE), bytes = int64_t{2} << 20;
    char* const tried = static_cast<char*>(std::aligned_alloc(page, bytes));
    if (!tried) return false;
    for (int64_t at = 0; at < bytes; at += bytes / 2) tried[at] = 1;
    bool zeros = drop_pages(tried, bytes);
    for (int64_t at = 0; at < bytes; at += bytes / 2) zeros = zeros && tried[at] == 0;
    std::free(tried);
    return zeros;
  }();
  return found;
#else
  return false;
#endif
}

// Fills a buffer of malloc's with zeros: a large one by dropping its pages, which costs nothing
// until they are read.
inline void zero(void* data, int64_t bytes) {
  constexpr int64_t kLarge = int64_t{1} << 20;
  if (bytes >= kLarge && dropped_pages_are_zero()) {
#if defined(__linux__)
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
    const uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
    if (drop_pages(reinterpret_cast<void*>(first), last - first)) {
      std::memset(data, 0, first - begin);
      std::memset(reinterpret_cast<void*>(last), 0, end - last);
      return;
    }
#endif
  }
  std::memset(data, 0, bytes);
}

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
