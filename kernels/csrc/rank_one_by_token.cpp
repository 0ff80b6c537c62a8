// rank_one_experts, token after token: its experts' rows are read, used and forgotten. For few
// assignments per expert, when a row that was read is seldom wanted again.

#include <utility>

#include "rank_one_experts.h"

namespace moezoo {
namespace {

// The assignments of one token that name an expert, and their numbers, in the order of the slots.
class Kept {
 public:
  explicit Kept(int64_t choices) : slots(choices), experts(choices), storage_(8 * choices) {
    float* p = storage_.data();
    const auto next = [&] { return std::exchange(p, p + choices); };
    numbers = {next(), {next(), next()}, next(), next(), {next(), next()}, next()};
  }

  void read(const int64_t* indices, int64_t choices) {
    count = 0;
    for (int64_t j = 0; j < choices; ++j) {
      if (indices[j] < 0) continue;
      slots[count] = j;
      experts[count++] = indices[j];
    }
  }

  void gather(const float* row, float* values) const {
    for (int64_t i = 0; i < count; ++i) values[i] = row[slots[i]];
  }

  void scatter(const float* values, int64_t choices, float* row) const {
    std::fill(row, row + choices, 0.0f);
    for (int64_t i = 0; i < count; ++i) row[slots[i]] = values[i];
  }

  std::vector<int64_t> slots, experts;
  int64_t count = 0;
  Numbers numbers;

 private:
  std::vector<float> storage_;
};

constexpr int64_t kAhead = 8;  // rows that are asked for before they are used

template <class T>
void request(Tables<T> tables, int64_t expert, int64_t width) {
  for (int64_t k = 0; k < tables.size(); ++k) request_row(tables[k] + expert * width, width);
}

// dots[k][i] = <row, row of table k>, over the kept assignments. The rows of `later`, which are
// read next, are asked for when those of `tables` run out.
template <class T>
void dot_rows(Tables<T> tables, Tables<T> later, const Kept& kept, const float* row, int64_t width,
              float* const* dots) {
  for (int64_t i = 0; i < kept.count; ++i) {
    const int64_t next = i + kAhead;
    if (next < kept.count) request(tables, kept.experts[next], width);
    else if (next < 2 * kept.count) request(later, kept.experts[next - kept.count], width);
    for (int64_t k = 0; k < tables.size(); ++k)
      dots[k][i] = dot(row, tables[k] + kept.experts[i] * width, width);
  }
}

// output = Σ weights[k][i] row of table k, over the kept assignments. Four rows at a time: the sum
// is read and written a quarter as often, and their cache misses overlap.
template <class T>
void sum_kept(Tables<T> tables, const Kept& kept, const float* const* weights, int64_t width,
              float* output) {
  constexpr int64_t kAtOnce = 4;
  std::fill(output, output + width, 0.0f);
  for (int64_t i = 0; i < kept.count; i += kAtOnce) {
    const int64_t count = std::min(kAtOnce, kept.count - i);
    for (int64_t next = i + kAhead; next < std::min(i + kAhead + kAtOnce, kept.count); ++next)
      request(tables, kept.experts[next], width);
    for (int64_t k = 0; k < tables.size(); ++k) {
      const T* rows[kAtOnce];
      for (int64_t b = 0; b < count; ++b) rows[b] = tables[k] + kept.experts[i + b] * width;
      sum_rows<Cached>(rows, weights[k] + i, count, width, output, output);
    }
  }
}

template <class T>
void forward(const Experts<T>& experts, const float* x, const int64_t* indices,
             const float* weights, int64_t tokens, int64_t choices, float* output, float* inner,
             int32_t threads) {
  const Tables<T> asked = experts.inner(), summed = experts.outer();
  const int64_t width = experts.width;
  parallel_ranges(tokens, 1, threads, [&](int64_t first, int64_t last) {
    Kept kept(choices);
    const Numbers& n = kept.numbers;
    for (int64_t t = first; t < last; ++t) {
      kept.read(indices + t * choices, choices);
      dot_rows(asked, summed, kept, x + t * width, width, n.dots);
      for (int64_t k = 0; k < asked.size(); ++k)
        kept.scatter(n.dots[k], choices, inner + (t * asked.size() + k) * choices);
      kept.gather(weights + t * choices, n.weight);
      activate_all(experts.activation, experts.gated(), n, kept.count);
      sum_kept(summed, kept, &n.coefficient, width, output + t * width);
    }
  });
}

// Gives no gradients of tables: those are sums over tokens.
template <class T>
void backward(const Experts<T>& experts, const float* grad, const float* inner,
              const int64_t* indices, const float* weights, int64_t tokens, int64_t choices,
              float* grad_x, float* grad_weights, int32_t threads) {
  const Tables<T> asked = experts.outer(), summed = experts.inner();
  const int64_t width = experts.width;
  parallel_ranges(tokens, 1, threads, [&](int64_t first, int64_t last) {
    Kept kept(choices);
    const Numbers& n = kept.numbers;
    for (int64_t t = first; t < last; ++t) {
      kept.read(indices + t * choices, choices);
      dot_rows(asked, summed, kept, grad + t * width, width, &n.answer);
      for (int64_t k = 0; k < summed.size(); ++k)
        kept.gather(inner + (t * summed.size() + k) * choices, n.dots[k]);
      kept.gather(weights + t * choices, n.weight);
      differentiate_all(experts.activation, experts.gated(), n, kept.count);
      if (grad_weights) kept.scatter(n.grad_weight, choices, grad_weights + t * choices);
      if (grad_x) sum_kept(summed, kept, n.grad_dots, width, grad_x + t * width);
    }
  });
}

}  // namespace
}  // namespace moezoo

using namespace moezoo;

// output (T, D) and pre-activations inner (T, I); a slot with a negative index adds nothing, and
// its pre-activations are zero.
MOEZOO_API void moezoo_rank_one_experts_by_token(
    const float* x, const void* u, const void* v, const void* gate, int64_t dtype,
    int64_t activation, const int64_t* indices, const float* weights, int64_t tokens,
    int64_t choices, int64_t width, float* output, float* inner, int32_t threads) {
  with_type(dtype, [&](auto type) {
    const Experts<decltype(type)> experts(u, v, gate, width, activation);
    forward(experts, x, indices, weights, tokens, choices, output, inner, threads);
  });
}

// grad_x (T, D) and grad_weights (T, J), each null if not wanted.
MOEZOO_API void moezoo_rank_one_experts_backward_by_token(
    const float* grad, const float* inner, const void* u, const void* v, const void* gate,
    int64_t dtype, int64_t activation, const int64_t* indices, const float* weights,
    int64_t tokens, int64_t choices, int64_t width, float* grad_x, float* grad_weights,
    int32_t threads) {
  with_type(dtype, [&](auto type) {
    const Experts<decltype(type)> experts(u, v, gate, width, activation);
    backward(experts, grad, inner, indices, weights, tokens, choices, grad_x, grad_weights,
             threads);
  });
}
