// The k best of the n * n sums of two rows of n scores, for many pairs of rows.
//
// Only the k best of each row can take part, and of their pairs only those that fewer than k
// others are sure to precede. So the same is done three times, for each half and for the pairs:
// bound the k-th best from below, collect what reaches the bound, and order these few.
//
// A NaN counts as greater than all numbers, as in torch.sort. Of equal scores the one with the
// lower position is better.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "common.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace moezoo {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What is written a vector at a time needs this much room behind it.
constexpr int64_t kLanes = 16;

// An integer of the same order as the float: zeros of both signs are equal, a NaN of either sign
// is the greatest.
inline int32_t ordered(float value) {
  value += 0.0f;
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = value == value ? bits : 0x7fc00000;
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

inline float value_if(bool condition, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits &= 0u - static_cast<uint32_t>(condition);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

constexpr int kGroups = 64;

// A lower bound of the k-th best of n scores. Every 64th score forms a group; at least k groups
// have a maximum that is not below the bound (or hold a NaN). Bisection brings it near to the
// best such bound, without branches, which would be mispredicted half of the time.
float lower_bound(const float* scores, int64_t n, int64_t k) {
  if (k > kGroups || n < kGroups) return -kInfinity;
  float maxima[kGroups];
  std::memcpy(maxima, scores, sizeof maxima);
  for (int64_t i = kGroups; i + kGroups <= n; i += kGroups) {
#pragma omp simd
    for (int g = 0; g < kGroups; ++g) {
      maxima[g] = scores[i + g] > maxima[g] ? scores[i + g] : maxima[g];
    }
  }
  float low = kInfinity, high = -kInfinity;
#pragma omp simd reduction(min : low) reduction(max : high)
  for (int g = 0; g < kGroups; ++g) {
    low = maxima[g] < low ? maxima[g] : low;
    high = maxima[g] > high ? maxima[g] : high;
  }
  float step = high - low;
  for (int bisection = 0; bisection < 6; ++bisection) {
    step *= 0.5f;
    const float middle = low + step;
    int32_t reached = 0;
#pragma omp simd reduction(+ : reached)
    for (int g = 0; g < kGroups; ++g) reached += maxima[g] >= middle;
    low += value_if(reached >= k, step);
  }
  return low;
}

// Writes the positions of the scores that are not below the bound, NaN included; returns how
// many. Without branches: which scores reach the bound cannot be predicted.
int64_t collect(const float* scores, int64_t n, float bound, int32_t* positions) {
  int64_t count = 0;
#if defined(__AVX512F__)
  const __m512 bounds = _mm512_set1_ps(bound);
  __m512i here = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t i = 0; i < n; i += 16) {
    const auto present = static_cast<__mmask16>(n - i < 16 ? (1u << (n - i)) - 1u : 0xffffu);
    const __m512 lanes = _mm512_maskz_loadu_ps(present, scores + i);
    const __mmask16 reach = _mm512_mask_cmp_ps_mask(present, lanes, bounds, _CMP_NLT_UQ);
    _mm512_storeu_si512(positions + count, _mm512_maskz_compress_epi32(reach, here));
    count += __builtin_popcount(reach);
    here = _mm512_add_epi32(here, _mm512_set1_epi32(16));
  }
#else
  for (int64_t i = 0; i < n; ++i) {
    positions[count] = static_cast<int32_t>(i);
    count += !(scores[i] < bound);
  }
#endif
  return count;
}

// Writes for each of n keys how many are greater. Quadratic, and still faster than sorting for as
// few as there are: no branches, no order, and the counts of 16 keys stay in registers.
void count_greater(const int32_t* keys, int64_t n, int32_t* greater) {
  for (int64_t i = 0; i < n; i += kLanes) {
    int32_t counts[kLanes] = {};
    for (int64_t j = 0; j < n; ++j) {
      const int32_t key = keys[j];
#pragma omp simd
      for (int64_t l = 0; l < kLanes; ++l) counts[l] += key > keys[i + l];
    }
    std::memcpy(greater + i, counts, sizeof counts);
  }
}

// Finds the k best of up to `most` scores, best first; holds room.
class BestOf {
 public:
  BestOf(int64_t most, int64_t k)
      : k_(k),
        positions_(most + kLanes),
        keys_(most + kLanes),
        greater_(most + kLanes),
        placed_(most + kLanes),
        best_(most + kLanes) {}

  // Gives the positions of the best. At least k scores must not be below the bound.
  const int32_t* find(const float* scores, int64_t n, float bound) {
    const int64_t count = collect(scores, n, bound, positions_.data());
    const int32_t* positions = positions_.data();
    int32_t* keys = keys_.data();
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) keys[c] = ordered(scores[positions[c]]);
    if (count <= kMostCompared) {
      order_by_counting(count);
    } else {
      order_by_partition(count);
    }
    return best_.data();
  }

 private:
  // Beyond this many, as where many scores are equal, counting takes longer than partitioning.
  static constexpr int64_t kMostCompared = 256;

  // Equal keys take consecutive places in the order they are in, which is that of positions.
  void order_by_counting(int64_t count) {
    count_greater(keys_.data(), count, greater_.data());
    const int32_t *greater = greater_.data(), *positions = positions_.data();
    int32_t *placed = placed_.data(), *best = best_.data();
    std::fill(placed, placed + count, 0);
    for (int64_t c = 0; c < count; ++c) best[greater[c] + placed[greater[c]]++] = positions[c];
  }

  void order_by_partition(int64_t count) {
    pairs_.resize(count);
    for (int64_t c = 0; c < count; ++c) pairs_[c] = {~keys_[c], positions_[c]};
    std::nth_element(pairs_.begin(), pairs_.begin() + k_ - 1, pairs_.end());
    std::sort(pairs_.begin(), pairs_.begin() + k_);
    for (int64_t c = 0; c < k_; ++c) best_[c] = pairs_[c].second;
  }

  int64_t k_;
  std::vector<int32_t> positions_, keys_, greater_, placed_, best_;
  std::vector<std::pair<int32_t, int32_t>> pairs_;  // inverted key, position
};

// The pairs of ranks (r, s), both counted from 0, with (r + 1) (s + 1) <= k, in the order of r,
// then s. Each of the others is preceded by k pairs whose halves are not worse, and rounding keeps
// that order; of equal sums the one with the better first half comes first.
struct Staircase {
  explicit Staircase(int64_t k) {
    for (int64_t r = 0; r < k; ++r) {
      lengths.push_back(k / (r + 1));
      corners.push_back(static_cast<int32_t>((k + r) / (r + 1) - 1));
      for (int64_t s = 0; s < lengths.back(); ++s) {
        first.push_back(static_cast<int32_t>(r));
        second.push_back(static_cast<int32_t>(s));
      }
    }
  }

  int64_t size() const { return static_cast<int64_t>(first.size()); }

  std::vector<int64_t> lengths;        // pairs with the r-th of the first half
  std::vector<int32_t> corners;        // least s with (r + 1) (s + 1) >= k
  std::vector<int32_t> first, second;  // ranks of each pair
};

// Selects from one pair of rows after another; holds what is the same for all, and room.
class Selection {
 public:
  Selection(int64_t n, int64_t k)
      : n_(n),
        k_(k),
        staircase_(k),
        best_(std::max(n, staircase_.size()), k),
        first_(k + kLanes),
        second_(k + kLanes),
        sums_(staircase_.size() + kLanes),
        first_rows_(k),
        second_rows_(k) {}

  void select(const float* first, const float* second, float* scores, int64_t* slots) {
    const float first_bound = lower_bound(first, n_, k_);
    const float second_bound = lower_bound(second, n_, k_);
    select_half(first, first_bound, first_.data(), first_rows_.data());
    select_half(second, second_bound, second_.data(), second_rows_.data());
    sum_pairs();
    const int32_t* best = best_.find(sums_.data(), staircase_.size(), corner_bound());
    for (int64_t c = 0; c < k_; ++c) {
      const int32_t pair = best[c];
      scores[c] = sums_[pair];
      slots[c] = first_rows_[staircase_.first[pair]] * n_ + second_rows_[staircase_.second[pair]];
    }
  }

 private:
  void select_half(const float* half, float bound, float* scores, int64_t* rows) {
    const int32_t* best = best_.find(half, n_, bound);
    for (int64_t c = 0; c < k_; ++c) {
      scores[c] = half[best[c]];
      rows[c] = best[c];
    }
  }

  // A vector of sums at a time; the next row overwrites what was too much.
  void sum_pairs() {
    float* sums = sums_.data();
    const float* second = second_.data();
    for (int64_t r = 0; r < k_; ++r) {
      const float first = first_[r];
      const int64_t length = staircase_.lengths[r];
      for (int64_t s = 0; s < length; s += kLanes) {
#pragma omp simd
        for (int64_t l = 0; l < kLanes; ++l) sums[s + l] = first + second[s + l];
      }
      sums += length;
    }
  }

  // A lower bound of the k-th best sum: of a rectangle of k pairs none is below its last corner.
  float corner_bound() const {
    const float *first = first_.data(), *second = second_.data();
    const int32_t* corners = staircase_.corners.data();
    float bound = -kInfinity;
#pragma omp simd reduction(max : bound)
    for (int64_t r = 0; r < k_; ++r) {
      const float corner = first[r] + second[corners[r]];
      bound = corner > bound ? corner : bound;
    }
    return bound;
  }

  int64_t n_, k_;
  Staircase staircase_;
  BestOf best_;
  std::vector<float> first_, second_, sums_;
  std::vector<int64_t> first_rows_, second_rows_;
};

constexpr int64_t kRowsPerThread = 32;

}  // namespace
}  // namespace moezoo

// halves: (2, tokens, heads, n) with these strides, the last dimension dense.
// scores, slots: (tokens, heads, k), best first; slot = row of the first half * n + of the second.
MOEZOO_API void moezoo_product_key_top_k(const float* halves, int64_t half_stride,
                                         int64_t token_stride, int64_t head_stride, float* scores,
                                         int64_t* slots, int64_t tokens, int64_t heads, int64_t n,
                                         int64_t k, int32_t threads) {
  using namespace moezoo;
  parallel_ranges(tokens * heads, kRowsPerThread, threads, [&](int64_t begin, int64_t end) {
    Selection selection(n, k);
    for (int64_t row = begin; row < end; ++row) {
      const float* half = halves + row / heads * token_stride + row % heads * head_stride;
      selection.select(half, half + half_stride, scores + row * k, slots + row * k);
    }
  });
}

// Adds the gradients of (tokens, heads, k) scores, in their order, to zeros of the half scores.
MOEZOO_API void moezoo_product_key_top_k_backward(const float* grad, const int64_t* slots,
                                                  float* halves, int64_t half_stride,
                                                  int64_t token_stride, int64_t head_stride,
                                                  int64_t tokens, int64_t heads, int64_t n,
                                                  int64_t k, int32_t threads) {
  using namespace moezoo;
  parallel_ranges(tokens * heads, kRowsPerThread, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* first = halves + row / heads * token_stride + row % heads * head_stride;
      float* second = first + half_stride;
      std::fill(first, first + n, 0.0f);
      std::fill(second, second + n, 0.0f);
      for (int64_t c = row * k; c < (row + 1) * k; ++c) {
        first[slots[c] / n] += grad[c];
        second[slots[c] % n] += grad[c];
      }
    }
  });
}
