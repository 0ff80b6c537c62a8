// Newton-Schulz iterations on a batch of fp32 matrices, each by one thread.
//
// X (rows, columns) has n singular values, n being its short side and m its long one. An iteration
// X <- (a I + b G + c G^2) X, G = X X^T, needs the long side for G and for X alone; several have
// X <- Q X, Q being a product of polynomials in G, and so is the next G. All of these are n x n,
// symmetric, and commute: of each product the upper triangle is computed, and mirrored. Rounding G
// blurs small singular values, which the iterations enlarge; after kSegment of them G is computed
// anew from X, and the result is then as exact as with a new G in every iteration.
//
// Shapes: n short side, m long side; all buffers are padded with zeros to whole tiles.

#include <cmath>
#include <utility>

#include "vectors.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace moezoo {
namespace {

constexpr int64_t kSegment = 3;
constexpr int kColumns = 2;  // registers
constexpr int64_t kWidth = kColumns * kLanes;
constexpr int64_t kDepth = 256;  // of blocks, which stay in cache
#if defined(__AVX512F__)
constexpr int kRows = 8;  // 16 of 32 registers hold sums
#elif defined(__AVX__)
constexpr int kRows = 6;  // 12 of 16
#else
constexpr int kRows = 4;
#endif

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// A row of whole tiles, and of an odd number of cache lines: a column's lines then lie in
// different sets of the cache.
int64_t padded(int64_t n) {
  const int64_t line = kCacheLine / sizeof(float);
  const int64_t lines = round_up(std::max(round_up(n, kWidth), round_up(n, kRows)), line) / line;
  return (lines | 1) * line;
}

// Zeros, from the beginning of a cache line on.
struct Aligned {
  explicit Aligned(int64_t count) : numbers(count + kCacheLine / sizeof(float)) {
    const auto place = reinterpret_cast<uintptr_t>(numbers.data());
    data = numbers.data() + (kCacheLine - place % kCacheLine) % kCacheLine / sizeof(float);
  }

  std::vector<float> numbers;
  float* data;
};

struct Buffer : Aligned {
  Buffer(int64_t rows, int64_t columns)
      : Aligned(padded(rows) * padded(columns)), stride(padded(columns)) {}

  float* row(int64_t i) const { return data + i * stride; }

  int64_t stride;
};

// A matrix, or its transpose: element (k, i) is data[k * down + i * along], one of which is 1.
struct View {
  const float* data;
  int64_t down, along;
};

View plain(const Buffer& x) { return {x.data, x.stride, 1}; }
View transposed(const Buffer& x) { return {x.data, 1, x.stride}; }

// panel (depth, kWidth) = B[:, first : first + kWidth], where B is a transpose.
void pack(View b, int64_t depth, int64_t first, float* panel) {
  for (int64_t j = 0; j < kWidth; ++j) {
    const float* from = b.data + (first + j) * b.along;
    for (int64_t k = 0; k < depth; ++k) panel[k * kWidth + j] = from[k];
  }
}

// A block of both operands, and the tile of the result that it adds to.
struct Block {
  const float *left, *right;
  int64_t left_down, left_along, right_down, depth;
  float scale, share;
  const float* added;
  float* to;
  int64_t stride;
};

// to = scale * sum_k left[k, :]^T right[k, :] + share * added, `registers` wide.
template <bool kAdjacent, int registers>
void tile(const Block& block) {
  const float *a = block.left, *b = block.right;
  const int64_t depth = block.depth, along = block.left_along;
  const int64_t a_step = kAdjacent ? block.left_down : 1, b_step = block.right_down;
  Floats sums[kRows][registers] = {};
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_step) {
    Floats row[registers];
    for (int c = 0; c < registers; ++c) row[c] = load(b + c * kLanes, Full{});
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < registers; ++c) sums[r][c] += a[kAdjacent ? r : r * along] * row[c];
  }
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < registers; ++c) {
      const int64_t place = r * block.stride + c * kLanes;
      Floats total = block.scale * sums[r][c];
      if (block.added) total += block.share * load(block.added + place, Full{});
      store(block.to + place, total, Full{});
    }
}

// to = scale * A^T B + share * added, A being (depth, rows) and B (depth, columns). If the result
// is symmetric, what lies below the diagonal is left out. `added` has the stride of `to`.
void multiply(View a, View b, int64_t depth, int64_t rows, int64_t columns, bool symmetric,
              float scale, float share, const float* added, const Buffer& to, float* panel) {
  const auto full = a.along == 1 ? tile<true, kColumns> : tile<false, kColumns>;
  const auto half = a.along == 1 ? tile<true, 1> : tile<false, 1>;
  for (int64_t k = 0; k < depth; k += kDepth) {
    for (int64_t j = 0; j < columns; j += kWidth) {
      Block block{};
      block.depth = std::min(kDepth, depth - k);
      block.left_down = a.down, block.left_along = a.along;
      if (b.along == 1) {
        block.right = b.data + k * b.down + j, block.right_down = b.down;
      } else {
        pack({b.data + k, b.down, b.along}, block.depth, j, panel);
        block.right = panel, block.right_down = kWidth;
      }
      block.scale = scale, block.share = k ? 1 : share, block.stride = to.stride;
      const int64_t last = symmetric ? std::min(rows, j + kWidth) : rows;
      for (int64_t i = 0; i < last; i += kRows) {
        block.left = a.data + k * a.down + i * a.along;
        block.to = to.data + i * to.stride + j;
        block.added = k ? block.to : added ? added + (block.to - to.data) : nullptr;
        if (symmetric && i >= j + kLanes) {  // the left registers lie below the diagonal
          Block right = block;
          right.right += (kColumns - 1) * kLanes, right.to += (kColumns - 1) * kLanes;
          if (right.added) right.added += (kColumns - 1) * kLanes;
          half(right);
        } else {
          full(block);
        }
      }
    }
  }
}

// Copies the upper triangle to the lower one, by squares of 4 x 4.
void mirror(const Buffer& x, int64_t n) {
  for (int64_t i = 0; i < n; i += 4)
    for (int64_t j = i; j < n; j += 4) {
      const float* from = x.row(i) + j;
      float* to = x.row(j) + i;
      if (i == j) {
        for (int r = 1; r < 4; ++r)
          for (int c = 0; c < r; ++c) to[r * x.stride + c] = from[c * x.stride + r];
        continue;
      }
#if defined(__SSE__)
      __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + x.stride);
      __m128 c = _mm_loadu_ps(from + 2 * x.stride), d = _mm_loadu_ps(from + 3 * x.stride);
      _MM_TRANSPOSE4_PS(a, b, c, d);
      _mm_storeu_ps(to, a);
      _mm_storeu_ps(to + x.stride, b);
      _mm_storeu_ps(to + 2 * x.stride, c);
      _mm_storeu_ps(to + 3 * x.stride, d);
#else
      for (int r = 0; r < 4; ++r)
        for (int c = 0; c < 4; ++c) to[r * x.stride + c] = from[c * x.stride + r];
#endif
    }
}

// The buffers of one thread, for matrices of one shape.
class Iterations {
 public:
  Iterations(int64_t rows, int64_t columns, const float* coefficients, int64_t steps)
      : rows_(rows), columns_(columns), n_(std::min(rows, columns)), steps_(steps),
        a_(coefficients[0]), b_(coefficients[1]), c_(coefficients[2]),
        x_(rows, columns), next_(rows, columns), gram_(n_, n_), factor_(n_, n_), all_(n_, n_),
        spare_(n_, n_), panel_(kDepth * kWidth) {}

  void run(float* matrix, float floor) {
    normalise(matrix, floor);
    for (int64_t done = 0; done < steps_; done += kSegment)
      segment(std::min(kSegment, steps_ - done));
    for (int64_t i = 0; i < rows_; ++i)
      std::memcpy(matrix + i * columns_, x_.row(i), columns_ * sizeof(float));
  }

 private:
  void normalise(const float* from, float floor) {
    double squares = 0;
    for (int64_t i = 0; i < rows_; ++i)
      squares += dot(from + i * columns_, from + i * columns_, columns_);
    const float norm = static_cast<float>(std::sqrt(squares));
    const float divisor = norm < floor ? floor : norm;
    for (int64_t i = 0; i < rows_; ++i) {
      float* row = x_.row(i);
      for (int64_t j = 0; j < columns_; ++j) row[j] = from[i * columns_ + j] / divisor;
    }
  }

  void segment(int64_t steps) {
    const bool tall = rows_ > columns_;
    const View x = tall ? plain(x_) : transposed(x_);  // (m, n)
    multiply(x, x, tall ? rows_ : columns_, n_, n_, true, 1, 0, nullptr, gram_, panel_.data);
    mirror(gram_, n_);
    for (int64_t k = 0; k < steps; ++k) {
      multiply(plain(gram_), plain(gram_), n_, n_, n_, true, c_, b_, gram_.data, factor_, panel_.data);
      mirror(factor_, n_);
      for (int64_t i = 0; i < n_; ++i) factor_.row(i)[i] += a_;
      if (k > 0) {
        square(factor_, all_, spare_);
        std::swap(all_, spare_);
      }
      if (k + 1 < steps) {
        square(factor_, gram_, spare_);
        square(spare_, factor_, gram_);
      }
      if (k == 0) std::swap(all_, factor_);
    }
    if (tall)
      multiply(transposed(x_), plain(all_), n_, rows_, n_, false, 1, 0, nullptr, next_, panel_.data);
    else
      multiply(plain(all_), plain(x_), n_, n_, columns_, false, 1, 0, nullptr, next_, panel_.data);
    std::swap(x_, next_);
  }

  // to = left right, symmetric matrices that commute.
  void square(const Buffer& left, const Buffer& right, const Buffer& to) {
    multiply(plain(left), plain(right), n_, n_, n_, true, 1, 0, nullptr, to, panel_.data);
    mirror(to, n_);
  }

  int64_t rows_, columns_, n_, steps_;
  float a_, b_, c_;
  Buffer x_, next_, gram_, factor_, all_, spare_;
  Aligned panel_;
};

}  // namespace
}  // namespace moezoo

using namespace moezoo;

// Each of B matrices X (R, C), in place: X / max(|X|, floor) after `steps` iterations
// X <- (a I + b G + c G^2) X with G = X X^T; coefficients are a, b, c.
MOEZOO_API void moezoo_newton_schulz(float* const* matrices, int64_t count, int64_t rows,
                                     int64_t columns, const float* coefficients, int64_t steps,
                                     double floor, int32_t threads) {
  if (rows == 0 || columns == 0) return;
  parallel_ranges(count, 1, threads, [&](int64_t first, int64_t last) {
    Iterations iterations(rows, columns, coefficients, steps);
    for (int64_t b = first; b < last; ++b) iterations.run(matrices[b], static_cast<float>(floor));
  });
}
