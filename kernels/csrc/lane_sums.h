// Adding up the lanes of as many registers as a register has lanes: for rows so short that this
// would otherwise take longer than the products.

#pragma once

#include "vectors.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace moezoo {
namespace {

#if defined(__AVX512F__)

// In each quarter of 4 lanes by itself: lane i is the sum of that quarter of rows[i].
inline __m512 sums_of_quarters(const Floats* rows) {
  const __m512 a = (__m512)rows[0], b = (__m512)rows[1], c = (__m512)rows[2], d = (__m512)rows[3];
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  return _mm512_add_ps((__m512)_mm512_unpacklo_pd((__m512d)ab, (__m512d)cd),
                       (__m512)_mm512_unpackhi_pd((__m512d)ab, (__m512d)cd));
}

// Adds quarter 1 to quarter 0 and 3 to 2: the sums of a in the lower half, of b in the upper.
inline __m512 add_quarters(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

// Lane i is the sum of the lanes of rows[i].
inline Floats sums_of_lanes(const Floats* rows) {
  const __m512 first = add_quarters(sums_of_quarters(rows), sums_of_quarters(rows + 4));
  const __m512 last = add_quarters(sums_of_quarters(rows + 8), sums_of_quarters(rows + 12));
  return (Floats)add_quarters(first, last);
}

#elif defined(__AVX__)

inline __m256 sums_of_halves(const Floats* rows) {
  return _mm256_hadd_ps(_mm256_hadd_ps((__m256)rows[0], (__m256)rows[1]),
                        _mm256_hadd_ps((__m256)rows[2], (__m256)rows[3]));
}

inline Floats sums_of_lanes(const Floats* rows) {
  const __m256 first = sums_of_halves(rows), last = sums_of_halves(rows + 4);
  return (Floats)_mm256_add_ps(_mm256_permute2f128_ps(first, last, 0x20),
                               _mm256_permute2f128_ps(first, last, 0x31));
}

#elif defined(__SSE2__)

inline Floats sums_of_lanes(const Floats* rows) {
  __m128 a = (__m128)rows[0], b = (__m128)rows[1], c = (__m128)rows[2], d = (__m128)rows[3];
  _MM_TRANSPOSE4_PS(a, b, c, d);
  return (Floats)_mm_add_ps(_mm_add_ps(a, b), _mm_add_ps(c, d));
}

#else

inline Floats sums_of_lanes(const Floats* rows) {
  Floats sums;
  for (int64_t i = 0; i < kLanes; ++i) sums[i] = sum(rows[i]);
  return sums;
}

#endif

}  // namespace
}  // namespace moezoo
