// rank_one_experts, expert after expert: each row is read once for all its tokens, in the order in
// which the rows lie. The assignments come sorted by expert.

#include "rank_one_experts.h"
#include "row_sums.h"

namespace moezoo {
namespace {

constexpr int64_t kAhead = 16;  // rows that are asked for before they are used

// What the passes know of the assignments, in their sorted order.
class Sorted {
 public:
  Sorted(const SortedAssignments& runs, int64_t tokens, int64_t choices, bool gated)
      : runs(runs),
        count(runs.starts[runs.num_rows]),
        all(tokens * choices),
        tokens(tokens),
        choices(choices),
        gated(gated),
        token(new int64_t[count]) {}

  // Where the pre-activation of the assignment at p lies in (T, I).
  int64_t inner_place(int64_t p, int64_t half) const {
    const int64_t a = runs.order[p];
    return gated ? a + (a / choices + half) * choices : a;
  }

  // Looks up the tokens and weights of the assignments at begin … end. They lie scattered, and come
  // faster in a loop of their own, in which many are on their way at once.
  void collect(int64_t begin, int64_t end, const float* weights, float* collected) const {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t a = runs.order[p];
      token[p] = a / choices;
      collected[p] = weights[a];
    }
  }

  template <class T>
  void request_rows(Tables<T> tables, int64_t width, int64_t r, int64_t column,
                    int64_t columns) const {
    const int64_t next = r + kAhead, *starts = runs.starts;
    if (next >= runs.num_rows || starts[next] == starts[next + 1]) return;
    for (int64_t k = 0; k < tables.size(); ++k)
      request_row(tables[k] + runs.table_row(next) * width + column, columns);
  }

  SortedAssignments runs;
  int64_t count, all;  // assignments to an expert, and with those to none
  int64_t tokens, choices;
  bool gated;
  std::unique_ptr<int64_t[]> token;
};

// A stripe of columns of all tokens' sums, packed so that it stays in a core's second cache: left
// in place, rows of a power of two numbers would share a few of the cache's sets.
constexpr int64_t kStripe = 128;

template <class T>
void add_to_stripe(const T* piece, const int64_t* tokens, const float* weights, int64_t count,
                   float* stripe) {
  constexpr int64_t kWide = kRegisterBytes == 64 ? 8 : 4;  // half of the registers there are
  for (int64_t column = 0; column < kStripe; column += kWide * kLanes) {
    Floats part[kWide];
    for (int64_t k = 0; k < kWide; ++k) part[k] = load(piece + column + k * kLanes, Full{});
    for (int64_t p = 0; p < count; ++p) {
      float* sum = stripe + tokens[p] * kStripe + column;
      for (int64_t k = 0; k < kWide; ++k)
        store(sum + k * kLanes, load(sum + k * kLanes, Full{}) + weights[p] * part[k], Full{});
    }
  }
}

// output (T, D) = Σ weights[k][p] row of table k, over each token's assignments, in the order of
// the experts. Threads own stripes, so nobody else adds to a sum.
template <class T>
void sum_into_tokens(Tables<T> tables, const float* const* weights, const Sorted& sorted,
                     int64_t width, float* output, int32_t threads) {
  const SortedAssignments& runs = sorted.runs;
  const int64_t stripes = (width + kStripe - 1) / kStripe;
  parallel_ranges(stripes, 1, threads, [&](int64_t first, int64_t last) {
    const Scratch stripe = scratch(sorted.tokens * kStripe);
    float padded[kStripe] = {};
    for (int64_t s = first; s < last; ++s) {
      const int64_t column = s * kStripe, columns = std::min(kStripe, width - column);
      std::fill(stripe.get(), stripe.get() + sorted.tokens * kStripe, 0.0f);
      for (int64_t r = 0; r < runs.num_rows; ++r) {
        sorted.request_rows(tables, width, r, column, kStripe);  // of a size known when compiling
        const int64_t begin = runs.starts[r], count = runs.starts[r + 1] - begin;
        if (!count) continue;
        for (int64_t k = 0; k < tables.size(); ++k) {
          const T* piece = tables[k] + runs.table_row(r) * width + column;
          const int64_t* tokens = sorted.token.get() + begin;
          if (columns == kStripe) {
            add_to_stripe(piece, tokens, weights[k] + begin, count, stripe.get());
          } else {
            convert_row(piece, padded, columns);
            add_to_stripe(padded, tokens, weights[k] + begin, count, stripe.get());
          }
        }
      }
      for (int64_t t = 0; t < sorted.tokens; ++t)
        convert_row(stripe.get() + t * kStripe, output + t * width + column, columns);
    }
  });
}

template <class T>
void forward(const Experts<T>& experts, const float* x, const float* weights, const Sorted& sorted,
             float* output, float* inner, int32_t threads) {
  const Tables<T> asked = experts.inner();
  const SortedAssignments& runs = sorted.runs;
  const int64_t width = experts.width, count = sorted.count;
  const bool gated = sorted.gated;
  const Scratch storage = scratch((gated ? 4 : 3) * count);
  float* dots = storage.get() + 2 * count;
  const Numbers numbers{storage.get(), {dots, dots + (gated ? count : 0)},
                        storage.get() + count, nullptr, {nullptr, nullptr}, nullptr};
  parallel_rows(runs, threads, [&](int64_t first, int64_t last) {
    const int64_t begin = runs.starts[first], end = runs.starts[last];
    sorted.collect(begin, end, weights, numbers.weight);
    for (int64_t r = first; r < last; ++r) {
      sorted.request_rows(asked, width, r, 0, width);
      for (int64_t p = runs.starts[r]; p < runs.starts[r + 1]; ++p)
        for (int64_t k = 0; k < asked.size(); ++k)
          numbers.dots[k][p] =
              dot(x + sorted.token[p] * width, asked[k] + runs.table_row(r) * width, width);
    }
    for (int64_t p = begin; p < end; ++p)
      for (int64_t k = 0; k < asked.size(); ++k)
        inner[sorted.inner_place(p, k)] = numbers.dots[k][p];
    activate_all(experts.activation, gated, numbers.from(begin), end - begin);
  });
  for (int64_t p = count; p < sorted.all; ++p)
    for (int64_t k = 0; k < asked.size(); ++k) inner[sorted.inner_place(p, k)] = 0.0f;
  sum_into_tokens(experts.outer(), &numbers.coefficient, sorted, width, output, threads);
}

// Gradients of the tables, (R, D), in the order of the experts' inner() and outer(); null if not
// wanted. They begin with those of tokens before these, which are there already, or from zero.
template <class T>
struct TableGradients {
  T* inner[2];
  T* outer;
  bool begun;
};

// The gradients of some experts' assignments, and of their rows.
template <class T>
class ExpertBackward {
 public:
  ExpertBackward(const Experts<T>& experts, const float* grad, const float* inner, const float* x,
                 const float* weights, const Sorted& sorted, const TableGradients<T>& gradients,
                 const Numbers& numbers, float* grad_weights)
      : experts_(experts), grad_(grad), inner_(inner), x_(x), weights_(weights), sorted_(sorted),
        gradients_(gradients), numbers_(numbers), grad_weights_(grad_weights),
        partial_(experts.width) {}

  // Takes a few experts at a time: their tokens' rows stay in the second cache from the dot
  // products to the sums, and the activation gets full registers.
  void run(int64_t first, int64_t last) {
    constexpr int64_t kTogether = 64;
    const int64_t* starts = sorted_.runs.starts;
    std::vector<Sum> sums;
    const auto want = [&](T* output, const float* source, const float* weights) {
      if (output) sums.push_back(sum_of(output, source, weights, first, last));
    };
    want(gradients_.outer, grad_, numbers_.coefficient);
    for (int64_t k : {0, 1}) want(gradients_.inner[k], x_, numbers_.grad_dots[k]);
    while (first < last) {
      int64_t end = first + 1;
      while (end < last && starts[end + 1] - starts[first] <= kTogether) ++end;
      differentiate(first, end);
      for (Sum& sum : sums) sum_runs(sum, first, end);
      first = end;
    }
    finish_streaming();
  }

 private:
  // One table's gradient: of each run, the weighted sum of its tokens' rows of the source.
  struct Sum {
    T* output;
    const float *source, *weights;
    bool large;  // written past the caches, into fresh pages
    FreshPages pages;
  };

  Sum sum_of(T* output, const float* source, const float* weights, int64_t first,
             int64_t last) const {
    const int64_t width = experts_.width;
    return {output, source, weights, is_large(output, sorted_.runs.num_rows, width),
            FreshPages(output + first * width, output + last * width)};
  }

  void differentiate(int64_t first, int64_t last) {
    const SortedAssignments& runs = sorted_.runs;
    const int64_t begin = runs.starts[first], end = runs.starts[last], width = experts_.width;
    sorted_.collect(begin, end, weights_, numbers_.weight);
    for (int64_t p = begin; p < end; ++p)
      for (int64_t k = 0; k < experts_.inner().size(); ++k)
        numbers_.dots[k][p] = inner_[sorted_.inner_place(p, k)];
    for (int64_t r = first; r < last; ++r) {
      sorted_.request_rows(experts_.outer(), width, r, 0, width);
      for (int64_t p = runs.starts[r]; p < runs.starts[r + 1]; ++p)
        numbers_.answer[p] = dot(grad_ + sorted_.token[p] * width,
                                 experts_.v + runs.table_row(r) * width, width);
    }
    differentiate_all(experts_.activation, sorted_.gated, numbers_.from(begin), end - begin);
    if (!grad_weights_) return;
    for (int64_t p = begin; p < end; ++p) grad_weights_[runs.order[p]] = numbers_.grad_weight[p];
  }

  void sum_runs(Sum& sum, int64_t first, int64_t last) {
    if (gradients_.begun) {
      const int64_t* starts = sorted_.runs.starts;
      for (int64_t r = first; r < last; ++r)
        if (starts[r] < starts[r + 1]) sum_run<Cached>(sum, r);
    } else if (sum.large) {
      sum.pages.before_writing(sum.output + last * experts_.width);
      for (int64_t r = first; r < last; ++r) sum_run<Streamed>(sum, r);
    } else {
      for (int64_t r = first; r < last; ++r) sum_run<Cached>(sum, r);
    }
  }

  // A few rows at a time, so that the first cache holds them.
  template <class Put>
  void sum_run(const Sum& sum, int64_t r) {
    constexpr int64_t kRows = 8;
    const int64_t width = experts_.width, end = sorted_.runs.starts[r + 1];
    const float *rows[kRows], *start = begun(sum.output + r * width);
    for (int64_t p = sorted_.runs.starts[r];; p += kRows) {
      const int64_t count = std::min(kRows, end - p);
      for (int64_t i = 0; i < count; ++i) rows[i] = sum.source + sorted_.token[p + i] * width;
      if (p + count == end)
        return sum_rows<Put>(rows, sum.weights + p, count, width, start, sum.output + r * width);
      sum_rows<Cached>(rows, sum.weights + p, count, width, start, partial_.data());
      start = partial_.data();
    }
  }

  // The sum so far of a row of a table's gradient; one in bf16 has been rounded, and is not begun.
  const float* begun(const float* row) const { return gradients_.begun ? row : nullptr; }
  const float* begun(const bfloat16*) const { return nullptr; }

  const Experts<T>& experts_;
  const float *grad_, *inner_, *x_, *weights_;
  const Sorted& sorted_;
  const TableGradients<T>& gradients_;
  const Numbers& numbers_;
  float* grad_weights_;
  std::vector<float> partial_;
};

template <class T>
void backward(const Experts<T>& experts, const float* grad, const float* inner, const float* x,
              const float* weights, const Sorted& sorted, const TableGradients<T>& gradients,
              float* grad_x, float* grad_weights, int32_t threads) {
  const SortedAssignments& runs = sorted.runs;
  const int64_t width = experts.width, count = sorted.count, gated = sorted.gated;
  const Scratch storage = scratch(8 * count);
  const auto numbers_at = [&](int64_t i) { return storage.get() + i * count; };
  const Numbers numbers{numbers_at(0),
                        {numbers_at(1), numbers_at(1 + gated)},
                        numbers_at(3),
                        numbers_at(4),
                        {numbers_at(5), numbers_at(5 + gated)},
                        numbers_at(7)};
  parallel_rows(runs, threads, [&](int64_t first, int64_t last) {
    ExpertBackward<T>(experts, grad, inner, x, weights, sorted, gradients, numbers, grad_weights)
        .run(first, last);
  });
  if (grad_weights)
    for (int64_t p = count; p < sorted.all; ++p) grad_weights[runs.order[p]] = 0.0f;
  if (grad_x) sum_into_tokens(experts.inner(), numbers.grad_dots, sorted, width, grad_x, threads);
}

}  // namespace
}  // namespace moezoo

using namespace moezoo;

// output (T, D) and pre-activations inner (T, I), from the assignments sorted by expert: order
// (T J,) and starts (N + 1,), those of no expert last.
MOEZOO_API void moezoo_rank_one_experts_by_expert(
    const float* x, const void* u, const void* v, const void* gate, int64_t dtype,
    int64_t activation, const float* weights, const int64_t* order, const int64_t* starts,
    int64_t num_experts, int64_t tokens, int64_t choices, int64_t width, float* output,
    float* inner, int32_t threads) {
  const Sorted sorted({order, starts, nullptr, num_experts}, tokens, choices, gate);
  with_type(dtype, [&](auto type) {
    const Experts<decltype(type)> experts(u, v, gate, width, activation);
    forward(experts, x, weights, sorted, output, inner, threads);
  });
}

// All gradients, each null if not wanted: grad_x (T, D), grad_weights (T, J), and of the tables
// (R, D), of which rows (R,) says which rows they hold; null for all N. Sums are taken in fp32.
// `begun` says that the tables' gradients, in fp32, hold those of other tokens, to be added to.
MOEZOO_API void moezoo_rank_one_experts_backward_by_expert(
    const float* grad, const float* inner, const float* x, const void* u, const void* v,
    const void* gate, int64_t dtype, int64_t activation, const float* weights,
    const int64_t* order, const int64_t* starts, const int64_t* rows, int64_t num_rows,
    int64_t tokens, int64_t choices, int64_t width, int64_t begun, float* grad_x, void* grad_u,
    void* grad_v, void* grad_gate, float* grad_weights, int32_t threads) {
  const Sorted sorted({order, starts, rows, num_rows}, tokens, choices, gate);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const Experts<T> experts(u, v, gate, width, activation);
    T *of_u = static_cast<T*>(grad_u), *of_gate = static_cast<T*>(grad_gate);
    const TableGradients<T> gradients{{gate ? of_gate : of_u, gate ? of_u : nullptr},
                                      static_cast<T*>(grad_v), begun != 0};
    backward(experts, grad, inner, x, weights, sorted, gradients, grad_x, grad_weights, threads);
  });
}
